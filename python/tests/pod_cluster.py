"""A cluster of such pods (`pod_run`): nodes, services, a DaemonSet, and the chart in it."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chart import NAMESPACE, Object, Values, the
from lab import HUB, Lab, Node
from pod_run import KubeNode, Pod
from pod_services import DOMAIN, Api, serve_names
from test_chart_upgrade import installed, secrets_of, serving


class Cluster:
    """Nodes, their pods, and what pods ask for by name."""

    def __init__(self, lab: Lab, place: Path) -> None:
        self.lab = lab
        self.pods: list[Pod] = []
        #: By kind, namespace and name.
        self.data: dict[tuple[str, str, str], dict[str, bytes]] = {}
        self.services: dict[str, Object] = {}
        self.nodes = [KubeNode(f"gpu-{i}", plugged) for i, plugged in enumerate(lab.nodes)]
        self.api = Api(place / "api", lab.hub)
        self._names = serve_names(lab.hub, self.find)

    def end(self) -> None:
        for pod in list(self.pods):
            with contextlib.suppress(Exception):
                pod.end(signal.SIGKILL)
        self._names.end()
        self.api.end()

    def plug(self) -> Node:
        """A network namespace with an address, for a pod."""
        [plugged] = self.lab.add()
        return plugged

    def apply(self, found: list[Object], namespace: str) -> None:
        """Objects are there, or are changed."""
        authority = {"ca.crt": self.api.authority}
        self.data[("configmap", namespace, "kube-root-ca.crt")] = authority
        for one in found:
            name = one["metadata"]["name"]
            match one["kind"]:
                case "ConfigMap":
                    data = {key: text.encode() for key, text in one["data"].items()}
                    self.data[("configmap", namespace, name)] = data
                case "Secret":
                    data = {key: base64.b64decode(text) for key, text in one["data"].items()}
                    self.data[("secret", namespace, name)] = data
                case "Service":
                    self.services[f"{name}.{namespace}"] = one

    def find(self, asked: str) -> list[str] | None:
        """The addresses that a name has."""
        name = asked.removesuffix(f".svc.{DOMAIN}")
        if name == asked:
            return None
        if name == "kubernetes.default":
            return [HUB]
        pods = list(self.pods)
        if service := self.services.get(name):
            _, _, namespace = name.partition(".")
            wanted = service["spec"]["selector"].items()
            early = service["spec"].get("publishNotReadyAddresses")
            there = [p for p in pods if p.namespace == namespace and wanted <= p.labels.items()]
            return [p.address for p in there if p.ready or early]
        for pod in pods:
            if pod.subdomain and name == f"{pod.hostname}.{pod.subdomain}.{pod.namespace}":
                return [pod.address]
        return None


class DaemonSet:
    """The controller of one: a pod on each node, replaced one node after the other."""

    def __init__(self, cluster: Cluster, found: Object, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.manifest = found
        self.pods: dict[str, Pod] = {}
        self._count = 0

    def on(self, node: KubeNode) -> Pod:
        return self.pods[node.name]

    def make(self, node: KubeNode) -> Pod:
        """A pod of the newest template, on a node; it is not started yet."""
        template = self.manifest["spec"]["template"]
        self._count += 1
        name = f"{self.manifest['metadata']['name']}-{self._count:05}"
        labels = template["metadata"]["labels"]
        spec = template["spec"]
        pod = Pod(self.cluster, node, name, spec, namespace=self.namespace, labels=labels)
        self.pods[node.name] = pod
        return pod

    def start(self) -> None:
        """On all nodes."""
        for node in self.cluster.nodes:
            self.make(node).start()
        for pod in self.pods.values():
            pod.until_ready()

    def roll(self, found: Object, how: Callable[[int], signal.Signals]) -> Iterator[KubeNode]:
        """Replaces every pod by one of a new template, with maxUnavailable 1: gives each node
        whose new pod is ready. `how` the old one of the n-th node is told to end."""
        self.manifest = found
        for index, node in enumerate(self.cluster.nodes):
            self.pods[node.name].end(how(index))
            self.make(node).start()
            self.pods[node.name].until_ready()
            yield node


@contextlib.contextmanager
def cluster(nodes: int, place: Path) -> Iterator[Cluster]:
    with Lab(nodes) as lab:
        made = Cluster(lab, place)
        try:
            yield made
        finally:
            made.end()


class Installed:
    """The chart on a cluster."""

    def __init__(self, made: Cluster, place: Path, values: Values) -> None:
        self.cluster, self._place = made, place
        self.found = self._render(values, [])
        self.agents = DaemonSet(made, the(self.found, "DaemonSet"), NAMESPACE)
        self.agents.start()

    def _render(self, values: Values, secrets: list[Object]) -> list[Object]:
        with serving(secrets) as server:
            found = installed(server, self._place, values)
        self.cluster.apply(found, NAMESPACE)
        return found

    def upgrade(self, values: Values) -> list[Object]:
        """`helm upgrade`: the objects are the new ones, the pods are not yet."""
        before, self.found = self.found, self._render(values, secrets_of(self.found))
        return before

    def status(self, pod: Pod) -> dict[str, Any]:
        said = pod.get("/status.json", 9177)
        assert said is not None
        return dict(json.loads(said))

    def ranks(self, run: str) -> list[dict[str, Any]]:
        """A run's ranks, as their agents see them."""
        statuses = [self.status(pod)["status"] for pod in self.agents.pods.values()]
        ranks = [rank for status in statuses for rank in status["ranks"]]
        return [rank for rank in ranks if rank["destination"].endswith(f"/runs/{run}")]

    def knows_of_the_end(self, run: str) -> None:
        """Waits until the agents have seen that nobody trains any more: sooner than pods that have
        failed are started again.
        """
        end = time.monotonic() + 30
        while any(rank["gone_s"] is None for rank in self.ranks(run)):
            assert time.monotonic() < end, self.ranks(run)
            time.sleep(0.05)
