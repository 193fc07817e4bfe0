"""Between nodes: replication and restore against iperf3, over the same links of a lab, in one run.

    python benches/peers.py [--gib 1] [--rounds 5] [--mbit N]

Nodes are network namespaces of this machine, so both ends of a transfer share its cores: rates are
compared with iperf3's between the same two nodes, and CPU seconds are those of both ends together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

from lab import Lab, Node

GIB = 1 << 30
TICKS = os.sysconf("SC_CLK_TCK")

# A rank of its own on one node: it saves when it is told to, and says what became of it.
RANK = """
import json, sys, time
import numpy as np
import tierkeep

destination, socket, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
state = {"w": np.arange(size // 8, dtype=np.int64)}
ckpt = tierkeep.Checkpointer(destination, agent=socket, replicas=int(sys.argv[4]), slots=3,
                             disk_every=10**9, rank=0, world_size=1)
begun = time.perf_counter()
found = ckpt.restore(state)
took = time.perf_counter() - begun
good = found is None or bool((state["w"][:8] == np.arange(8) + found.step).all())
print(json.dumps({"restored": found and found.step, "seconds": took, "good": good}), flush=True)
step = found.step if found else 0
for line in sys.stdin:
    step += 1
    state["w"] += 1
    save = ckpt.save(step, state)
    begun = time.perf_counter()
    save.wait("peer", 120)
    print(json.dumps({"step": step, "seconds": time.perf_counter() - begun}), flush=True)
"""


class Rank:
    """That process, on a node."""

    def __init__(self, lab: Lab, node: Node, size: int, replicas: int) -> None:
        command = [sys.executable, "-c", RANK, f"{lab.here}/disk/run", node.socket, str(size)]
        self.process = node.start(
            *command, str(replicas), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.begun = self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the rank died"
        return dict(json.loads(line))

    def save(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.hear()["seconds"])


def cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def iperf(server: Node, client: Node, seconds: int = 3, streams: int = 4) -> tuple[float, float]:
    """Bytes a second, and CPU seconds a GB of both ends."""
    serving = server.start("iperf3", "-s", "-1", stdout=subprocess.DEVNULL)
    time.sleep(0.3)
    text = client.run("iperf3", "-c", server.address, "-t", str(seconds), "-P", str(streams), "-J")
    serving.wait(20)
    server.processes.remove(serving)
    data = json.loads(text)["end"]
    load = data["cpu_utilization_percent"]
    received = data["sum_received"]
    spent = (load["host_total"] + load["remote_total"]) / 100 * received["seconds"]
    return received["bits_per_second"] / 8, spent / (received["bytes"] / 1e9)


def replication(lab: Lab, size: int, rounds: int) -> dict[str, Any]:
    """Pairs of iperf3 and a save that goes to the other node."""
    a, b = lab.nodes[:2]
    agents = [node.processes[0] for node in (a, b)]
    rank = Rank(lab, a, size, 1)
    for _ in range(3):  # Slots are made at the first saves, there and here.
        rank.save()
    rates, ours, costs, theirs = [], [], [], []
    for _ in range(rounds):
        rate, cost = iperf(b, a)
        before = sum(cpu(agent.pid) for agent in agents)
        seconds = rank.save()
        spent = sum(cpu(agent.pid) for agent in agents) - before
        rates.append(rate)
        theirs.append(cost)
        ours.append(size / seconds)
        costs.append(spent / (size / 1e9))
    return {
        "iperf3_GBps": statistics.median(rates) / 1e9,
        "tierkeep_GBps": statistics.median(ours) / 1e9,
        "ratio": statistics.median(o / r for o, r in zip(ours, rates, strict=True)),
        "cpu_s_per_GB": statistics.median(costs),
        "iperf3_cpu_s_per_GB": statistics.median(theirs),
    }


def restore(lab: Lab, size: int, rounds: int) -> dict[str, Any]:
    """A lost node's shard, fetched from the two nodes that hold it."""
    ratios, seconds = [], []
    rank = Rank(lab, lab.nodes[0], size, 2)
    rank.save()
    for round_ in range(rounds):
        node = lab.nodes[0]
        node.lose()
        node.replace()
        node.start_agent()
        lab.gathered(lab.nodes)
        time.sleep(4)  # An agent that has just begun waits until gossip has settled.
        rate, _ = iperf(node, lab.nodes[1 + round_ % 2])
        rank = Rank(lab, node, size, 2)
        assert rank.begun["restored"] and rank.begun["good"], rank.begun
        seconds.append(rank.begun["seconds"])
        ratios.append(rank.begun["seconds"] / (size / rate))
        rank.save()
    return {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the shard (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each (default: 5)")
    parser.add_argument("--mbit", type=int, help="speed of each link; default: as fast as it goes")
    wishes = parser.parse_args()
    size = int(wishes.gib * GIB) // 8 * 8
    found: dict[str, Any] = {}
    with Lab(3, ram_mib=8 * 1024) as lab:
        if wishes.mbit:
            lab.limit(wishes.mbit)
        lab.start_agents()
        found["replication"] = replication(lab, size, wishes.rounds)
        print(json.dumps(found, indent=2), flush=True)
    with Lab(3, ram_mib=8 * 1024) as lab:
        if wishes.mbit:
            lab.limit(wishes.mbit)
        lab.start_agents()
        found["restore_of_a_lost_node"] = restore(lab, size, wishes.rounds)
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
