"""The chart: everything that it renders, with many values, and everything that it refuses."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
import tomllib
from base64 import b64decode
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from chart import (
    CHART,
    EVERYTHING,
    MATRIX,
    NAMESPACE,
    NOT_COVERED,
    RELEASE,
    ROOT,
    Values,
    faults,
    helm,
    known_metrics,
    known_settings,
    missing,
    pod_of,
    render,
    rendered,
    settings_of,
    settings_text,
    template,
    the,
)

EACH = pytest.mark.parametrize("name", MATRIX)

GIB = 1 << 30


@EACH
def test_helm_lint_finds_nothing(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), "--values", "-", stdin=json.dumps(MATRIX[name]))
    assert done.returncode == 0, done.stdout + done.stderr


@EACH
def test_every_object_is_one_that_the_newest_releases_of_kubernetes_take(name: str) -> None:
    found = rendered(name)
    wrong: list[str] = []
    for one in found:
        if (one["apiVersion"], one["kind"]) in NOT_COVERED:
            wrong += [f"{one['kind']}: there is no {path}" for path in missing(one)]
        else:
            wrong += faults(one)
    assert wrong == []
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(set(names)) == len(names)


def test_a_wrong_object_would_be_found() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    assert len(faults({**pod, "spec": {"containers": [{"name": "a", "imagee": "b"}]}})) == 3
    assert len(faults({**pod, "spec": {"containers": "none"}})) == 3


# -- settings -----------------------------------------------------------------------------------


@EACH
def test_the_agents_settings_are_ones_that_it_knows(name: str) -> None:
    settings = settings_of(rendered(name))
    assert set(settings) - known_settings() == set()
    assert {"socket", "ram_dir", "ram_bytes_max", "identity", "control"} <= set(settings)


@EACH
def test_the_agent_itself_takes_its_settings(name: str, tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(settings_text(rendered(name)).replace("/etc/tierkeep/", f"{tmp_path}/"))
    # What the pod has mounted there.
    (tmp_path / "tls").mkdir()
    for secret in [o for o in rendered("defaults") if o["kind"] == "Secret"]:
        for key, value in secret["data"].items():
            place = tmp_path if key == "cluster.key" else tmp_path / "tls"
            (place / key).write_bytes(b64decode(value))
    command = Path(sys.executable).with_name("tierkeep")
    done = subprocess.run(
        [str(command), "agent", "--check-config", "--json", "--config", str(file)],
        env={"TIERKEEP_NODE": "gpu-1", "TIERKEEP_ADVERTISE": "10.0.0.17"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    in_force = json.loads(done.stdout)
    for key, value in settings_of(rendered(name)).items():
        assert in_force[key]["from"] == str(file), key
        if key in ("ram_bytes_max", "run_bytes_max", "socket", "ram_dir", "cluster"):
            assert in_force[key]["value"] == str(value)


def test_what_is_told_of_trainers_is_in_force() -> None:
    settings = settings_of(rendered("everything"))
    assert settings["identity"] == "kubernetes"
    assert settings["token_audience"] == "tierkeep"
    assert settings["token_keys"] == "https://kubernetes.default.svc/openid/v1/jwks"
    assert settings["buckets"] == ["s3://models/{namespace}/", "gs://other/{namespace}"]
    assert settings["seeds"] == [f"training-keep.{NAMESPACE}.svc:9178"]
    assert settings["labels"] == {"zone": "a", "topology.example/rack": "r7"}
    assert settings["run_bytes_max"] == 16 * GIB
    kernel = settings_of(rendered("kernel"))
    assert kernel["identity"] == "kernel"
    assert not {"token_audience", "token_keys"} & set(kernel)
    assert settings_of(rendered("insecure"))["insecure"] is True
    assert settings_of(rendered("alone"))["gossip"] == "off"


def test_text_stays_what_it_is_on_its_way_into_toml() -> None:
    hard = 'back\\slash "quotes" <é>'
    settings = settings_of(render({"agent": {"tokenAudience": hard}}))
    assert settings["token_audience"] == hard


@pytest.mark.parametrize(
    ("given", "budget"),
    [("64Gi", 64 * GIB), ("1Ti", 1024 * GIB), ("512Mi", GIB // 2), ("70000Ki", 70000 * 1024)],
)
def test_one_value_is_the_budget_the_request_and_the_limit(given: str, budget: int) -> None:
    found = render({"ram": {"bytes": given}})
    assert settings_of(found)["ram_bytes_max"] == budget
    [agent] = pod_of(found)["containers"]
    request, limit = (agent["resources"][kind]["memory"] for kind in ("requests", "limits"))
    assert request == limit
    number, unit = re.fullmatch(r"(\d+)(Mi)?", limit).groups()
    assert int(number) * (1 << 20 if unit else 1) == budget + (256 << 20)


def test_other_settings_make_other_pods_and_a_new_key_does_not() -> None:
    def checksum(values: Values) -> str:
        found = the(render(values), "DaemonSet")["spec"]["template"]["metadata"]
        return str(found["annotations"]["checksum/config"])

    assert checksum({}) == checksum({})
    assert checksum({}) != checksum({"agent": {"idle": "2h"}})


# -- what is refused ----------------------------------------------------------------------------

REFUSED: list[tuple[Values, str]] = [
    ({"ram": {"bytes": "64GB"}}, "/ram/bytes"),
    ({"ram": {"bytes": 68719476736}}, "/ram/bytes"),
    ({"ram": {"bytes": "1Mi"}}, "ram.bytes: 1Mi holds no training state"),
    ({"ram": {"byte": "64Gi"}}, "additional properties 'byte' not allowed"),
    ({"tolerance": []}, "additional properties 'tolerance' not allowed"),
    ({"ram": {"hostPath": "/"}}, "/ram/hostPath"),
    ({"disk": {"hostPath": "/var/lib/../../etc"}}, "/disk/hostPath"),
    ({"socket": {"hostPath": "run/tierkeep"}}, "/socket/hostPath"),
    (
        {"disk": {"hostPath": "/dev/shm/tierkeep/disk"}},
        "disk.hostPath: /dev/shm/tierkeep/disk lies",
    ),
    ({"socket": {"hostPath": "/var/lib/tierkeep"}}, "/var/lib/tierkeep lies in"),
    ({"ram": {"hostPath": "/run/tierkeep-control/x"}}, "ram.hostPath"),
    ({"agent": {"uid": 0}}, "/agent/uid"),
    ({"agent": {"identity": "uid"}}, "/agent/identity"),
    (
        {"agent": {"buckets": ["s3://models/all"]}},
        "agent.buckets: s3://models/all has no {namespace}",
    ),
    ({"agent": {"buckets": ["models/{namespace}"]}}, "/agent/buckets/0"),
    ({"agent": {"tokenKeys": ""}}, "agent.tokenKeys"),
    ({"agent": {"tokenKeys": "http://plain"}}, "/agent/tokenKeys"),
    ({"agent": {"labels": {"zone": "a,rack=b"}}}, "/agent/labels/zone"),
    ({"agent": {"trainersMax": 0}}, "/agent/trainersMax"),
    ({"agent": {"idle": "an hour"}}, "/agent/idle"),
    ({"agent": {"drainOnSigterm": "60s"}}, "agent.drainOnSigterm: the pod is killed 60s after"),
    ({"tls": {"mode": "off"}}, "/tls/mode"),
    ({"tls": {"mode": "secret"}}, "tls.secretName: tls.mode is secret: name the Secret"),
    ({"tls": {"certManager": {"issuerRef": {"kind": "Issuer"}}}}, "/tls/certManager/issuerRef"),
    ({"clusterKey": {"existingSecret": "Not A Name"}}, "/clusterKey/existingSecret"),
    ({"peers": {"rate": "fast"}}, "/peers/rate"),
    ({"updateStrategy": {"maxUnavailable": "0%"}}, "/updateStrategy/maxUnavailable"),
    ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    (
        {"accelerators": {"only": True}, "nodeAffinity": {"preferred": []}},
        "nodeAffinity: accelerators.only",
    ),
    (
        {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}},
        "serviceMonitor.enabled: podMonitor",
    ),
    ({"extraEnv": [{"name": "TIERKEEP_NODE", "value": "x"}]}, "the chart sets TIERKEEP_NODE"),
    ({"image": {"digest": "sha256:123"}}, "/image/digest"),
    ({"cpu": {"request": "two"}}, "/cpu/request"),
    ({"terminationGracePeriodSeconds": "60"}, "/terminationGracePeriodSeconds"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_wrong_value_is_refused_by_its_name(values: Values, said: str) -> None:
    done = template(values)
    assert done.returncode != 0, done.stdout
    assert said in done.stderr


def test_every_value_is_in_the_schema_with_one_sentence() -> None:
    seen = 0

    def look(schema: dict[str, Any], path: str) -> None:
        nonlocal seen
        assert schema["additionalProperties"] is False, path
        for key, inner in schema["properties"].items():
            text = inner["description"]
            assert re.fullmatch(r"[A-Z].*[^.]\.", text), f"{path}{key}: {text}"
            seen += 1
            if "properties" in inner:
                look(inner, f"{path}{key}.")

    look(json.loads((CHART / "values.schema.json").read_text()), "")
    assert seen > 100


def test_the_readme_has_every_value() -> None:
    tool = ROOT / "charts" / "tools" / "table.py"
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True)
    page = (CHART / "README.md").read_text()
    assert done.stdout.strip() in page, "run `python charts/tools/table.py --write`"


def test_the_charts_version_is_the_agents() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]
    chart = (CHART / "Chart.yaml").read_text()
    assert f'appVersion: "{workspace["version"]}"' in chart


# -- certificates and the key -------------------------------------------------------------------


def test_generated_certificates_let_agents_trust_each_other(tmp_path: Path) -> None:
    data = the(rendered("defaults"), "Secret", "-tls")["data"]
    for key, value in data.items():
        (tmp_path / key).write_bytes(b64decode(value))
    ends = []
    for purpose in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(purpose)
        context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
        context.load_verify_locations(tmp_path / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        ends.append(context)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ends[0].wrap_bio(back, there, server_hostname="tierkeep")
    server = ends[1].wrap_bio(there, back, server_side=True)
    waiting = [client, server]
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert waiting == []
    assert server.getpeercert() and client.getpeercert()


def test_a_key_is_long_enough_and_the_pods_mount_what_was_made() -> None:
    found = rendered("defaults")
    secret = the(found, "Secret", "-cluster")
    assert len(b64decode(secret["data"]["cluster.key"])) >= 32
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    sources = next(v for v in pod_of(found)["volumes"] if v["name"] == "settings")["projected"]
    named = {s["secret"]["name"] for s in sources["sources"] if "secret" in s}
    assert named == {secret["metadata"]["name"], the(found, "Secret", "-tls")["metadata"]["name"]}


def test_secrets_that_exist_are_mounted_and_none_is_made() -> None:
    found = rendered("secret")
    assert not [o for o in found if o["kind"] == "Secret"]
    text = json.dumps(pod_of(found)["volumes"])
    assert '"name": "certs"' in text and '"name": "key"' in text and '"key": "k"' in text
    assert "certs" in notes(MATRIX["secret"])


def test_cert_manager_makes_the_secret_that_the_pods_mount() -> None:
    for name, kinds in (("cert-manager", ["Issuer", "Issuer"]), ("own-issuer", [])):
        found = rendered(name)
        [leaf] = [o for o in found if o["kind"] == "Certificate" and not o["spec"].get("isCA")]
        assert leaf["spec"]["secretName"] in json.dumps(pod_of(found)["volumes"])
        assert leaf["spec"]["dnsNames"] == ["tierkeep"]
        assert {"server auth", "client auth"} <= set(leaf["spec"]["usages"])
        assert [o["kind"] for o in found if o["kind"] == "Issuer"] == kinds


# -- what people see ----------------------------------------------------------------------------


def notes(values: Values) -> str:
    place = (RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client")
    done = helm("install", *place, "--values", "-", stdin=json.dumps(values))
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\nNOTES:\n")[1]


@EACH
def test_notes_say_openly_what_the_namespace_needs_and_what_to_do_next(name: str) -> None:
    text = notes(MATRIX[name])
    commands = re.findall(r"^  (kubectl .*)$", text, re.M)
    assert len(commands) == 3
    assert "enforce=privileged" in commands[0]
    assert ("WARNING" in text) == (name == "insecure")
    assert "<no value>" not in text and "%!" not in text


def metrics_in(query: str) -> set[str]:
    """Of a query that Prometheus takes; Grafana puts its own words in before."""
    promql_parser.parse(re.sub(r"\$(job|run)", ".*", query.replace("$__rate_interval", "5m")))
    return set(re.findall(r"tierkeep_[a-z_]+", query))


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    data = the(rendered("everything"), "ConfigMap", "-dashboard")["data"]
    board = json.loads(data["tierkeep.json"])
    expressions = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    named = set().union(*map(metrics_in, expressions))
    assert named - known_metrics() == set()
    assert {"tierkeep_step", "tierkeep_ram_limit_bytes", "tierkeep_copies_wanted"} <= named
    assert all(panel["title"] and panel["description"] for panel in board["panels"])
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_alerts_watch_metrics_that_there_are_and_name_a_runbook() -> None:
    [group] = the(render(EVERYTHING), "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        assert metrics_in(rule["expr"]) - known_metrics() == set()
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (page, bool(anchor)) == ("docs/operate.md", True)
        assert rule["annotations"]["summary"] and rule["labels"]["severity"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) >= 8
    assert "@" not in json.dumps(group)
