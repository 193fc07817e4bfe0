"""A rank of a training job in a pod of its own: saves each step, and says how long that took.

What a rank trains is a function of its number and the step (`lab_job.State`), with a sum over all
ranks in each step: who stands still holds up everybody, as with a collective. A line of JSON on the
output for everything that happens. Variables: RANK, WORLD_SIZE, MASTER (where rank 0 is), DEST,
NUMBERS of a rank's state.
"""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Client, Connection, Listener

from lab_job import State, say

import tierkeep

PORT = 29500


class Meeting:
    """Sums over all ranks, by way of rank 0."""

    def __init__(self, rank: int, world: int, master: str) -> None:
        self._others: list[Connection] = []
        if rank == 0:
            with Listener(("0.0.0.0", PORT), backlog=world) as listener:
                self._others = [listener.accept() for _ in range(world - 1)]
        self._first = None if rank == 0 else self._connected(master)

    @staticmethod
    def _connected(master: str) -> Connection:
        end = time.monotonic() + 60
        while True:
            try:
                return Client((master, PORT))
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def sum(self, own: int) -> int:
        try:
            return self._sum(own)
        except (EOFError, ConnectionError):  # As in a collective: it hangs until it is killed.
            signal.pause()
            raise

    def _sum(self, own: int) -> int:
        if self._first is not None:
            self._first.send(own)
            return int(self._first.recv())
        total = own + sum(int(other.recv()) for other in self._others)
        for other in self._others:
            other.send(total)
        return total


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    state = State(rank, int(os.environ["NUMBERS"]))
    tensors = {"weights": state.weights, "momentum": state.momentum}
    meeting = Meeting(rank, world, os.environ["MASTER"])
    # Everything stays on disk: the test reads every step.
    ckpt = tierkeep.Checkpointer(os.environ["DEST"], replicas=1, keep_last=1_000_000)
    found = ckpt.restore(tensors)
    step = found.step if found else 0
    say(event="resumed", rank=rank, step=step, crc=state.crc(), tier=found and found.tier)
    while True:
        total = meeting.sum(state.own())
        step += 1
        state.train(step, total)
        began = time.monotonic()
        save = ckpt.save(step, tensors)
        took = time.monotonic() - began
        save.wait("peer", 120).wait("disk", 120)
        whole = time.monotonic() - began
        say(event="saved", rank=rank, step=step, ms=took * 1000, whole_ms=whole * 1000)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
