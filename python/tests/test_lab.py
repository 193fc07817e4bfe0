"""Real jobs on several nodes, with what happens to nodes. Each node is a namespace (`lab`).

`TIERKEEP_NODE_KILLS` says how often nodes are killed: a few times for each push, 200 before a
release.
"""

from __future__ import annotations

import json
import os
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from lab import COMMAND, HUB, Lab, LabUnavailableError, check, lab, run
from lab_job import expected
from lab_jobs import BucketJob, Job, copies

import tierkeep

KILLS = int(os.environ.get("TIERKEEP_NODE_KILLS", "4"))
PARTITION_SECONDS = float(os.environ.get("TIERKEEP_PARTITION_SECONDS", "5"))
SEED = int(os.environ.get("TIERKEEP_KILL_SEED") or time.time_ns() % 1_000_000)
SMALL = 150_000  # Numbers of a rank in trials that run often: 1.2 MB.


@pytest.fixture(autouse=True)
def _here() -> None:
    try:
        check()
    except LabUnavailableError as e:
        if os.environ.get("TIERKEEP_LAB") == "require":
            raise
        pytest.skip(f"NO LAB, nothing between nodes is tested: {e}")


class Truth:
    """What every rank's state is after each step."""

    def __init__(self, world: int, steps: int, numbers: int) -> None:
        self._crcs = expected(world, steps, numbers)

    def holds(self, said: dict[int, dict[str, Any]]) -> None:
        for rank, words in said.items():
            assert words["crc"] == self._crcs[words["step"]][rank], words


def kill_and_resume(made: Lab, world: int, replicas: int, victims: int, trials: int) -> None:
    """Kills `victims` nodes at once, wipes them, and resumes; again and again."""
    rng = random.Random(SEED)
    print(f"TIERKEEP_KILL_SEED={SEED}")
    truth = Truth(world, 60 * (trials + 2), SMALL)
    most = 60 * (trials + 2)
    lost = 0
    with Job(made, world, replicas, numbers=SMALL) as job:
        job.start(made.nodes, most)
        assert job.has_resumed() == 0
        job.until(lambda: job.on_peers >= 2, 60, "a step on peers")
        for trial in range(trials):
            job.listen(rng.uniform(0, 1.5))
            victim_nodes = rng.sample(made.nodes, victims)
            for node in victim_nodes:
                node.lose()
            # The launcher kills what is left of the job, and starts it anew.
            job.kill()
            safe = job.on_peers
            for node in victim_nodes:
                node.replace()
                node.start_agent()
            job.start(made.nodes, most)
            step = job.has_resumed()
            names = [node.name for node in victim_nodes]
            assert step >= safe, (trial, names, step, safe, job.logs())
            truth.holds(job.resumed)
            lost += step == safe
            before = job.on_peers
            job.until(lambda b=before: job.on_peers > b, 60, "a newer step on peers")  # type: ignore[misc]
        print(f"{trials} kills, the newest step was what had been told in {lost} of them")
        # The replacements have their copies, too.
        job.kill()
        # (What is durable on disk need not stay in RAM once a job has ended: nothing goes there.)
        job.start(made.nodes, job.has_resumed() + 3, disk_every=1_000_000)
        job.has_resumed()
        job.has_ended()
        truth.holds(job.ended)
        step = job.ended[0]["step"]
        held = copies(made, step, world)
        assert all(count >= 1 + replicas for count in held), (step, held)


@pytest.fixture(scope="module")
def four() -> Iterator[Lab]:
    with lab(4) as made:
        yield made


def test_any_node_is_killed_and_wiped(four: Lab) -> None:
    kill_and_resume(four, world=8, replicas=1, victims=1, trials=KILLS)


def test_with_two_copies_any_two_nodes_are_killed_and_wiped() -> None:
    with lab(4) as made:
        kill_and_resume(made, world=8, replicas=2, victims=2, trials=KILLS)


def test_a_partition_in_the_middle_of_saves_costs_nothing_that_was_told(four: Lab) -> None:
    """Half of the nodes do not hear the other half, for `TIERKEEP_PARTITION_SECONDS`."""
    truth = Truth(8, 400, SMALL)
    with Job(four, 8, numbers=SMALL, run="parted") as job:
        job.start(four.nodes, 400)
        job.has_resumed()
        job.until(lambda: job.on_peers >= 3, 60, "steps on peers")
        for node in four.nodes[2:]:
            node.cut()
        job.listen(PARTITION_SECONDS)
        for node in four.nodes[2:]:
            node.mend()
        four.gathered(four.nodes)
        before = job.on_peers
        job.until(lambda: job.on_peers > before, 90, "the same job goes on")
        job.kill()
        safe = job.on_peers
        job.start(four.nodes, 400)
        assert job.has_resumed() >= safe
        truth.holds(job.resumed)


def test_a_hint_to_a_new_node_has_its_shards_there_before_its_ranks_are() -> None:
    truth = Truth(6, 60, SMALL)
    with lab(3) as made, Job(made, 6, numbers=SMALL) as job:
        job.start(made.nodes, 60)
        job.has_resumed()
        job.until(lambda: job.on_peers >= 2, 60, "steps on peers")
        new = made.nodes[1]
        new.lose()
        job.kill()
        safe = job.on_peers
        new.replace()
        new.start_agent()
        made.gathered(made.nodes)
        hint = (COMMAND, "agent", "prefetch", f"{made.here}/disk/run", "--agent", new.socket)
        # Ranks go over the nodes in turn.
        said = json.loads(new.run(*hint, "--rank", "1", "--rank", "4-4", "--json"))
        assert said["step"] >= safe and not said["silent"], said
        assert [(r["rank"], r["here"]) for r in said["ranks"]] == [(1, True), (4, True)]
        # One of them may have been on its way here as a copy: it is fetched all the same.
        assert all(rank["fetched_bytes"] > 0 for rank in said["ranks"]), said
        job.start(made.nodes, 60)
        assert job.has_resumed() == said["step"]
        truth.holds(job.resumed)
        assert "came from" not in new.log.read_text(), "it was fetched again"


def test_what_was_cut_is_put_together_from_other_nodes_by_fewer_and_by_more_ranks() -> None:
    with lab(3) as made, Job(made, 3, numbers=SMALL, cut=True, disk_every=1000) as job:
        job.start(made.nodes, 400)
        assert job.has_resumed() == 0
        for world, count in ((2, 2), (3, 3), (1, 1), (4, 3)):
            before = job.on_peers
            job.until(lambda b=before: job.on_peers >= b + 3, 60, "steps on peers")  # type: ignore[misc]
            job.kill()
            safe, job.world = job.on_peers, world
            job.start(made.nodes[:count], 400)
            assert job.has_resumed() >= safe
            assert [said["crc"] for said in job.resumed.values()] == [1] * world
        # A node is lost with its memory, and its rank with it.
        before = job.on_peers
        job.until(lambda: job.on_peers >= before + 3, 60, "steps on peers")
        made.nodes[2].lose()
        job.kill()
        safe, job.world = job.on_peers, 2
        job.start(made.nodes[:2], 400)
        assert job.has_resumed() >= safe
        assert [said["crc"] for said in job.resumed.values()] == [1, 1]
        # What was brought for the restore went again: a shard of each rank and its copy are left.
        job.until(lambda: job.on_peers >= safe + 2, 60, "steps on peers")


@pytest.mark.parametrize("has_disk", [True, False])
def test_a_cluster_that_is_lost_whole_goes_on_from_the_bucket_on_fewer_nodes(
    tmp_path: Path, has_disk: bool
) -> None:
    world, truth = 6, Truth(6, 400, SMALL)
    with Lab(4) as made:
        within = ["ip", "netns", "exec", made.hub]
        with (
            servers.s3(tmp_path / "s3", ip=HUB, within=within) as options,
            BucketJob(made, world, options, has_disk, numbers=SMALL, disk_every=1) as job,
        ):
            made.start_agents()
            job.start(made.nodes, 400)
            assert job.has_resumed() == 0
            for nodes in (made.nodes[:3], made.nodes[1:3]):
                before = job.in_bucket
                job.until(lambda b=before + 2: job.in_bucket > b, 60, "in the bucket")  # type: ignore[misc]
                for node in made.nodes:
                    node.lose()
                job.kill()
                safe = job.in_bucket
                for node in made.nodes:
                    node.replace()
                    node.log.unlink(missing_ok=True)
                for node in nodes:
                    node.start_agent()
                made.gathered(nodes)
                job.start(nodes, 400)
                assert job.has_resumed() >= safe
                truth.holds(job.resumed)
                came = [node.log.read_text().count("came from the bucket") for node in nodes]
                assert sum(came) == world, "each shard comes from there once"
            job.kill()
            # By the command alone, on a machine that has nothing.
            flags = [w for name, value in options.items() for w in ("--option", f"{name}={value}")]
            to = tmp_path / "laptop" / "run"
            run(*within, COMMAND, "restore", job.url, "--to", str(to), *flags)
            said = run(*within, COMMAND, "verify", str(to), "--json")
            assert json.loads(said)["good"], said
            found = tierkeep.load(to, rank=3, ram_dir=tmp_path)
            step = json.loads(run(COMMAND, "ls", str(to), "--json"))["steps"][-1]["step"]
            crc = zlib.crc32(found["momentum"].numpy(), zlib.crc32(found["weights"].numpy()))
            truth.holds({3: {"rank": 3, "step": step, "crc": crc}})


@pytest.mark.parametrize("nodes", [2, 3, 5, 7])
def test_other_numbers_of_nodes_work_as_well(nodes: int) -> None:
    with lab(nodes) as made:
        kill_and_resume(made, world=nodes, replicas=1, victims=1, trials=max(1, KILLS // 4))
