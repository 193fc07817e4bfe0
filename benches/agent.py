"""The bars of the agent: what a trainer pays for one, and what one costs a node.

`python benches/agent.py [--rounds N] [--dir DIR]`; `run.py` has these lines too. What is compared
is measured in turn, in one process: a Checkpointer with the agent, and one without.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

from state import gpt_state

import tierkeep

HERE = pathlib.Path(__file__).parent
COMMAND = str(pathlib.Path(sys.executable).with_name("tierkeep"))
RANKS = 8


class Table(Protocol):
    def add(self, what: str, bar: str, measured: str, met: bool) -> None: ...


class Agent:
    """`tierkeep agent` with a RAM tier of its own."""

    def __init__(self, ram: pathlib.Path) -> None:
        self.socket = ram / "agent.sock"
        command = [COMMAND, "agent", "--ram-dir", str(ram), "--socket", str(self.socket)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not self.socket.exists():
            time.sleep(0.01)

    def private_bytes(self) -> int:
        """Resident memory that is not the slots'."""
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        rows = dict(line.split(":", 1) for line in text.splitlines())
        return sum(int(rows[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))

    def cpu_seconds(self) -> float:
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1]
        user, system = fields.split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(base: pathlib.Path) -> Iterator[tuple[Agent, pathlib.Path, pathlib.Path]]:
    """An agent, a directory for runs, and a RAM tier for those that have none."""
    disk = pathlib.Path(tempfile.mkdtemp(prefix="tierkeep-bench-", dir=base))
    rams = [
        pathlib.Path(tempfile.mkdtemp(prefix="tierkeep-bench-", dir="/dev/shm")) for _ in range(2)
    ]
    agent = Agent(rams[0])
    try:
        yield agent, disk, rams[1]
    finally:
        agent.process.kill()
        agent.process.wait()
        for directory in (disk, *rams):
            shutil.rmtree(directory)


def seconds(save: tierkeep.Checkpointer, step: int, state: object) -> float:
    begun = time.perf_counter()
    save.save(step, state)
    return time.perf_counter() - begun


def stall(table: Table, base: pathlib.Path, rounds: int) -> None:
    """A save with the agent beside the same one without."""
    model, optimizer = gpt_state()
    state = {"model": model, "optim": optimizer}
    # What goes to disk runs beside the next save: that is another line's.
    quiet: dict[str, int] = {"disk_every": 10**9}
    with serving(base) as (agent, disk, ram):
        far = tierkeep.Checkpointer(disk / "far", agent=str(agent.socket), **quiet)
        near = tierkeep.Checkpointer(disk / "near", agent=False, ram_dir=ram, **quiet)
        pairs = []
        with far, near:
            for ckpt in (far, near):
                ckpt.restore(state)
                ckpt.prepare(state)
            time.sleep(5)
            for step in range(1, rounds + 4):
                took = {ckpt: seconds(ckpt, step, state) for ckpt in _turn((far, near), step)}
                if step > 3:  # Both slots of both are warm.
                    pairs.append((took[far], took[near]))
            for ckpt in (far, near):
                ckpt.save(rounds + 4, state).wait("ram")
    ratio = statistics.median(a / b for a, b in pairs)
    far_ms, near_ms = (statistics.median(p[i] for p in pairs) * 1e3 for i in (0, 1))
    table.add(
        "stall of a save of 1 GiB with the agent / without",
        "<= 1.05",
        f"{ratio:.3f} ({far_ms:.1f} and {near_ms:.1f} ms)",
        ratio <= 1.05,
    )


def _turn(pair: tuple[object, object], step: int) -> tuple:
    return pair if step % 2 else pair[::-1]


def calls(table: Table, base: pathlib.Path, count: int) -> None:
    binary = HERE.parent / "target/release/bench-call"
    with serving(base) as (agent, disk, _):
        command = [binary, str(agent.socket), str(disk / "run"), str(count)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    percentiles = json.loads(output)
    table.add(
        f"control call, round trip, p99 of {count}",
        "< 1 ms",
        f"{percentiles[99] / 1e3:.3f} ms (p50 {percentiles[50] / 1e3:.3f} ms)",
        percentiles[99] < 1000,
    )


RESTART = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from state import *
import tierkeep
model, optimizer = gpt_state()
state = {"model": model, "optim": optimizer}
# Before: after a restore slots are made ready, behind.
copy = Memcpy(tensors(model, optimizer))
copy.back()
begun = time.perf_counter()
copy.back()
reference = time.perf_counter() - begun
del copy
ckpt = tierkeep.Checkpointer(sys.argv[2], agent=sys.argv[3], disk_every=10**9)
begun = time.perf_counter()
found = ckpt.restore(state)
took = time.perf_counter() - begun
if found is None:
    ckpt.save(1, state).wait("ram")
print(took, reference, found and found.tier, flush=True)
os._exit(0)
"""


def restart(table: Table, base: pathlib.Path, rounds: int) -> None:
    """A new trainer: its state is back in its tensors."""
    figures = []
    with serving(base) as (agent, disk, _):
        command = [sys.executable, "-c", RESTART, str(HERE), str(disk / "run"), str(agent.socket)]
        for _ in range(rounds + 1):
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            took, reference, tier = output.split()
            if tier == "ram":
                figures.append((float(took), float(reference)))
    ratio = statistics.median(a / b for a, b in figures)
    took = statistics.median(a for a, _ in figures) * 1e3
    table.add(
        "restart of a trainer with the agent: 1 GiB back in its tensors / memcpy",
        "<= 1.2",
        f"{ratio:.2f} ({took:.0f} ms)",
        ratio <= 1.2,
    )


RANK = """
import sys, torch, tierkeep
ckpt = tierkeep.Checkpointer(
    sys.argv[1], agent=sys.argv[2], rank=int(sys.argv[3]), world_size=int(sys.argv[4]),
    attempt_id=sys.argv[5],
)
state = {"weights": torch.zeros(4 << 20), **{f"t{i}": torch.zeros(64) for i in range(500)}}
ckpt.restore(state)
for step in range(1, 31):
    ckpt.save(step, state).wait("ram", timeout_s=60)
ckpt.wait_all("disk", timeout_s=120)
print("idle", flush=True)
sys.stdin.read()
"""


def node(table: Table, base: pathlib.Path) -> None:
    """Eight ranks that save, then rest: what the agent takes beside their slots."""
    with serving(base) as (agent, disk, _):
        attempt = os.urandom(16).hex()
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    *("-c", RANK, str(disk / "run"), str(agent.socket)),
                    *(str(rank), str(RANKS), attempt),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(RANKS)
        ]
        peak = 0
        saving = threading.Thread(target=lambda: [rank.stdout.readline() for rank in ranks])
        saving.start()
        while saving.is_alive():
            peak = max(peak, agent.private_bytes())
            time.sleep(0.02)
        time.sleep(3)
        begun, cpu = time.monotonic(), agent.cpu_seconds()
        time.sleep(20)
        share = (agent.cpu_seconds() - cpu) / (time.monotonic() - begun) * 100
        rest = agent.private_bytes()
        for rank in ranks:
            rank.communicate(timeout=120)
    mib = 1 << 20
    table.add(
        f"the agent's own memory beside slots, {RANKS} ranks saving",
        "<= 50 MiB",
        f"{peak / mib:.0f} MiB at most, {rest / mib:.0f} MiB at rest",
        peak <= 50 * mib,
    )
    table.add(
        f"the agent's CPU, {RANKS} ranks idle",
        "< 0.5 % of a core",
        f"{share:.2f} %",
        share < 0.5,
    )


def measure(table: Table, base: pathlib.Path, rounds: int) -> None:
    stall(table, base, 2 * rounds)
    calls(table, base, 20_000)
    restart(table, base, rounds)
    node(table, base)


class Print:
    def add(self, what: str, bar: str, measured: str, met: bool) -> None:
        print(f"{what}: {measured} (bar {bar}) {'ok' if met else 'MISSED'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dir", type=pathlib.Path)
    arguments = parser.parse_args()
    base = nullcontext(arguments.dir) if arguments.dir else tempfile.TemporaryDirectory()
    with base as directory:
        measure(Print(), pathlib.Path(directory), arguments.rounds)


if __name__ == "__main__":
    main()
