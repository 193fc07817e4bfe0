"""The chart for Kubernetes: what it renders with which values, and what is known of the objects."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubernetes_validate import utils

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "tierkeep"
EXAMPLES = ROOT / "examples" / "kubernetes"
NAMESPACE, RELEASE = "tierkeep-system", "tierkeep"

Values = dict[str, Any]
Object = dict[str, Any]

#: What every feature needs to be on at once.
EVERYTHING: Values = {
    "nameOverride": "keep",
    "fullnameOverride": "training-keep",
    "image": {"repository": "registry.example:5000/a/agent", "digest": f"sha256:{'0a' * 32}"},
    "imagePullSecrets": [{"name": "pull"}],
    "ram": {"bytes": "64Gi"},
    "disk": {"hostPath": "/mnt/nvme0/tierkeep"},
    "agent": {
        "uid": 1234,
        "buckets": ["s3://models/{namespace}/", "gs://other/{namespace}"],
        "runBytesMax": "16Gi",
        "drainOnSigterm": "90s",
        "labels": {"zone": "a", "topology.example/rack": "r7"},
        "listen": "0.0.0.0",
    },
    "terminationGracePeriodSeconds": 120,
    "peers": {"rate": "1GiB", "connections": 8},
    "node": {
        "labels": {"zone": "topology.kubernetes.io/zone", "rack": "example.com/rack"},
        "taints": ["example.com/retire", "example.com/broken"],
        "hold": "1h",
    },
    "doctor": {"bucket": "s3://models/preflight"},
    "cpu": {"request": "1.5", "limit": "4"},
    "accelerators": {"only": True},
    "nodeSelector": {"pool": "training"},
    "updateStrategy": {"maxUnavailable": 5},
    "priorityClass": {"create": True, "value": 2000000},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}},
    "podAnnotations": {"a.example/b": "c"},
    "podLabels": {"team": "infra"},
    "extraEnv": [{"name": "AWS_REGION", "value": "eu-central-1"}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "own-ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/own", "readOnly": True}],
    "networkPolicy": {
        "enabled": True,
        "httpFrom": [{"namespaceSelector": {"matchLabels": {"a": "monitoring"}}}],
        "egress": [{"ports": [{"protocol": "TCP", "port": 9000}]}],
    },
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Training"}},
    "openshift": {"enabled": True},
}

#: By name: values that the chart is rendered with, and everything that is rendered is checked.
MATRIX: dict[str, Values] = {
    "defaults": {},
    "kind": yaml.safe_load((EXAMPLES / "values-kind.yaml").read_text()),
    "gpu": yaml.safe_load((EXAMPLES / "values-gpu.yaml").read_text()),
    "everything": EVERYTHING,
    "kernel": {"agent": {"identity": "kernel", "buckets": ["s3://models/all"]}},
    "keys-in-a-file": {"agent": {"tokenKeys": "/etc/ssl/own/jwks.json"}},
    "alone": {"peers": {"enabled": False}, "networkPolicy": {"enabled": True}},
    "insecure": {"tls": {"mode": "insecure"}},
    "secret": {
        "tls": {"mode": "secret", "secretName": "certs"},
        "clusterKey": {"existingSecret": "key", "key": "k"},
    },
    "cert-manager": {"tls": {"mode": "certManager"}},
    "own-issuer": {
        "tls": {
            "mode": "certManager",
            "certManager": {"issuerRef": {"name": "corp", "kind": "ClusterIssuer"}},
        }
    },
    "no-watch": {"node": {"watch": False}},
    "no-server": {"node": {"watch": False}, "agent": {"identity": "kernel"}},
    "no-hold": {"node": {"hold": "0s"}},
    "device-plugin": {"devicePlugin": {"enabled": True, "places": 8}},
    "openshift": {"openshift": {"enabled": True}},
    "selinux": {"seLinuxOptions": {"level": "s0:c1,c2"}},
    "service-monitor": {"serviceMonitor": {"enabled": True}, "dashboard": {"enabled": True}},
    "no-doctor": {"doctor": {"enabled": False}, "tolerations": []},
    "given-account": {"serviceAccount": {"create": False, "name": "theirs"}},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}]
            }
        },
        "priorityClass": {"name": "system-node-critical"},
    },
}


def helm(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("helm")
    assert command.exists(), f"{command} is not there: `make chart-tools` fetches it"
    return subprocess.run(
        [str(command), *words], input=stdin, capture_output=True, text=True, timeout=120
    )


def template(values: Values, *words: str) -> subprocess.CompletedProcess[str]:
    """`helm template`, whatever comes of it."""
    place = (RELEASE, str(CHART), "--namespace", NAMESPACE)
    return helm("template", *place, "--values", "-", *words, stdin=json.dumps(values))


def objects(text: str) -> list[Object]:
    return [found for found in yaml.safe_load_all(text) if found]


def render(values: Values, *words: str) -> list[Object]:
    done = template(values, *words)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


@functools.cache
def rendered(name: str) -> list[Object]:
    """An entry of the matrix. Not to be changed."""
    return render(MATRIX[name])


def the(found: list[Object], kind: str, end: str = "") -> Object:
    """The one of this kind whose name ends so."""
    [one] = [o for o in found if o["kind"] == kind and o["metadata"]["name"].endswith(end)]
    return one


def pod_of(found: list[Object]) -> Object:
    spec: Object = the(found, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def settings_text(found: list[Object]) -> str:
    [one] = [o for o in found if o["kind"] == "ConfigMap" and "agent.toml" in o["data"]]
    text: str = one["data"]["agent.toml"]
    return text


def settings_of(found: list[Object]) -> dict[str, Any]:
    return tomllib.loads(settings_text(found))


# -- what the agent's page says -----------------------------------------------------------------


def _cells(page: str, head: str) -> list[str]:
    """The first cells of each table whose head begins so."""
    cells = []
    for table in re.findall(rf"^\| {head}.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M):
        cells += [row.split("|")[1] for row in table.splitlines()]
    assert cells, f"AGENT.md has no table that begins with {head}"
    return cells


@functools.cache
def agent_page() -> str:
    return (ROOT / "node-agent" / "AGENT.md").read_text()


def known_settings() -> set[str]:
    cells = _cells(agent_page(), r"key \(TOML\)")
    return {key for cell in cells for key in re.findall(r"`([a-z_]+)`", cell)}


def known_metrics() -> set[str]:
    cells = _cells(agent_page(), "metric")
    return {f"tierkeep_{name}" for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}


# -- Kubernetes' schemas ------------------------------------------------------------------------

#: Read from the package a thousand times otherwise.
utils.schema_contents = functools.cache(utils.schema_contents)


@functools.cache
def releases() -> list[str]:
    """The three newest releases of Kubernetes that there are schemas of."""
    all_of_them = {utils.major_minor(version) for version in utils.all_versions()}
    return sorted(all_of_them, key=lambda v: tuple(int(n) for n in v.split(".")))[-3:]


@functools.cache
def _faults(text: str) -> tuple[str, ...]:
    found = json.loads(text)
    faults = []
    for release in releases():
        try:
            kubernetes_validate.validate(found, release, strict=True)
        except kubernetes_validate.ValidationError as e:
            where = ".".join(str(part) for part in e.path)
            faults.append(f"{found['kind']} in {release}: {where}: {e.message}")
    return tuple(faults)


def faults(found: Object) -> tuple[str, ...]:
    """What the newest releases of Kubernetes would say of an object of their own."""
    return _faults(json.dumps(found))


#: Objects that these schemas do not cover, with what each has to have. What is none of these and
#: not Kubernetes' own is a fault.
NOT_COVERED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("cert-manager.io/v1", "Issuer"): (),
    ("cert-manager.io/v1", "Certificate"): ("secretName", "issuerRef.name"),
    ("monitoring.coreos.com/v1", "PodMonitor"): ("selector", "podMetricsEndpoints.0.port"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ("selector", "endpoints.0.port"),
    ("monitoring.coreos.com/v1", "PrometheusRule"): ("groups.0.name", "groups.0.rules.0.expr"),
    ("security.openshift.io/v1", "SecurityContextConstraints"): (),
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): ("replicatedJobs.0.name", "replicatedJobs.0.template"),
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): ("template.spec.replicatedJobs.0.name",),
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): ("runtimeRef.name", "trainer.numNodes"),
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): (),
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): ("resourceGroups.0.flavors.0.resources",),
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): ("clusterQueue",),
    ("kueue.x-k8s.io/v1beta2", "WorkloadPriorityClass"): (),
}


def missing(found: Object) -> list[str]:
    """What an object that no schema covers has not."""
    absent = []
    for path in NOT_COVERED[(found["apiVersion"], found["kind"])]:
        here: Any = found["spec"]
        try:
            for part in path.split("."):
                here = here[int(part) if part.isdigit() else part]
        except (KeyError, IndexError):
            absent.append(path)
    return absent
