"""Kubernetes' pod security standards, a small function a control: which containers or volumes of a
pod break it. They are what the admission plugin of a namespace's label would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Pod = dict[str, Any]
Control = Callable[[Pod], Iterator[str]]

_BASELINE_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
    "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
_SELINUX_TYPES = {
    "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t",
}  # fmt: skip
_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip


def containers(pod: Pod) -> list[dict[str, Any]]:
    return [
        *pod.get("initContainers", []),
        *pod["containers"],
        *pod.get("ephemeralContainers", []),
    ]


def _own(container: dict[str, Any]) -> dict[str, Any]:
    context: dict[str, Any] = container.get("securityContext") or {}
    return context


def _in_force(pod: Pod, container: dict[str, Any], key: str) -> Any:
    """A container's setting counts, then the pod's."""
    outer = pod.get("securityContext") or {}
    return _own(container).get(key, outer.get(key))


# -- baseline -----------------------------------------------------------------------------------


def host_namespaces(pod: Pod) -> Iterator[str]:
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))


def privileged(pod: Pod) -> Iterator[str]:
    yield from (c["name"] for c in containers(pod) if _own(c).get("privileged"))


def baseline_capabilities(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        added = (_own(container).get("capabilities") or {}).get("add") or []
        if set(added) - _BASELINE_CAPABILITIES:
            yield container["name"]


def host_path(pod: Pod) -> Iterator[str]:
    yield from (v["name"] for v in pod.get("volumes", []) if "hostPath" in v)


def host_ports(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield container["name"]


def probe_hosts(pod: Pod) -> Iterator[str]:
    """A probe of another host is a request of the kubelet's in somebody else's name."""
    for container in containers(pod):
        probes = [v for k, v in container.items() if k.endswith("Probe")]
        probes += (container.get("lifecycle") or {}).values()
        if any((p.get(k) or {}).get("host") for p in probes for k in ("httpGet", "tcpSocket")):
            yield container["name"]


def selinux(pod: Pod) -> Iterator[str]:
    for name, context in _contexts(pod):
        options = context.get("seLinuxOptions") or {}
        if options.get("type", "") not in _SELINUX_TYPES or {"user", "role"} & set(options):
            yield name


def apparmor(pod: Pod) -> Iterator[str]:
    for name, context in _contexts(pod):
        if (context.get("appArmorProfile") or {}).get("type") == "Unconfined":
            yield name


def proc_mount(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        if _own(container).get("procMount", "Default") != "Default":
            yield container["name"]


def seccomp_unconfined(pod: Pod) -> Iterator[str]:
    for name, context in _contexts(pod):
        if (context.get("seccompProfile") or {}).get("type") == "Unconfined":
            yield name


def sysctls(pod: Pod) -> Iterator[str]:
    yield from (s["name"] for s in (pod.get("securityContext") or {}).get("sysctls", []))


def _contexts(pod: Pod) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the pod", pod.get("securityContext") or {}
    yield from ((container["name"], _own(container)) for container in containers(pod))


# -- restricted, beside all of baseline ---------------------------------------------------------


def volume_types(pod: Pod) -> Iterator[str]:
    for volume in pod.get("volumes", []):
        if not set(volume) & _VOLUMES:
            yield volume["name"]


def privilege_escalation(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        if _own(container).get("allowPrivilegeEscalation") is not False:
            yield container["name"]


def run_as_non_root(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        if _in_force(pod, container, "runAsNonRoot") is not True:
            yield container["name"]


def run_as_user(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        if _in_force(pod, container, "runAsUser") == 0:
            yield container["name"]


def seccomp_set(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        profile = _in_force(pod, container, "seccompProfile") or {}
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield container["name"]


def capabilities_dropped(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        if "ALL" not in ((_own(container).get("capabilities") or {}).get("drop") or []):
            yield container["name"]


def capabilities_added(pod: Pod) -> Iterator[str]:
    for container in containers(pod):
        added = (_own(container).get("capabilities") or {}).get("add") or []
        if set(added) - {"NET_BIND_SERVICE"}:
            yield container["name"]


BASELINE: tuple[Control, ...] = (
    host_namespaces, privileged, baseline_capabilities, host_path, host_ports, probe_hosts,
    selinux, apparmor, proc_mount, seccomp_unconfined, sysctls,
)  # fmt: skip
RESTRICTED: tuple[Control, ...] = (
    *BASELINE, volume_types, privilege_escalation, run_as_non_root, run_as_user, seccomp_set,
    capabilities_dropped, capabilities_added,
)  # fmt: skip


def broken(pod: Pod, controls: tuple[Control, ...] = RESTRICTED) -> dict[str, set[str]]:
    """Control by control, who breaks it; those that nobody breaks are left out."""
    found = {control.__name__: set(control(pod)) for control in controls}
    return {name: who for name, who in found.items() if who}
