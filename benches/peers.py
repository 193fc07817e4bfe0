"""Between nodes: replication and restore against iperf3, over the same links of a lab, in one run.

    python benches/peers.py [--gib 1] [--rounds 5] [--mbit N] [--only replication]

Replication goes in plain text and with TLS, in turns. Nodes are network namespaces of this machine,
so both ends of a transfer share its cores: rates are compared with iperf3's between two such nodes,
and CPU seconds are those of both ends together. Takes memory of about 12 shards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from between import Saver, begin, certificates, cpu_seconds, iperf, machine, say, turn
from lab import Lab

GIB = 1 << 30


class Pair:
    """Two nodes, and a rank on the first: its copies can only go to the second."""

    def __init__(self, lab: Lab, size: int) -> None:
        self.lab = lab
        self.size = size
        self.agents = [node.start_agent() for node in lab.nodes]
        lab.gathered(lab.nodes)
        self.saver = Saver(lab, lab.nodes[0], size, 1)
        for _ in range(3):  # Slots are made at the first saves, there and here.
            self.saver.save()
        self.rates: list[float] = []
        self.costs: list[float] = []

    def save(self) -> None:
        """A save that goes to the other node: bytes a second, and CPU seconds a GB."""
        before = sum(cpu_seconds(agent.pid) for agent in self.agents)
        self.rates.append(self.size / self.saver.save())
        spent = sum(cpu_seconds(agent.pid) for agent in self.agents) - before
        self.costs.append(spent / (self.size / 1e9))


def ratio(over: list[float], under: list[float]) -> float:
    """The median of the ratios of neighbours."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def replication(size: int, rounds: int, mbit: int | None) -> dict[str, Any]:
    """iperf3, a save in plain text and one with TLS, in turns."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierkeep-bench-")))
        pairs = {}
        for name, transport in (("plain", None), ("tls", certificates(place))):
            lab = stack.enter_context(lab_of(2, size, mbit, transport))
            pairs[name] = Pair(lab, size)
        rates, costs = [], []
        for round_ in range(rounds):
            a, b = pairs["plain"].lab.nodes
            rate, cost = iperf(b, a)
            rates.append(rate)
            costs.append(cost)
            for pair in turn(list(pairs.values()), round_):
                pair.save()
            say(f"replication: {round_ + 1} of {rounds} rounds")
    plain, tls = pairs["plain"], pairs["tls"]
    found: dict[str, Any] = {
        "iperf3": {
            "GB_per_s": statistics.median(rates) / 1e9,
            "cpu_s_per_GB": statistics.median(costs),
        }
    }
    for name, pair in pairs.items():
        found[name] = {
            "GB_per_s": statistics.median(pair.rates) / 1e9,
            "rate_over_iperf3": ratio(pair.rates, rates),
            "cpu_s_per_GB": statistics.median(pair.costs),
        }
    found["tls_over_plain"] = {
        "rate": ratio(tls.rates, plain.rates),
        "cpu": ratio(tls.costs, plain.costs),
    }
    return found


def restore(size: int, rounds: int, mbit: int | None) -> dict[str, Any]:
    """A lost node's shard, fetched from the two nodes that hold it."""
    ratios, seconds = [], []
    with lab_of(3, size, mbit) as lab:
        lab.start_agents()
        saver = Saver(lab, lab.nodes[0], size, 2)
        saver.save()
        for round_ in range(rounds):
            node = lab.nodes[0]
            node.lose()
            node.replace()
            node.start_agent()
            lab.gathered(lab.nodes)
            time.sleep(4)  # An agent that has just begun waits until gossip has settled.
            rate, _ = iperf(node, lab.nodes[1 + round_ % 2])
            saver = Saver(lab, node, size, 2)
            assert saver.begun["restored"] and saver.begun["good"], saver.begun
            seconds.append(saver.begun["seconds"])
            ratios.append(saver.begun["seconds"] / (size / rate))
            saver.save()
            say(f"restore: {round_ + 1} of {rounds} rounds")
    return {
        "seconds": statistics.median(seconds),
        "seconds_over_iperf3": statistics.median(ratios),
    }


@contextlib.contextmanager
def lab_of(
    nodes: int, size: int, mbit: int | None, transport: dict[str, str] | None = None
) -> Iterator[Lab]:
    """A lab with room for the shard's slots on each node."""
    with Lab(nodes, ram_mib=max(512, 8 * size >> 20), transport=transport) as lab:
        if mbit:
            lab.limit(mbit)
        yield lab


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the shard (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--mbit", type=int, help="speed of each link; default: as fast as it goes")
    measurements = {"replication": replication, "restore_of_a_lost_node": restore}
    parser.add_argument("--only", choices=measurements, help="leave the other one out")
    wishes = parser.parse_args()
    size = int(wishes.gib * GIB) // 8 * 8
    begin()
    found: dict[str, Any] = {"machine": machine(), "parameters": vars(wishes)}
    for name, measure in measurements.items():
        if wishes.only in (None, name):
            found[name] = measure(size, wishes.rounds, wishes.mbit)
            say(f"{name}: {json.dumps(found[name])}")
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
