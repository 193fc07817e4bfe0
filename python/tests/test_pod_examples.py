"""The trainers of examples/kubernetes in the pods of their manifests, beside the chart's agents:
they are killed, and go on from RAM.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import servers
from chart import EXAMPLES, Object, objects
from lab import HUB, LabUnavailableError, check
from pod_cluster import Installed, cluster
from pod_run import Pod


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    try:
        check()
    except LabUnavailableError as e:
        if os.environ.get("TIERKEEP_LAB") == "require":
            raise
        pytest.skip(f"NOT TESTED: the examples for Kubernetes: {e}")
    place = tmp_path_factory.mktemp("cluster")
    with cluster(2, place) as made:
        within = ["ip", "netns", "exec", made.lab.hub]
        with servers.s3(place / "s3", ip=HUB, within=within, bucket="models") as options:
            env = [{"name": name.upper(), "value": value} for name, value in options.items()]
            yield Installed(
                made,
                place,
                {
                    "ram": {"bytes": "256Mi"},
                    # As the manifest says.
                    "agent": {"buckets": ["s3://models/{namespace}/"]},
                    "extraEnv": env,
                },
            )


class JobSet:
    """One, as its controller makes its pods: in turn on these nodes."""

    def __init__(self, chart: Installed, manifest: str) -> None:
        self._chart = chart
        text = (EXAMPLES / manifest).read_text()
        [found] = [o for o in objects(text) if o["kind"] == "JobSet"]
        self.name, namespace = found["metadata"]["name"], found["metadata"]["namespace"]
        [group] = found["spec"]["replicatedJobs"]
        job = group["template"]["spec"]
        assert (job["completionMode"], group["replicas"]) == ("Indexed", 1)
        self.pods = [
            self._pod(group["name"], index, job["template"]["spec"], namespace)
            for index in range(job["completions"])
        ]

    def _pod(self, group: str, index: int, spec: Object, namespace: str) -> Pod:
        name = f"{self.name}-{group}-0-{index}"
        named = spec | {"hostname": name, "subdomain": self.name}
        env = {"JOB_COMPLETION_INDEX": str(index)}
        nodes = self._chart.cluster.nodes
        node = nodes[index % len(nodes)]
        return Pod(self._chart.cluster, node, name, named, namespace=namespace, extra_env=env)

    def text(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.containers['trainer'].text()}" for p in self.pods)

    def until_saved(self, step: int, world: int) -> None:
        """Until every rank has this step, or a newer one, in RAM."""

        def there() -> list[int]:
            ranks = self._chart.ranks(self.name)
            return [rank["ram_step"] or 0 for rank in ranks if rank["gone_s"] is None]

        end = time.monotonic() + 150
        while len(steps := there()) < world or min(steps) < step:
            for pod in self.pods:
                assert pod.containers["trainer"].running(), self.text()
            assert time.monotonic() < end, (steps, self.text())
            time.sleep(0.2)

    def kill(self) -> None:
        for pod in self.pods:
            pod.send(signal.SIGKILL)
        for pod in self.pods:
            pod.containers["trainer"].wait(20)
        self._chart.knows_of_the_end(self.name)


@pytest.mark.parametrize(("manifest", "world"), [("jobset-torch.yaml", 2), ("jobset-jax.yaml", 4)])
def test_an_examples_trainers_are_killed_and_go_on_from_ram(
    chart: Installed, manifest: str, world: int
) -> None:
    job = JobSet(chart, manifest)
    for pod in job.pods:
        pod.start()
    job.until_saved(50, world)
    job.kill()
    saved: list[dict[str, Any]] = chart.ranks(job.name)
    for pod in job.pods:
        pod.restart()
    newest = max(rank["ram_step"] for rank in saved)
    job.until_saved(newest + 50, world)
    for pod in job.pods:
        text = pod.containers["trainer"].text()
        starts = re.findall(r"^starts after step (\d+) (.*)$", text, re.M)
        assert starts[0] == ("0", "None"), text
        step, tier = starts[1]
        assert int(step) in {newest, newest - 50} and int(step) > 0 and tier == "from ram", text
        assert "with the agent at /run/tierkeep/agent.sock" in text
    if manifest == "jobset-torch.yaml":
        end = time.monotonic() + 60
        while any(rank["object_step"] is None for rank in chart.ranks(job.name)):
            assert time.monotonic() < end, chart.ranks(job.name)
            time.sleep(0.2)
    for pod in job.pods:
        pod.end(signal.SIGKILL)
