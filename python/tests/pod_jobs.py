"""Training jobs in pods: one pod a rank, restricted but for the directory of the agent's socket."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pod_security
from chart import Object
from pod_cluster import Cluster
from pod_run import KubeNode, Pod

NAMESPACE = "team-a"
Said = dict[str, Any]


def pod(uid: int, **env: str) -> Object:
    """A trainer's, as the examples' are."""
    restricted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    token = {"audience": "tierkeep", "path": "token", "expirationSeconds": 3600}
    identity = "/var/run/secrets/tierkeep"
    made: Object = {
        "serviceAccountName": "trainer",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": uid,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "trainer",
                "image": "trainer:test",
                "command": ["python", "/tests/pod_job.py"],
                "env": [{"name": key, "value": value} for key, value in env.items()],
                "securityContext": restricted,
                "volumeMounts": [
                    {"name": "tierkeep", "mountPath": "/run/tierkeep", "readOnly": True},
                    {"name": "identity", "mountPath": identity, "readOnly": True},
                ],
            }
        ],
        "volumes": [
            {"name": "tierkeep", "hostPath": {"path": "/run/tierkeep", "type": "Directory"}},
            {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}]}},
        ],
    }
    assert pod_security.broken(made) == {"host_path": {"tierkeep"}, "volume_types": {"tierkeep"}}
    return made


class Job:
    """A rank on each of these nodes, in turn."""

    def __init__(
        self, cluster: Cluster, nodes: list[KubeNode], world: int, run: str, numbers: int
    ) -> None:
        self.cluster, self.nodes, self.world, self.run = cluster, nodes, world, run
        self._numbers = numbers
        self.pods: list[Pod] = []

    def start(self, uid: int, **env: str) -> None:
        """In new pods."""
        for rank in range(self.world):
            hostname = f"{self.run}-{rank}"
            spec = pod(
                uid,
                RANK=str(rank),
                WORLD_SIZE=str(self.world),
                MASTER=f"{self.run}-0.{self.run}",
                DEST=f"/runs/{self.run}",
                NUMBERS=str(self._numbers),
                **env,
            )
            spec |= {"hostname": hostname, "subdomain": self.run}
            node = self.nodes[rank % len(self.nodes)]
            self.pods.append(Pod(self.cluster, node, hostname, spec, namespace=NAMESPACE))
        for each in self.pods:
            each.start()

    def kill(self) -> None:
        """Every process of it dies at once; the pods stay."""
        for each in self.pods:
            each.send(signal.SIGKILL)
        for each in self.pods:
            each.containers["trainer"].wait(20)

    def restart(self) -> None:
        """In the pods that there are."""
        for each in self.pods:
            each.restart()

    def end(self) -> None:
        for each in self.pods:
            each.end(signal.SIGKILL)
        self.pods.clear()

    def said(self, event: str) -> list[Said]:
        """What all ranks said of it, in all of their lives in these pods."""
        texts = [each.containers["trainer"].text() for each in self.pods]
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        told = [json.loads(line) for line in lines if line[0] == "{" and line[-1] == "\n"]
        return [words for words in told if words["event"] == event]

    def ended(self, within: float = 120) -> None:
        """Every rank comes to its end, and a good one."""
        for each in self.pods:
            trainer = each.containers["trainer"]
            assert trainer.wait(within) == 0, (each.name, trainer.text()[-4000:])

    def alive(self) -> None:
        """They have not ended, any of them."""
        for each in self.pods:
            trainer = each.containers["trainer"]
            assert trainer.running(), f"{each.name}: {trainer.wait(1)}\n{self.text()}"

    def until(self, there: Callable[[], bool], what: str, within: float = 90) -> None:
        end = time.monotonic() + within
        while not there():
            assert time.monotonic() < end, (what, self.text())
            self.alive()
            time.sleep(0.05)

    def text(self) -> str:
        """The ends of what all containers said that run."""
        containers = [c for pod in self.cluster.pods for c in pod.containers.values()]
        tails = [f"--- {c.pod.name} on {c.pod.node.name}\n{c.text()[-4000:]}" for c in containers]
        return "\n".join(tails)

    def complete(self) -> int:
        """The newest step that every rank was told to be complete, on disk and on other nodes."""
        newest = [
            max((w["step"] for w in self.said("saved") if w["rank"] == rank), default=0)
            for rank in range(self.world)
        ]
        return min(newest)

    def goes_on(self, steps: int = 5) -> None:
        before = self.complete()
        self.until(lambda: self.complete() >= before + steps, f"{steps} more steps")
