"""The chart's pods under training jobs in pods of their own, on nodes that are one machine's
namespaces (`pod_run`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pod_jobs
import pytest
from chart import NAMESPACE, Values, pod_of, render, settings_of, the
from lab import LabUnavailableError, check
from lab_job import expected
from pod_cluster import Cluster, DaemonSet, Installed, cluster
from pod_jobs import Job, Said
from pod_run import Container, Pod, PodError
from test_chart_upgrade import secrets_of

import tierkeep

#: All that is not the default.
VALUES: Values = {"ram": {"bytes": "256Mi"}}
NUMBERS = 20_000  # Of a rank's state: 176 KB.


@pytest.fixture(scope="module")
def here() -> None:
    try:
        check()
    except LabUnavailableError as e:
        if os.environ.get("TIERKEEP_LAB") == "require":
            raise
        pytest.skip(f"NOT TESTED: pods, and agents' upgrades under them: {e}")


@pytest.fixture(scope="module")
def chart(here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    place = tmp_path_factory.mktemp("cluster")
    with cluster(3, place) as made:
        yield Installed(made, place, VALUES)


def longest(said: list[Said], key: str) -> float:
    return max(float(words[key]) for words in said)


def test_a_rolling_upgrade_of_every_agent_under_training_loses_and_stalls_nothing(
    chart: Installed, tmp_path: Path
) -> None:
    world = 4
    job = Job(chart.cluster, chart.cluster.nodes, world, "upgraded", NUMBERS)
    job.start(2001)
    job.until(lambda: job.complete() >= 30, "30 steps")
    before = job.complete()
    old = chart.upgrade(
        VALUES
        | {
            "image": {"tag": "next"},
            "agent": {"log": "tierkeep=info,warn", "trainersMax": 200},
            "podAnnotations": {"a.example/why": "upgrade"},
        }
    )
    assert settings_of(old) != settings_of(chart.found)
    assert secrets_of(old) == secrets_of(chart.found)
    # One of them dies at once, as after the end of its grace, or with its container's runtime.
    how = [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM]
    old_pods = list(chart.agents.pods.values())
    told: list[int] = []
    for _ in chart.agents.roll(the(chart.found, "DaemonSet"), how.__getitem__):
        told.append(job.complete())
        job.goes_on()
    assert all(pod.ended_in_time for pod in old_pods)
    new_pods = chart.agents.pods.values()
    assert all(pod.spec["containers"][0]["image"].endswith(":next") for pod in new_pods)

    def copies() -> list[tuple[int, int]]:
        ranks = chart.ranks("upgraded")
        return [(rank["copies_there"], rank["copies_wanted"]) for rank in ranks]

    job.until(lambda: copies() == [(1, 1)] * world, "all copies are on other nodes again")
    job.goes_on(20)
    saved = job.said("saved")
    through = job.complete()
    during = [words for words in saved if before < words["step"] <= told[-1] + 5]
    quiet = [words for words in saved if not before < words["step"] <= told[-1] + 5]
    for key, what in [("ms", "save() took"), ("whole_ms", "until it was on disk and elsewhere")]:
        print(f"longest, {what}: {longest(quiet, key):.1f} ms without an upgrade, "
              f"{longest(during, key):.1f} ms while {len(old_pods)} agents were replaced "
              f"({len(quiet)} and {len(during)} saves)")  # fmt: skip
    crcs = expected(world, saved[-1]["step"] + 1000, NUMBERS)
    job.kill()
    saved = job.said("saved")
    newest = max(words["step"] for words in saved)
    for rank in range(world):
        # No step was passed over, and none failed: a trainer whose save does ends, and one that
        # has waited for its agent for 30 seconds does.
        steps = [words["step"] for words in saved if words["rank"] == rank]
        assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= through
    chart.knows_of_the_end("upgraded")
    # Every step that a rank was told of can be read, bit for bit.
    whole = together(chart.cluster, f"{pod_jobs.NAMESPACE}/trainer/runs/upgraded", tmp_path)
    for step in range(1, newest + 1):
        for rank in range(world):
            assert crc_of(whole, step, rank) == crcs[step][rank], (step, rank)
    # Started again the job has the newest, and goes on.
    job.restart()
    job.until(lambda: len(job.said("resumed")) == 2 * world, "all ranks are back")
    for words in job.said("resumed"):
        assert words["step"] == 0 or (words["tier"] == "ram" and words["step"] >= newest)
        assert words["crc"] == crcs[words["step"]][words["rank"]], words
    job.goes_on()
    job.end()


def together(made: Cluster, run: str, to: Path) -> Path:
    """A run that lies on the disks of several nodes, in one directory."""
    # What comes and goes meanwhile is left out: it is about who writes, not what is there.
    but = shutil.ignore_patterns("_claims", "_decisions", "_locks", "_staging")
    for node in made.nodes:
        there = node.seen(f"/var/lib/tierkeep/{run}")
        shutil.copytree(there, to / "run", dirs_exist_ok=True, ignore=but)
    return to / "run"


def crc_of(run: Path, step: int, rank: int) -> int:
    """As `lab_job.State` has it."""
    found = tierkeep.load(run, step=step, rank=rank, ram_dir=run.parent)
    momentum, weights = (np.asarray(found[name]) for name in ("momentum", "weights"))
    return zlib.crc32(momentum.tobytes(), zlib.crc32(weights.tobytes()))


def test_a_trainer_goes_on_from_ram_in_its_pod_and_in_a_new_one_of_another_user(
    chart: Installed,
) -> None:
    world = 2
    job = Job(chart.cluster, chart.cluster.nodes[:2], world, "again", NUMBERS)
    crcs = expected(world, 2000, NUMBERS)

    def resumed(told: int) -> None:
        job.until(lambda: len(job.said("resumed")) == world * lives, "all ranks are back")
        newest = {words["rank"]: words for words in job.said("resumed")}
        for words in newest.values() if told else []:
            assert words["tier"] == "ram" and words["step"] >= told, (told, words)
            assert words["crc"] == crcs[words["step"]][words["rank"]], words
        job.goes_on()

    lives = 1
    job.start(2001)
    resumed(0)
    pids = {pod.containers["trainer"].pid for pod in job.pods}
    job.kill()
    told, lives = job.complete(), 2
    chart.knows_of_the_end("again")
    job.restart()
    resumed(told)
    assert not pids & {pod.containers["trainer"].pid for pod in job.pods}
    told, lives = job.complete(), 1
    job.end()
    chart.knows_of_the_end("again")
    job.start(2002)
    resumed(told)
    job.end()


# -- what containers may do ---------------------------------------------------------------------


def rights(text: str) -> dict[str, str]:
    """Lines of /proc/PID/status."""
    wanted = "CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|Uid|Gid|Groups"
    return {k: v.strip() for k, v in re.findall(rf"^({wanted}):\t(.*)$", text, re.M)}


def rights_of(container: Container) -> dict[str, str]:
    return rights(Path(f"/proc/{container.pid}/status").read_text())


def has_none(found: dict[str, str]) -> bool:
    capabilities = {found[key] for key in found if key.startswith("Cap")}
    return capabilities == {"0" * 16} and (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def writable(container: Container) -> set[str]:
    """Where a container's mounts can be written to, but for the kernel's own."""
    lines = Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines()
    found = {line.split()[4] for line in lines if "rw" in line.split()[5].split(",")}
    return {path for path in found if not re.match("/(proc|dev)(/|$)", path)}


def refused(container: Container, path: str) -> bool:
    """Not even root could write there, from inside of the container's mounts."""
    words = ["nsenter", f"--target={container.pid}", "--mount", "touch", path]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode != 0 and "Read-only file system" in done.stderr


def test_the_agents_container_can_do_nothing_but_write_to_its_directories(
    chart: Installed,
) -> None:
    for pod in chart.agents.pods.values():
        agent = pod.containers["agent"]
        found = rights_of(agent)
        assert has_none(found), found
        assert (found["Uid"], found["Gid"]) == ("\t".join(["9177"] * 4),) * 2
        assert found["Groups"] == "9177"
        mine = {"/dev/shm/tierkeep", "/var/lib/tierkeep", "/run/tierkeep", "/run/tierkeep-control"}
        assert writable(agent) == mine - {"/dev/shm/tierkeep"}
        for path in ("/x", "/usr/x", "/etc/x", "/etc/tierkeep/x", "/tmp/x"):
            assert refused(agent, path), path
        # In it are only its own processes.
        names = os.listdir(f"/proc/{agent.pid}/root/proc")
        assert sorted(int(name) for name in names if name.isdigit())[0] == 1


def test_the_container_that_is_root_has_three_capabilities(chart: Installed) -> None:
    spec = json.loads(json.dumps(pod_of(chart.found)))
    spec["initContainers"][0]["args"] = ["cat /proc/self/status"]
    spec["initContainers"] = spec["initContainers"][:1]
    pod = Pod(chart.cluster, chart.cluster.nodes[0], "rights", spec, namespace=NAMESPACE)
    [prepare] = pod.inits
    prepare.start()
    assert prepare.wait(20) == 0, prepare.text()
    found = rights(prepare.text())
    assert found["Uid"] == "\t".join(["0"] * 4)
    # CHOWN, DAC_OVERRIDE, FOWNER.
    assert {found[f"Cap{which}"] for which in ("Prm", "Eff", "Bnd")} == {f"{0b1011:016x}"}
    assert found["NoNewPrivs"] == "1"
    pod.end()


def test_a_trainers_container_can_do_nothing_at_all(chart: Installed) -> None:
    spec = pod_jobs.pod(2003)
    spec["containers"][0]["command"] = ["sleep", "60"]
    pod = Pod(chart.cluster, chart.cluster.nodes[0], "idle", spec, namespace=pod_jobs.NAMESPACE)
    pod.start()
    [trainer] = pod.containers.values()
    found = rights_of(trainer)
    assert has_none(found), found
    assert found["Uid"] == "\t".join(["2003"] * 4)
    assert writable(trainer) == set()
    for path in ("/x", "/run/tierkeep/x", "/var/run/secrets/tierkeep/token"):
        assert refused(trainer, path), path
    pod.end(signal.SIGKILL)


def test_a_second_release_on_a_node_is_refused_in_words_and_harms_nobody(
    chart: Installed,
) -> None:
    other = render(VALUES, "--namespace", "other")
    chart.cluster.apply(other, "other")
    node = chart.cluster.nodes[0]
    second = DaemonSet(chart.cluster, the(other, "DaemonSet"), "other").make(node)
    with pytest.raises(PodError, match=f"in use by the release {NAMESPACE}/tierkeep on this node"):
        second.start()
    assert not second.containers["agent"].running()
    second.end()
    assert chart.agents.on(node).probe("readinessProbe")
