"""What the chart keeps from one `helm upgrade` to the next, against a server that answers as
Kubernetes' own does where helm looks something up.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chart import NAMESPACE, RELEASE, Object, Values, objects, template


def resources(group: str, **kinds: str) -> dict[str, Any]:
    """What a group of the API has, as a server tells it."""
    verbs = ["get", "list"]
    told = [{"name": n, "kind": k, "namespaced": True, "verbs": verbs} for n, k in kinds.items()]
    return {"kind": "APIResourceList", "groupVersion": group, "resources": told}


#: Kinds of the groups beside the core's.
GROUPS = {
    "apps": {"daemonsets": "DaemonSet"},
    "rbac.authorization.k8s.io": {
        "clusterroles": "ClusterRole",
        "clusterrolebindings": "ClusterRoleBinding",
    },
    "admissionregistration.k8s.io": {
        "validatingadmissionpolicies": "ValidatingAdmissionPolicy",
        "validatingadmissionpolicybindings": "ValidatingAdmissionPolicyBinding",
    },
}


def group(name: str) -> dict[str, Any]:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


KNOWN: dict[str, Any] = {
    "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [*map(group, GROUPS)]},
    "/api/v1": resources(
        "v1",
        secrets="Secret",
        configmaps="ConfigMap",
        services="Service",
        serviceaccounts="ServiceAccount",
    ),
}
KNOWN |= {f"/apis/{name}/v1": resources(f"{name}/v1", **kinds) for name, kinds in GROUPS.items()}


class Server(ThreadingHTTPServer):
    """Knows Secrets, and nothing else."""

    def __init__(self, secrets: list[Object]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.secrets = {secret["metadata"]["name"]: secret for secret in secrets}
        self.asked: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        place = f"/api/v1/namespaces/{NAMESPACE}/secrets/"
        if path.startswith(place):
            name = path.removeprefix(place)
            self.server.asked.add(name)
            found = self.server.secrets.get(name)
        else:
            found = KNOWN.get(path)
        body = json.dumps(found or {"kind": "Status", "status": "Failure", "reason": "NotFound",
                                    "code": 404, "apiVersion": "v1"}).encode()  # fmt: skip
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(secrets: list[Object]) -> Iterator[Server]:
    server = Server(secrets)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def installed(server: Server, tmp_path: Path, values: Values | None = None) -> list[Object]:
    """What an install or an upgrade with this server would apply."""
    config = tmp_path / "kubeconfig"
    cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
    config.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": cluster}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }))  # fmt: skip
    words = ("--dry-run=server", "--disable-openapi-validation", "--kubeconfig", str(config))
    done = template(values or {}, *words)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def secrets_of(found: list[Object]) -> list[Object]:
    """What a server has of an install, with helm's own mark, by which it knows what is its."""
    secrets = [o for o in found if o["kind"] == "Secret"]
    for secret in secrets:
        mark = {"release-name": RELEASE, "release-namespace": NAMESPACE}
        secret["metadata"]["annotations"] |= {f"meta.helm.sh/{k}": v for k, v in mark.items()}
    return secrets


def test_an_upgrade_keeps_the_key_and_the_certificates_that_the_install_made(
    tmp_path: Path,
) -> None:
    with serving([]) as server:
        first = installed(server, tmp_path)
    secrets = secrets_of(first)
    assert len(secrets) == 2 and {s["metadata"]["name"] for s in secrets} == server.asked
    with serving(secrets) as server:
        second = installed(server, tmp_path)
    assert [o["data"] for o in second if o["kind"] == "Secret"] == [s["data"] for s in secrets]
    with serving([]) as server:
        other = installed(server, tmp_path)
    assert not [o for o in other if o["kind"] == "Secret" and o in secrets]
