"""The two processes of the job: started together, listened to, and killed together."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

WORLD = 2
SILENCE_SECONDS_MAX = 120.0
TRAIN = Path(__file__).with_name("train.py")


class Failed(Exception):
    """The demo cannot go on. The message says what was seen, for a person."""


class Ranks:
    """One start of the job. What rank 0 prints comes through a pipe, so that nothing is late."""

    def __init__(self, arguments: list[str], ram: Path, logs: Path, agent: str) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(WORLD)]
        self.unread = b""
        self.processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        for rank in range(WORLD):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                # Without this, gloo looks the host's name up, and not every host knows its own.
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
                "OMP_NUM_THREADS": "1",
                "TIERKEEP_RAM_DIR": str(ram),
                "TIERKEEP_AGENT": agent,
            }
            with self.logs[rank].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(TRAIN), *arguments],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else log,
                        stderr=log,
                    )
                )

    def line(self) -> list[str] | None:
        """The next thing that rank 0 says, as words; None when the job ended well."""
        pipe = self.processes[0].stdout
        assert pipe is not None
        deadline = time.monotonic() + SILENCE_SECONDS_MAX
        while b"\n" not in self.unread:
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"rank 0 said nothing for {SILENCE_SECONDS_MAX:.0f} s{self.tail(0)}")
            if select.select([pipe], [], [], 0.5)[0]:
                read = os.read(pipe.fileno(), 65536)
                if not read:
                    self.join(deadline)
                    return None
                self.unread += read
        line, self.unread = self.unread.split(b"\n", 1)
        return line.decode().split()

    def join(self, deadline: float) -> None:
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Failed(f"rank {rank} did not end{self.tail(rank)}") from None
        self.check()

    def check(self) -> None:
        """Fails with the words of every rank that fell, not only of the one it took along."""
        if any(process.poll() for process in self.processes):
            time.sleep(1.0)
            codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
            fallen = [
                f"rank {r} exited with {code}{self.tail(r)}" for r, code in codes.items() if code
            ]
            raise Failed("\n".join(fallen))

    def kill(self) -> None:
        """SIGKILL to every rank: no handler runs, nothing is flushed, nobody says goodbye."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def warnings(self, rank: int) -> list[str]:
        """What tierkeep warned of in this rank's log."""
        return self.logged("WARNING", rank)

    def errors(self) -> list[tuple[int, str]]:
        """Each rank that logged an error of tierkeep's, with the error."""
        return [(rank, line) for rank in range(WORLD) for line in self.logged("ERROR", rank)]

    def logged(self, level: str, rank: int) -> list[str]:
        lines = self.logs[rank].read_text(errors="replace").splitlines()
        ours = [line.split(": ", 1)[-1] for line in lines if line.startswith(f"{level} tierkeep")]
        return [line.removeprefix(f"rank {rank}: ") for line in ours]

    def tail(self, rank: int) -> str:
        lines = self.logs[rank].read_text(errors="replace").splitlines()[-15:]
        return f"; the end of {self.logs[rank]}:\n  " + "\n  ".join(lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
