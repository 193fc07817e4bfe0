"""How long it takes until all agents have missed one that is gone, at default settings.

    python benches/detection.py [--nodes 5] [--trials 10]

In turns an agent is killed (SIGKILL) and another one's cable is pulled; the time runs from just
before that until another agent's log says that it is gone, for the first and the last of them. Who
is missed and was there all the time is counted, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from between import Logs, begin, machine, say
from lab import Lab, Node

BAR_S = 3.0
PATIENCE_S = 60.0
WAYS = ("killed", "cable pulled")


def trial(lab: Lab, victim: Node, way: str) -> tuple[list[float], int]:
    """One agent goes, and comes back: seconds until each other one missed it, sorted; and how often
    somebody else was missed, or it itself once more.
    """
    others = [node for node in lab.nodes if node is not victim]
    logs = Logs(others)
    began = time.time()
    if way == "killed":
        victim.kill()
    else:
        victim.cut()
    missed: dict[str, float] = {}
    while len(missed) < len(others):
        if time.time() > began + PATIENCE_S:
            raise TimeoutError(f"{victim.name}, {way}: missed by {sorted(missed)} alone")
        time.sleep(0.05)
        for death in logs.deaths():
            if death.name == victim.name:
                missed.setdefault(death.teller, death.at)
    if way == "killed":
        victim.start_agent()
    else:
        victim.mend()
    lab.gathered(lab.nodes, within=PATIENCE_S)
    return sorted(at - began for at in missed.values()), len(logs.deaths()) - len(missed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=5, help="with an agent each (default: 5)")
    parser.add_argument("--trials", type=int, default=10, help="of each way to go (default: 10)")
    parser.add_argument(
        "--settle", type=float, default=10.0, help="seconds before each trial (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of who goes (default: 1)")
    wishes = parser.parse_args()
    rng = random.Random(wishes.seed)
    begin()
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    wrong = 0
    with Lab(wishes.nodes) as lab:
        lab.start_agents()
        for number in range(wishes.trials):
            for way in WAYS:
                quiet = Logs(lab.nodes)
                time.sleep(wishes.settle)
                wrong += len(quiet.deaths())
                victim = rng.choice(lab.nodes)
                seconds, others = trial(lab, victim, way)
                found[way].append(seconds)
                wrong += others
                say(f"{number + 1} of {wishes.trials}: {victim.name}, {way}: {seconds[-1]:.2f} s")
    result: dict[str, Any] = {
        way: {
            "first_misses_it_s": statistics.median(seconds[0] for seconds in trials),
            "last_misses_it_s": statistics.median(seconds[-1] for seconds in trials),
            "longest_s": max(seconds[-1] for seconds in trials),
        }
        for way, trials in found.items()
    }
    slowest = max(figures["longest_s"] for figures in result.values())
    result |= {"false_deaths": wrong, "bar_s": BAR_S, "met": slowest <= BAR_S and wrong == 0}
    print(json.dumps({"machine": machine(), "parameters": vars(wishes), **result}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
