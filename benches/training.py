"""What training loses while its saves go to another node at a part of the link.

    python benches/training.py [--mbit 4000] [--share 4] [--seconds 20] [--rounds 7]

Two nodes with one rank each train the same steps in three ways, in turns: without saves; with
saves that stay in their node's RAM; and with saves that go to the other node, a new one as soon as
the one before is there, at `peer_rate` = link / share. Those in RAM come as often.

Both nodes share this machine's cores. On a real host a device computes, and cores are left for the
agent: so each step waits here `--device-ms` as for one, after `--threads` of each rank have
computed. With `--device-ms 0` and as many threads as cores the loss is that of cores, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from between import HERE, begin, cpu_seconds, machine, say, turn
from lab import Lab

MODES = ("none", "ram", "peer")


class Job:
    """A rank on each node."""

    def __init__(self, lab: Lab, wishes: argparse.Namespace) -> None:
        self.agents = [node.processes[0] for node in lab.nodes]
        self.ranks = []
        for rank, node in enumerate(lab.nodes):
            wish = {
                "rank": rank,
                "world": len(lab.nodes),
                "master": f"{lab.nodes[0].address}:20000",
                "destination": f"{lab.here}/disk/run",
                "agent": node.socket,
                **vars(wishes),
            }
            command = [sys.executable, str(HERE / "training_rank.py"), json.dumps(wish)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.ranks.append(node.start(*command, **pipes))
        self._hear()

    def _hear(self) -> list[dict[str, Any]]:
        lines = [rank.stdout.readline() for rank in self.ranks]
        assert all(lines), "a rank died"
        return [dict(json.loads(line)) for line in lines]

    def phase(self, mode: str, seconds: float, every_s: float) -> dict[str, Any]:
        """All ranks train in one of the ways; what rank 0 says of it, and the agents' cores."""
        began, before = time.monotonic(), sum(cpu_seconds(agent.pid) for agent in self.agents)
        wish = json.dumps({"mode": mode, "seconds": seconds, "every_s": every_s})
        for rank in self.ranks:
            rank.stdin.write(f"{wish}\n")
            rank.stdin.flush()
        said = self._hear()[0]
        spent = sum(cpu_seconds(agent.pid) for agent in self.agents) - before
        said["agents_cores"] = spent / (time.monotonic() - began)
        return said


def measure(job: Job, wishes: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Phases of all modes, in turns."""
    # Slots are made at the first saves, here and there. Then it is known how often they come.
    alone = wishes.mib * (1 << 20) * 8 * wishes.share / (wishes.mbit * 1e6)
    job.phase("ram", 3 * alone, alone / 2)
    job.phase("peer", 4 * alone, 0)
    every = job.phase("peer", max(wishes.seconds, 3 * alone), 0)["every_s"] or alone
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for round_ in range(wishes.rounds):
        for mode in turn(MODES, round_):
            found[mode].append(job.phase(mode, wishes.seconds, every))
        every = statistics.median(said["every_s"] or every for said in found["peer"])
        say(f"{round_ + 1} of {wishes.rounds} rounds")
    return found


def figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each mode, and of the losses of neighbours."""
    median = statistics.median
    pace = {mode: [s["steps"] / s["seconds"] for s in said] for mode, said in found.items()}

    def loss(of: str, beside: str) -> float:
        return 100 * (1 - median(a / b for a, b in zip(pace[of], pace[beside], strict=True)))

    modes = {
        mode: {
            "steps_per_s": median(pace[mode]),
            "save_every_s": median(s["every_s"] or 0 for s in said) or None,
            "saves": sum(s["saves"] for s in said),
            "failed": sum(s["failed"] for s in said),
            "stalled_percent": median(100 * s["stall_s"] / s["seconds"] for s in said),
            "rank0_sends_mbit_per_s": median(s["sent_bytes"] * 8e-6 / s["seconds"] for s in said),
            "agents_cores": median(s["agents_cores"] for s in said),
        }
        for mode, said in found.items()
    }
    return {
        "loss_percent": {
            "replicating, beside saves in RAM": loss("peer", "ram"),
            "replicating, beside no saves": loss("peer", "none"),
            "saves in RAM, beside no saves": loss("ram", "none"),
        },
        "modes": modes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float, text: str) -> None:
        kind = type(default)
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")

    add("--mbit", 4000, "speed of each node's link")
    add("--share", 4.0, "the link's part that copies may take is one in so many")
    add("--seconds", 20.0, "of each phase")
    add("--rounds", 7, "of three phases each")
    add("--mib", 256, "state of each rank")
    add("--threads", 1, "that compute in each rank")
    add("--matmuls", 2, "of 512 x 512 in each step")
    add("--reduce-mib", 1.0, "summed over the ranks in each step")
    add("--device-ms", 20.0, "each step waits as for a device")
    wishes = parser.parse_args()
    rate = int(wishes.mbit * 1e6 / 8 / wishes.share)
    begin()
    with Lab(2, ram_mib=max(512, 16 * wishes.mib)) as lab:
        lab.limit(wishes.mbit)
        lab.start_agents(peer_rate=str(rate))
        found = measure(Job(lab, wishes), wishes)
    where = machine()
    threads = f"2 ranks of {wishes.threads} threads on {where['cores']} cores"
    parameters = {**vars(wishes), "peer_rate_bytes_per_s": rate, "training_threads": threads}
    print(json.dumps({"machine": where, "parameters": parameters, **figures(found)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
