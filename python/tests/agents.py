"""An agent of a test's own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("tierkeep"))


class Agent:
    """`tierkeep agent`, killed at the end; with these ``settings``, started by ``before``."""

    def __init__(self, ram: Path, *settings: str, before: Sequence[str] = ()) -> None:
        self.settings, self.before = settings, before
        self.socket = ram / "agent.sock"
        self.log = ram.with_name(ram.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        ram = self.socket.parent
        command = [*self.before, COMMAND, "agent", "--ram-dir", str(ram)]
        command += ["--socket", str(self.socket), *self.settings]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 20
        while not self.socket.exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert self.process.poll() is None, self.log.read_text()

    def stop(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(20)
