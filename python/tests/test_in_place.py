"""Containers that are started again in their pods: new processes with the same environment, each by
itself, beside ranks that live on. Nothing but that environment says which rank they are, and no
process group carries an id of the start.
"""

from __future__ import annotations

import json
import re
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent
from test_processes import ended, python

RANKS = 3

# A step for each line that it reads; a save counts when all ranks have it in RAM.
SCRIPT = """
    import json, sys
    import numpy as np
    import tierkeep

    def say(**words):
        print(json.dumps(words), flush=True)

    run, wait = sys.argv[1], float(sys.argv[2])
    ckpt = tierkeep.Checkpointer(run, disk_every=10**6, timeouts_s={"attempt_wait_s": wait})
    state = {"x": np.zeros(100_000)}
    try:
        found = ckpt.restore(state)
        step, tier = (found.step, found.tier) if found else (0, None)
        say(step=step, tier=tier, x=state["x"].tolist()[-1], repr=repr(ckpt))
        for _ in sys.stdin:
            step += 1
            state["x"] += step * (ckpt.rank + 1)
            ckpt.save(step, state).wait("ram", 60)
            say(step=step)
    except tierkeep.FencedError as e:
        say(fenced=str(e))
        sys.exit(1)
"""


class Container:
    """One rank's, of an indexed Job: `start` is also what the kubelet does when it has ended."""

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self.rank = run, rank
        self.process: Any = None

    def start(self, wait: float = 120) -> None:
        index = {"JOB_COMPLETION_INDEX": str(self.rank), "WORLD_SIZE": str(RANKS)}
        self.process = python(SCRIPT, self.run, wait, **index)

    def kill(self) -> None:
        self.process.kill()
        assert ended(self.process)[0] == -signal.SIGKILL

    def says(self, within: float = 60) -> dict[str, Any] | None:
        """Its next line; None where there is none so soon."""
        if not select.select([self.process.stdout], [], [], within)[0]:
            return None
        line = self.process.stdout.readline()
        assert line, ended(self.process)
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def is_fenced(self) -> str:
        """It has ended, and why."""
        code, out, err = ended(self.process)
        assert code == 1, err
        return str(json.loads(out)["fenced"])

    def has_resumed(self, step: int, tier: str | None) -> None:
        said = self.says()
        assert said is not None, f"rank {self.rank} did not begin"
        x = sum(step * (self.rank + 1) for step in range(step + 1))
        assert (said["step"], said["tier"], said["x"]) == (step, tier, x), said
        assert f"rank {self.rank} of {RANKS} (indexed Job)" in said["repr"]


@pytest.fixture(params=["agent", "no agent"])
def containers(request: pytest.FixtureRequest, run: Path, ram: Path) -> Iterator[list[Container]]:
    """None of them has been started."""
    # Without one RAM is the pod's: an emptyDir in memory stays when its containers start again.
    agent = Agent(ram) if request.param == "agent" else None
    made = [Container(run, rank) for rank in range(RANKS)]
    yield made
    for container in made:
        if container.process is not None:
            container.process.kill()
            ended(container.process)
    if agent is not None:
        agent.stop(signal.SIGKILL)
        agent.log.unlink()


def train(containers: list[Container], steps: range) -> None:
    """All ranks take these steps: they are of one attempt, or no checkpoint would be whole."""
    for step in steps:
        for container in containers:
            container.ask()
        for container in containers:
            assert container.says() == {"step": step}


def test_containers_that_are_started_again_find_their_state_in_ram(
    containers: list[Container],
) -> None:
    lead, other, third = containers
    for container in containers:
        container.start()
    for container in containers:
        container.has_resumed(0, None)
    train(containers, range(1, 3))

    # One rank alone: the attempt that it had is another process's, and goes on without it.
    other.kill()
    other.start(wait=2)
    assert "was claimed by another process" in other.is_fenced()
    assert third.process.poll() is None
    assert lead.process.poll() is None

    # Rank 0 too: who lives on belongs to an attempt that is over, and learns it when it saves.
    other.start()
    assert other.says(within=0.5) is None
    lead.kill()
    assert other.says(within=0.5) is None
    lead.start()
    lead.has_resumed(2, "ram")
    other.has_resumed(2, "ram")
    third.ask()
    assert re.search("attempt .*has (begun|taken over)", third.is_fenced())
    third.start()
    third.has_resumed(2, "ram")
    train(containers, range(3, 5))

    # All of them, and rank 0 comes last: nobody joins the attempt of a dead one.
    for container in containers:
        container.kill()
    other.start()
    third.start()
    assert other.says(within=0.5) is None
    assert third.says(within=0.5) is None
    lead.start()
    for container in containers:
        container.has_resumed(4, "ram")
    train(containers, range(5, 6))


def test_a_rank_that_came_too_late_for_a_dead_start_waits_for_the_next_one(
    containers: list[Container],
) -> None:
    lead, *others = containers
    lead.start()
    lead.has_resumed(0, None)
    lead.kill()
    for container in others:
        container.start()
    assert others[0].says(within=0.5) is None
    lead.start()
    for container in containers:
        container.has_resumed(0, None)
    train(containers, range(1, 2))
