"""A small kubelet for tests: runs pods as their manifests say, on nodes that are namespaces of one
machine (`lab`). No Kubernetes and no container runtime is needed, root is.

As in a cluster: each pod has an address of its own, a network namespace, a name and a name server;
each container its own root file system, mounts, processes, user, groups, capabilities and seccomp
filter; init containers come first, one after the other; a pod that is told to end gets SIGTERM, and
SIGKILL when its grace is over; hostPath is the node's, and outlives the pod; files of ConfigMaps,
Secrets and tokens are laid out, owned and changed as the kubelet does it; services have the
addresses of their pods. What is rendered is read as it is, so a pod that could not work would not.

Not as in a cluster:

- Every image is this machine's /usr, this interpreter with what is installed there (so `tierkeep`
  is the command of the wheel, not the binary of node-agent/Containerfile), and `/train` and
  `/tests` for trainers. Nothing is pulled. /etc has no users but root.
- An image is read-only in any case: where a manifest does not ask for that, only the directories
  around it can be written to.
- No limit of memory or CPU, no AppArmor or SELinux; of seccomp what `pod_seccomp` says.
- Names of users that a container runs as are not looked up, and devices are not offered.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chart import EXAMPLES, Object
from lab import HUB, Node
from pod_services import DOMAIN, Projection, inside

if TYPE_CHECKING:
    from pod_cluster import Cluster

#: Where pods have the API server's certificate, and their token for it.
API_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Linux's numbers of those that manifests name.
CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3}
_RUNTIME = Path(__file__).with_name("pod_container.py")

Words = Mapping[str, str]


def image() -> dict[str, str]:
    """What every container has of this machine, by the path in it."""
    here = {path: path for path in ("/bin", "/lib", "/lib64", "/sbin", "/usr")}
    here |= {path: path for path in ("/etc/ld.so.cache", "/etc/ssl", "/etc/nsswitch.conf")}
    prefixes = [str(Path(prefix).resolve()) for prefix in (sys.base_prefix, sys.prefix)]
    here |= {prefix: prefix for prefix in prefixes}
    here |= {"/train": str(EXAMPLES), "/tests": str(Path(__file__).parent)}
    # Outer ones first; what lies inside of another one is there with it.
    paths = sorted(path for path in here if os.path.exists(here[path]))
    outer = [p for p in paths if not any(p.startswith(f"{other}/") for other in paths)]
    return {path: here[path] for path in outer}


class PodError(Exception):
    """A pod does not run."""


class Container:
    """One container of a pod: its process, as often as it is started."""

    def __init__(self, pod: Pod, manifest: Object) -> None:
        self.pod, self.manifest, self.name = pod, manifest, manifest["name"]
        self.log = pod.place / f"{self.name}.log"
        self.pid = 0
        self._parent: subprocess.Popen[bytes] | None = None

    def _in_force(self, key: str, default: Any = None) -> Any:
        outer = self.pod.spec.get("securityContext") or {}
        return (self.manifest.get("securityContext") or {}).get(key, outer.get(key, default))

    @property
    def uid(self) -> int:
        uid = int(self._in_force("runAsUser"))
        assert uid != 0 or self._in_force("runAsNonRoot") is not True, "the kubelet refuses it"
        return uid

    def _env(self) -> dict[str, str]:
        """Later ones may name earlier ones: $(NAME)."""
        env = {"PATH": f"{Path(sys.prefix).resolve()}/bin:/usr/bin:/bin", "HOME": "/"}
        env |= {"HOSTNAME": self.pod.hostname, "KUBERNETES_SERVICE_HOST": HUB}
        env |= {"KUBERNETES_SERVICE_PORT": "443"}
        for entry in self.manifest.get("env", []):
            if "value" in entry:
                env[entry["name"]] = expanded(str(entry["value"]), env)
            else:
                path = entry["valueFrom"]["fieldRef"]["fieldPath"]
                env[entry["name"]] = self.pod.fields()[path]
        return env

    def _spec(self) -> dict[str, Any]:
        context = self.manifest.get("securityContext") or {}
        capabilities = context.get("capabilities") or {}
        assert "ALL" in capabilities.get("drop", []), "the runtime's defaults are not known here"
        env = self._env()
        words = [*self.manifest["command"], *self.manifest.get("args", [])]
        gid = int(self._in_force("runAsGroup", 0))
        group = self.pod.group
        seccomp = self._in_force("seccompProfile") or {}
        return {
            "root": str(self.pod.place / "root"),
            "image": image(),
            "files": self.pod.files(),
            "mounts": self._mounts(),
            "read_only": bool(context.get("readOnlyRootFilesystem")),
            "hostname": self.pod.hostname,
            "uid": self.uid,
            "gid": gid,
            "groups": sorted({gid} | ({group} if group is not None else set())),
            "capabilities": [CAPABILITIES[name] for name in capabilities.get("add", [])],
            "no_new_privs": context.get("allowPrivilegeEscalation") is False,
            "seccomp": seccomp.get("type") == "RuntimeDefault",
            "cwd": "/train" if self.manifest["image"].startswith("trainer:") else "/",
            "argv": [expanded(word, env) for word in words],
            "env": env,
        }

    def _mounts(self) -> list[tuple[str, str, bool]]:
        mounts = {"/dev/shm": (self.pod.shm, False)}
        for entry in self.manifest.get("volumeMounts", []):
            assert "subPath" not in entry, "subPath is not known here"
            source = self.pod.volumes[entry["name"]]
            mounts[entry["mountPath"]] = (source, bool(entry.get("readOnly")))
        return [(path, source, is_closed) for path, (source, is_closed) in mounts.items()]

    def start(self) -> None:
        spec = self.pod.place / f"{self.name}.json"
        spec.write_text(json.dumps(self._spec()))
        words = ["nsenter", f"--mount=/proc/{self.pod.node.plugged.pid}/ns/mnt"]
        words += [f"--net=/run/netns/{self.pod.sandbox.namespace}", "--"]
        words += [sys.executable, "-E", "-s", "-B", str(_RUNTIME), str(spec)]
        with self.log.open("ab") as log:
            self._parent = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._parent.stdout is not None
        with self._parent.stdout as told:
            self.pid = int(told.read() or 0)  # When it is the command, or will never be it.
        if not self.pid:
            raise PodError(f"{self.pod.name}/{self.name}: {self.text()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        if self.running():
            with contextlib.suppress(ProcessLookupError):  # It has just ended.
                os.kill(self.pid, number)

    def running(self) -> bool:
        return self._parent is not None and self._parent.poll() is None

    def wait(self, within: float) -> int:
        assert self._parent is not None
        return self._parent.wait(within)


def expanded(word: str, env: Words) -> str:
    return re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), word)


class KubeNode:
    """A node: what its pods mount of it outlives them."""

    def __init__(self, name: str, plugged: Node) -> None:
        self.name, self.plugged = name, plugged

    def path(self, path: str) -> str:
        """Where a hostPath lies, to who is in the node's mounts: /dev/shm is memory."""
        here = self.plugged.lab.here
        is_memory = f"{path}/".startswith("/dev/shm/")
        return f"{here}/ram/{path[9:]}" if is_memory else f"{here}/disk{path}"

    def seen(self, path: str) -> Path:
        """The same, from outside."""
        return Path(f"/proc/{self.plugged.pid}/root{self.path(path)}")


class Pod:
    """A pod on a node, from its sandbox to its end."""

    def __init__(
        self,
        cluster: Cluster,
        node: KubeNode,
        name: str,
        spec: Object,
        *,
        namespace: str,
        labels: Words | None = None,
        extra_env: Words | None = None,
    ) -> None:
        self.cluster, self.node, self.name, self.namespace = cluster, node, name, namespace
        self.labels = dict(labels or {})
        self.spec: Object = json.loads(json.dumps(spec))
        for container in self.spec["containers"]:
            added = [{"name": k, "value": v} for k, v in (extra_env or {}).items()]
            container["env"] = [*container.get("env", []), *added]
        self.hostname = self.spec.get("hostname", name)
        self.group = (self.spec.get("securityContext") or {}).get("fsGroup")
        self.ready = False
        #: Whether its grace was enough, once it has ended.
        self.ended_in_time = False
        self._inject_account()
        self.sandbox = cluster.plug()
        self.address = self.sandbox.address
        self.place = self.sandbox.root / "pod"
        (self.place / "root").mkdir(parents=True)
        inits = self.spec.get("initContainers", [])
        self.inits = [Container(self, found) for found in inits]
        self.containers = {c["name"]: Container(self, c) for c in self.spec["containers"]}
        self.volumes: dict[str, str] = {}
        self._memory: list[str] = []
        self.shm = self._in_memory("shm-of-the-pod", "64m")
        for volume in self.spec.get("volumes", []):
            self.volumes[volume["name"]] = self._volume(volume)
        cluster.pods.append(self)

    def _inject_account(self) -> None:
        """What the API server adds to pods: a token for itself, its certificate, the namespace."""
        if self.spec.get("automountServiceAccountToken") is False:
            return
        sources: list[Object] = [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"configMap": {"name": "kube-root-ca.crt"}},
        ]
        volume = {"name": "kube-api-access", "projected": {"sources": sources}}
        self.spec.setdefault("volumes", []).append(volume)
        mount = {"name": volume["name"], "mountPath": API_MOUNT, "readOnly": True}
        for container in [*self.spec.get("initContainers", []), *self.spec["containers"]]:
            container["volumeMounts"] = [*container.get("volumeMounts", []), mount]

    def fields(self) -> dict[str, str]:
        return {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "spec.nodeName": self.node.name,
            "status.podIP": self.address,
        }

    def files(self) -> dict[str, str]:
        """What is in /etc, beside what the image has there."""
        service = f"{self.namespace}.svc.{DOMAIN}"
        full = f"{self.hostname}.{self.spec['subdomain']}.{service}" if self.subdomain else ""
        names = f"{full} {self.hostname}".strip()
        return {
            "/etc/passwd": "root:x:0:0:root:/:/bin/sh\n",
            "/etc/group": "root:x:0:\n",
            "/etc/hostname": f"{self.hostname}\n",
            "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{self.address} {names}\n",
            "/etc/resolv.conf": f"search {service} svc.{DOMAIN} {DOMAIN}\nnameserver {HUB}\n"
            "options ndots:5\n",
        }

    @property
    def subdomain(self) -> str:
        return str(self.spec.get("subdomain", ""))

    # -- volumes ------------------------------------------------------------------------------

    def _volume(self, volume: Object) -> str:
        name = volume["name"]
        place = self.place / "volumes" / name
        match volume:
            case {"hostPath": host}:
                return self._of_the_node(host)
            case {"emptyDir": {"medium": "Memory", **options}}:
                return self._in_memory(name, str(options.get("sizeLimit", "50%")))
            case {"emptyDir": _}:
                place.mkdir(parents=True)
                place.chmod(0o777)
                if self.group is not None:
                    os.chown(place, 0, self.group)
                    place.chmod(0o2777)
                return str(place)
            case {"projected": projected}:
                mode = projected.get("defaultMode", 0o644)
                found = [self._files(source, mode) for source in projected["sources"]]
                files = {path: file for part in found for path, file in part.items()}
                owner = self._one_user() if self._has_token(projected) else 0
                Projection(place).write(files, owner or 0, self.group)
                return str(place)
        raise PodError(f"{self.name}: volume {volume} is of a kind that is not known here")

    def _of_the_node(self, host: Object) -> str:
        seen = self.node.seen(host["path"])
        if host.get("type") == "DirectoryOrCreate":
            seen.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not seen.is_dir():
            raise PodError(f"{self.name}: {host['path']} is not there on {self.node.name}")
        return self.node.path(host["path"])

    def _in_memory(self, name: str, size: str) -> str:
        place = self.place / "volumes" / name
        place.mkdir(parents=True)
        size = size.replace("Gi", "g").replace("Mi", "m")
        options = f"size={size},mode=1777"
        self.node.plugged.run("mount", "-t", "tmpfs", "-o", options, name, str(place))
        self._memory.append(str(place))
        return str(place)

    @staticmethod
    def _has_token(projected: Object) -> bool:
        return any("serviceAccountToken" in source for source in projected["sources"])

    def _one_user(self) -> int | None:
        """The user that all containers run as, if it is one: a token is its own then."""
        users = {c.uid for c in [*self.inits, *self.containers.values()]}
        return users.pop() if len(users) == 1 else None

    def _files(self, source: Object, mode: int) -> dict[str, tuple[bytes, int]]:
        if token := source.get("serviceAccountToken"):
            account = self.spec.get("serviceAccountName", "default")
            audience = token.get("audience", "")
            api = self.cluster.api
            made = api.token(self.namespace, account, self.name, self.node.name, audience)
            is_closed = self.group is not None or self._one_user() is not None
            return {token["path"]: (made.encode(), 0o600 if is_closed else mode)}
        [(kind, wish)] = source.items()
        data = self.cluster.data[(kind.lower(), self.namespace, wish["name"])]
        items = wish.get("items") or [{"key": key, "path": key} for key in data]
        return {item["path"]: (data[item["key"]], item.get("mode", mode)) for item in items}

    # -- its life -----------------------------------------------------------------------------

    def start(self) -> None:
        """Init containers to their ends, then the containers."""
        for init in self.inits:
            init.start()
            if (code := init.wait(120)) != 0:
                raise PodError(f"{self.name}: init container {init.name} ended with {code}:\n"
                               f"{init.text()}")  # fmt: skip
        for container in self.containers.values():
            container.start()

    def until_ready(self, within: float = 60) -> None:
        end = time.monotonic() + within
        while not self.probe("livenessProbe") or not self.probe("readinessProbe"):
            for container in self.containers.values():
                if not container.running() or time.monotonic() > end:
                    raise PodError(f"{self.name} is not ready: {container.text()}")
            time.sleep(0.05)
        self.ready = True

    def probe(self, kind: str) -> bool:
        """Whether all its probes of a kind say yes, asked as the kubelet asks."""
        for container in self.containers.values():
            wish = container.manifest.get(kind, {}).get("httpGet")
            ports = {p["name"]: p["containerPort"] for p in container.manifest.get("ports", [])}
            if wish and self.get(wish["path"], ports.get(wish["port"], wish["port"])) is None:
                return False
        return True

    def get(self, path: str, port: int) -> bytes | None:
        """What is at a port of the pod's, as seen from its cluster; None where nothing good is."""
        url = f"http://{self.address}:{port}{path}"

        def ask() -> bytes | None:
            try:
                with urllib.request.urlopen(url, timeout=5) as response:
                    return bytes(response.read())
            except OSError:
                return None

        return inside(self.cluster.lab.hub, ask)

    def send(self, number: signal.Signals) -> None:
        for container in self.containers.values():
            container.send(number)

    def restart(self) -> None:
        """Containers that have ended start again in place, as with restartPolicy Always."""
        for container in self.containers.values():
            if not container.running():
                container.start()

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """The pod is deleted: told to end, and killed when its grace is over."""
        self.ready = False
        grace = float(self.spec.get("terminationGracePeriodSeconds", 30))
        end = time.monotonic() + grace
        self.send(how)
        self.ended_in_time = True
        for container in self.containers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                if container.running():
                    container.wait(max(0.0, end - time.monotonic()))
            if container.running():
                self.ended_in_time = False
                container.send(signal.SIGKILL)
                container.wait(20)
        if self in self.cluster.pods:
            self.cluster.pods.remove(self)
            for place in self._memory:
                self.node.plugged.run("umount", place)
            self.sandbox.end()
