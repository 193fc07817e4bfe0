"""Whether an agent that is alive is ever missed while its host has no core left.

    python benches/soak.py [--minutes 10] [--nodes 5] [--load 2]

Every node replicates all the time, as fast as it goes, beside `--load` processes a core that do
nothing but compute. Whenever an agent's log says that another one is gone, that is a false death.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from between import Logs, Saver, begin, machine, say
from lab import Lab

MIB = 1 << 20
SAVE_WITHIN_S = 150.0


class Replication(threading.Thread):
    """Has a node's rank save, again and again."""

    def __init__(self, saver: Saver, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.saver = saver
        self.over = over
        self.saves = 0
        self.errors: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            try:
                said = self.saver.try_save()
            except (RuntimeError, OSError) as e:  # It died: that is counted as well.
                self.errors.append(str(e))
                return
            if "error" in said:
                self.errors.append(said["error"])
            else:
                self.saves += 1


def cores_busy() -> tuple[float, float]:
    """Ticks that all cores worked so far, and all ticks."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    ticks = [int(word) for word in line.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def soak(lab: Lab, wishes: argparse.Namespace) -> dict[str, Any]:
    """Loads the machine for so long, and counts who was missed."""
    size = int(wishes.mib * MIB) // 8 * 8
    over = threading.Event()
    savers = [Saver(lab, node, size, 1, f"of-{node.name}") for node in lab.nodes]
    replications = [Replication(saver, over) for saver in savers]
    for saver in savers:
        saver.save()
    agents = {node.name: node.processes[0] for node in lab.nodes}
    logs = Logs(lab.nodes)
    processes = round(wishes.load * (os.cpu_count() or 1))
    for number in range(processes):
        lab.nodes[number % len(lab.nodes)].start("sh", "-c", "while :; do :; done")
    began, (busy, ticks) = time.time(), cores_busy()
    for replication in replications:
        replication.start()
    while (left := began + wishes.minutes * 60 - time.time()) > 0:
        time.sleep(min(60, left))
        saves = sum(replication.saves for replication in replications)
        gone = len(logs.deaths())
        say(f"{(time.time() - began) / 60:.1f} minutes: {saves} saves, {gone} false deaths")
    busy_, ticks_ = cores_busy()
    minutes = (time.time() - began) / 60
    deaths = sorted((death.at - began, death.name, death.teller) for death in logs.deaths())
    dead = [name for name, agent in agents.items() if agent.poll() is not None]
    over.set()
    for replication in replications:
        replication.join(SAVE_WITHIN_S)
    saves = sum(replication.saves for replication in replications)
    errors = [error for replication in replications for error in replication.errors]
    return {
        "minutes": minutes,
        "false_deaths": len(deaths),
        "deaths": [{"after_s": at, "name": name, "told_by": by} for at, name, by in deaths],
        "agents_that_ended": dead,
        "busy_processes": processes,
        "cores_busy_percent": 100 * (busy_ - busy) / (ticks_ - ticks),
        "saves_on_other_nodes": saves,
        "replicated_GB": saves * size / 1e9,
        "saves_that_failed": len(errors),
        "first_failures": errors[:5],
        "ranks_that_ended": sum(saver.process.poll() is not None for saver in savers),
        "met": not deaths and not dead,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--nodes", type=int, default=5, help="with an agent each (default: 5)")
    parser.add_argument("--mib", type=float, default=64.0, help="of each save (default: 64)")
    parser.add_argument("--load", type=float, default=2.0, help="processes a core (default: 2)")
    wishes = parser.parse_args()
    begin()
    with Lab(wishes.nodes, ram_mib=max(512, int(16 * wishes.mib))) as lab:
        lab.start_agents()
        found = soak(lab, wishes)
    print(json.dumps({"machine": machine(), "parameters": vars(wishes), **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
