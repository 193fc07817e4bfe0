"""The agent of the demo's node: started, killed, and another started in its place."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ranks import Failed

SECONDS_MAX = 30.0
COMMAND = str(Path(sys.executable).with_name("tierkeep"))


class Agent:
    """`tierkeep agent`, which owns the RAM tier of both ranks."""

    def __init__(self, ram: Path, log: Path) -> None:
        self.socket = ram / "agent.sock"
        self.log = log
        self.start()

    def start(self) -> None:
        ram = self.socket.parent
        command = [COMMAND, "agent", "--ram-dir", str(ram), "--socket", str(self.socket)]
        self.socket.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + SECONDS_MAX
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the agent did not start; its log is {self.log}")
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
