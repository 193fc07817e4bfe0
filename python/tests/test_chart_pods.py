"""The chart's pods and the examples': what they may do, and what their root container does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pod_security
import pytest
from chart import (
    CHART,
    EXAMPLES,
    MATRIX,
    NAMESPACE,
    NOT_COVERED,
    ROOT,
    Object,
    faults,
    missing,
    objects,
    pod_of,
    render,
    rendered,
    the,
)

EACH = pytest.mark.parametrize("name", MATRIX)
ON_THE_HOST = {"ram", "disk", "socket"}

# -- the agent's pod ----------------------------------------------------------------------------


@EACH
def test_the_agent_is_restricted_but_for_directories_of_the_host(name: str) -> None:
    pod = pod_of(rendered(name))
    broken = pod_security.broken(pod)
    has_plugin = name == "device-plugin"
    on_the_host = ON_THE_HOST | ({"kubelet"} if has_plugin else set())
    assert broken.pop("host_path") == on_the_host
    assert broken.pop("volume_types") == on_the_host
    # The container that gives the directories to the agent's user, and who has to be the kubelet's.
    root = {"prepare"} | ({"device-plugin"} if has_plugin else set())
    for control in ("run_as_non_root", "run_as_user"):
        assert broken.pop(control) == root
    assert broken.pop("capabilities_added") == {"prepare"}
    if name in ("everything", "openshift"):
        assert broken.pop("selinux") == {"the pod"}
    assert broken == {}
    containers = {c["name"]: c for c in pod_security.containers(pod)}
    capabilities = containers["prepare"]["securityContext"]["capabilities"]
    assert capabilities == {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]}
    for container in containers.values():
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsUser"] > 0


def test_the_control_socket_is_not_where_trainers_look() -> None:
    pod = pod_of(rendered("defaults"))
    volumes = {v["name"]: v for v in pod["volumes"]}
    [agent] = pod["containers"]
    mounts = {m["name"]: m["mountPath"] for m in agent["volumeMounts"]}
    assert "emptyDir" in volumes["control"]
    assert mounts["control"] == "/run/tierkeep-control"
    assert not mounts["control"].startswith(f"{mounts['socket']}/")
    variables = {e["name"]: e for e in agent["env"]}
    assert variables["TIERKEEP_CONTROL"]["value"].startswith(f"{mounts['control']}/")


def test_the_service_has_the_addresses_of_agents_that_are_not_ready() -> None:
    spec = the(rendered("defaults"), "Service")["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    ports = {(port["port"], port["protocol"]) for port in spec["ports"]}
    assert ports == {(9177, "TCP"), (9178, "TCP"), (9178, "UDP")}
    labels = the(rendered("defaults"), "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"].items() <= labels.items()


def test_only_agents_reach_the_port_between_agents() -> None:
    spec = the(rendered("everything"), "NetworkPolicy")["spec"]
    both = [{"protocol": "TCP", "port": 9178}, {"protocol": "UDP", "port": 9178}]
    [inward] = [rule for rule in spec["ingress"] if rule["ports"] == both]
    [outward] = [rule for rule in spec["egress"] if rule["ports"] == both]
    assert inward["from"] == outward["to"] == [{"podSelector": spec["podSelector"]}]
    [http] = [rule for rule in spec["ingress"] if rule["ports"][0]["port"] == 9177]
    assert http["from"] == MATRIX["everything"]["networkPolicy"]["httpFrom"]
    out = {(p["protocol"], p["port"]) for rule in spec["egress"] for p in rule["ports"]}
    names = {("UDP", 53), ("TCP", 53)}
    assert out == names | {("TCP", n) for n in (443, 6443, 9000, 9178)} | {("UDP", 9178)}


def test_nothing_on_a_node_follows_from_the_releases_name() -> None:
    """Two releases meet on a node's directories, and `prepare` tells them apart; they do not meet
    elsewhere in the cluster."""
    first = render(MATRIX["everything"] | {"fullnameOverride": ""})
    second = render(MATRIX["everything"] | {"fullnameOverride": ""}, "--namespace", "other")
    paths = [[v["hostPath"]["path"] for v in pod_of(f)["volumes"] if "hostPath" in v]
             for f in (first, second)]  # fmt: skip
    assert paths[0] == paths[1]
    wide = ("PriorityClass", "SecurityContextConstraints", "ClusterRole")
    names = [{o["metadata"]["name"] for o in f if o["kind"] in wide} for f in (first, second)]
    assert not names[0] & names[1]
    marks = [{e["name"]: e["value"] for e in pod_of(f)["initContainers"][0]["env"]}["RELEASE"]
             for f in (first, second)]  # fmt: skip
    assert marks == [f"{NAMESPACE}/tierkeep", "other/tierkeep"]


def test_words_that_the_containers_run_are_the_commands(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tierkeep-test-", dir="/dev/shm") as ram:
        inits = {c["name"]: c for c in pod_of(rendered("everything"))["initContainers"]}
        assert inits["doctor-bucket"]["command"][-1] == "s3://models/preflight"
        places = {"/dev/shm/tierkeep": ram, "/mnt/nvme0/tierkeep": str(tmp_path)}
        words = inits["doctor"]["command"]
        for there, here in places.items():
            words = [word.replace(there, here) for word in words]
        done = tierkeep(*words[1:], TIERKEEP_RAM_BYTES_MAX="1073741824")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{tmp_path}: " in done.stdout and f"{ram}: tmpfs" in done.stdout
        assert list(tmp_path.iterdir()) == []
    [agent] = pod_of(rendered("everything"))["containers"]
    assert agent["command"] == ["tierkeep", "agent"]
    _, plugin = pod_of(rendered("device-plugin"))["containers"]
    # What is before --help is read first.
    done = tierkeep(*plugin["command"][1:], "--help")
    assert done.returncode == 0, done.stderr
    assert {m["name"] for m in plugin["volumeMounts"]} == {"socket", "kubelet"}


def tierkeep(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("tierkeep")
    return subprocess.run(
        [str(command), *words], env=os.environ | env, capture_output=True, text=True, timeout=120
    )


# -- the container that is root -----------------------------------------------------------------


class Node:
    """Directories as a node has them, and `prepare` as the chart runs it."""

    def __init__(self, ram: Path, disk: Path, socket: Path) -> None:
        self.dirs = {"RAM_DIR": ram, "DISK_DIR": disk, "SOCKET_DIR": socket}
        # Only root gives directories away.
        self.uid = 9177 if os.geteuid() == 0 else os.geteuid()

    def prepare(self, **env: str) -> subprocess.CompletedProcess[str]:
        container = pod_of(rendered("defaults"))["initContainers"][0]
        values = {e["name"]: e["value"] for e in container["env"]}
        values |= {"AGENT_UID": str(self.uid), "RAM_BYTES": "1048576"}
        values |= {key: str(path) for key, path in self.dirs.items()} | env
        words = [*container["command"], *container["args"]]
        if os.geteuid() == 0:
            rights = container["securityContext"]["capabilities"]["add"]
            kept = ",".join(f"+{right.lower()}" for right in rights)
            words = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{kept}", *words]
        path = {"PATH": os.environ["PATH"]}
        return subprocess.run(words, env=values | path, capture_output=True, text=True, timeout=60)

    def state(self) -> dict[str, tuple[int, int]]:
        found = {key: path.stat() for key, path in self.dirs.items()}
        return {key: (stat.st_uid, stat.st_mode & 0o777) for key, stat in found.items()}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="tierkeep-test-", dir="/dev/shm") as ram:
        (tmp_path / "disk").mkdir()
        (tmp_path / "socket").mkdir()
        yield Node(Path(ram), tmp_path / "disk", tmp_path / "socket")


def test_prepare_gives_the_directories_to_the_agents_user(node: Node) -> None:
    done = node.prepare()
    assert done.returncode == 0, done.stderr
    modes = {"RAM_DIR": 0o700, "DISK_DIR": 0o700, "SOCKET_DIR": 0o755}
    assert node.state() == {key: (node.uid, mode) for key, mode in modes.items()}


def test_prepare_leaves_the_state_of_the_release_before(node: Node) -> None:
    assert node.prepare().returncode == 0
    shard = node.dirs["DISK_DIR"] / "team-a" / "shard"
    shard.parent.mkdir()
    shard.write_bytes(b"state")
    before = shard.stat()
    done = node.prepare()
    assert done.returncode == 0, done.stderr
    assert shard.read_bytes() == b"state"
    assert shard.stat() == before


def test_prepare_refuses_a_second_release_by_name_and_takes_over_when_told(node: Node) -> None:
    assert node.prepare(RELEASE="a/first").returncode == 0
    done = node.prepare(RELEASE="b/second")
    assert done.returncode == 1
    assert f"{node.dirs['RAM_DIR']} is in use by the release a/first" in done.stderr
    assert "prepare.takeOver" in done.stderr
    assert node.prepare(RELEASE="a/first").returncode == 0
    assert node.prepare(RELEASE="b/second", TAKE_OVER="true").returncode == 0
    assert node.prepare(RELEASE="b/second").returncode == 0
    assert node.prepare(RELEASE="a/first").returncode == 1


def test_prepare_takes_nothing_that_is_somebody_elses(node: Node) -> None:
    for key in ("DISK_DIR", "SOCKET_DIR"):
        (node.dirs[key] / "somebody").write_text("else's")
    before = node.state()["DISK_DIR"]
    done = node.prepare(AGENT_UID=str(os.geteuid() + 1), TAKE_OVER="true")
    assert done.returncode == 1
    assert f"{node.dirs['DISK_DIR']} belongs to user {os.geteuid()}" in done.stderr
    assert node.state()["DISK_DIR"] == before
    assert not (node.dirs["DISK_DIR"] / ".release").exists()


def test_prepare_refuses_a_ram_tier_that_is_no_memory_or_too_small(node: Node) -> None:
    done = node.prepare(RAM_DIR="/proc")
    assert done.returncode == 1
    assert "ram.hostPath: /proc is proc on this node" in done.stderr
    done = node.prepare(RAM_BYTES=str(1 << 60))
    assert done.returncode == 1
    assert "ram.bytes: the tmpfs at" in done.stderr and str(1 << 60) in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
def test_prepare_brings_files_along_where_the_agents_user_has_changed(node: Node) -> None:
    assert node.prepare().returncode == 0
    kept = node.dirs["DISK_DIR"] / "kept"
    kept.write_text("x")
    outside = node.dirs["DISK_DIR"].parent / "outside"
    outside.write_text("x")
    (node.dirs["DISK_DIR"] / "link").symlink_to(outside)
    done = node.prepare(AGENT_UID="9200")
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_uid == 9200
    assert outside.stat().st_uid == 0


# -- the examples -------------------------------------------------------------------------------

MANIFESTS = sorted(p for p in EXAMPLES.glob("*.yaml") if not p.name.startswith("values-"))


#: What has Jobs in its `replicatedJobs`, and where those are.
OF_JOBS = {"JobSet": ("spec",), "TrainingRuntime": ("spec", "template", "spec")}


def pods_of(found: Object) -> Iterator[tuple[Object, dict[str, Any]]]:
    """Jobs, as objects of their own, and their pods."""
    if found["kind"] == "Job":
        yield found, found["spec"]["template"]["spec"]
    if found["kind"] in OF_JOBS:
        for part in OF_JOBS[found["kind"]]:
            found = found[part]
        for group in found["replicatedJobs"]:
            head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": group["name"]}}
            yield head | group["template"], group["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_an_example_is_what_clusters_take_and_is_explained(path: Path) -> None:
    wrong: list[str] = []
    for found in objects(path.read_text()):
        if (found["apiVersion"], found["kind"]) in NOT_COVERED:
            if "spec" in found:
                wrong += missing(found)
        else:
            wrong += faults(found)
        for job, _ in pods_of(found):
            wrong += faults(job)
    assert wrong == []
    head = path.read_text().split("apiVersion:")[0].splitlines()
    assert 5 <= len(head) <= 20
    assert all(line.startswith("#") for line in head)


def test_trainers_are_restricted_but_for_the_agents_socket() -> None:
    trainers = 0
    for path in MANIFESTS:
        for found in objects(path.read_text()):
            for _, pod in pods_of(found):
                broken = pod_security.broken(pod)
                if found["kind"] in OF_JOBS:
                    assert broken.pop("host_path") == broken.pop("volume_types") == {"tierkeep"}
                    assert_has_what_a_trainer_needs(pod)
                    trainers += 1
                    scripts = re.findall(r"[\[ ](\w+\.py)\b", path.read_text())
                    assert scripts and all((EXAMPLES / script).exists() for script in scripts)
                assert broken == {}, path.name
    assert trainers == 3


def assert_has_what_a_trainer_needs(pod: dict[str, Any]) -> None:
    agents = pod_of(rendered("defaults"))
    socket = next(v for v in agents["volumes"] if v["name"] == "socket")
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["tierkeep"]["hostPath"]["path"] == socket["hostPath"]["path"]
    [source] = volumes["identity"]["projected"]["sources"]
    assert (
        source["serviceAccountToken"].items() >= {"audience": "tierkeep", "path": "token"}.items()
    )
    [trainer] = pod["containers"]
    mounts = {m["name"]: m["mountPath"] for m in trainer["volumeMounts"]}
    assert mounts["tierkeep"] == "/run/tierkeep"
    assert mounts["identity"] == "/var/run/secrets/tierkeep"


def test_the_restore_after_a_disaster_is_what_the_command_takes(tmp_path: Path) -> None:
    job = next(
        o for o in objects((EXAMPLES / "restore-job.yaml").read_text()) if o["kind"] == "Job"
    )
    [container] = job["spec"]["template"]["spec"]["containers"]
    _, *words = container["command"]
    words = [
        w.replace("s3:/", f"file://{tmp_path}").replace("/out/", f"{tmp_path}/") for w in words
    ]
    done = tierkeep(*words, TIERKEEP_RAM_DIR=str(tmp_path / "ram"))
    # Taken, and nothing found: no mistake in the words, which would be 2.
    assert done.returncode == 3, done.stderr
    assert 3 in job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]


def test_images_run_as_users_that_the_pods_have() -> None:
    agent = (ROOT / "node-agent" / "Containerfile").read_text()
    assert f"USER {pod_of(rendered('defaults'))['securityContext']['runAsUser']}:" in agent
    trainer = (EXAMPLES / "Containerfile").read_text()
    for script in re.findall(r"examples/kubernetes/\w+\.py", trainer):
        assert (ROOT / script).exists()
    [chart] = re.findall(r'appVersion: "(.*)"', (CHART / "Chart.yaml").read_text())
    assert f"tierkeep-agent:{chart}\n" in (EXAMPLES / "restore-job.yaml").read_text()
    toolchain = (ROOT / "rust-toolchain.toml").read_text()
    [channel] = re.findall(r'channel = "([\d.]+)"', toolchain)
    assert f"rust:{channel}-" in agent and f"rust:{channel}-" in trainer


# -- the controls themselves --------------------------------------------------------------------


def test_each_control_finds_a_pod_that_breaks_it() -> None:
    bad = {
        "hostPID": True,
        "securityContext": {
            "seLinuxOptions": {"type": "spc_t"},
            "seccompProfile": {"type": "Unconfined"},
            "appArmorProfile": {"type": "Unconfined"},
            "sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}],
        },
        "volumes": [{"name": "v", "hostPath": {"path": "/x"}}],
        "containers": [
            {
                "name": "c",
                "ports": [{"containerPort": 1, "hostPort": 1}],
                "livenessProbe": {"httpGet": {"host": "10.0.0.1", "port": 1}},
                "securityContext": {
                    "privileged": True,
                    "procMount": "Unmasked",
                    "runAsUser": 0,
                    "capabilities": {"add": ["SYS_ADMIN"]},
                },
            }
        ],
    }
    assert set(pod_security.broken(bad)) == {c.__name__ for c in pod_security.RESTRICTED}
    good = {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "c",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
    }
    assert pod_security.broken(json.loads(json.dumps(good))) == {}
