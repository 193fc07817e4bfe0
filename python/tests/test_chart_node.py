"""What the chart lets an agent do of the API server: by the objects as rendered, and by the
policy's own expressions over requests as the server makes them.
"""

from __future__ import annotations

import copy
from typing import Any

import celpy
import pytest
from chart import MATRIX, NAMESPACE, Object, pod_of, rendered, settings_of, the

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:tierkeep"
NODE_NAME = "authentication.kubernetes.io/node-name"


@pytest.mark.parametrize("name", MATRIX)
def test_only_the_agents_container_has_a_token_and_only_where_it_asks(name: str) -> None:
    found = rendered(name)
    pod, settings = pod_of(found), settings_of(found)
    assert pod["automountServiceAccountToken"] is False
    asks = "node_watch" in settings or settings.get("token_keys", "").startswith("https://")
    assert asks is (name != "no-server")
    own = "/var/run/secrets/kubernetes.io/serviceaccount"
    for container in pod["containers"] + pod["initContainers"]:
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        assert (own in mounts) is (asks and container["name"] == "agent"), container["name"]
    if asks:
        [volume] = [v for v in pod["volumes"] if v["name"] == "api"]
        token, authority = volume["projected"]["sources"]
        assert token["serviceAccountToken"]["path"] == "token"
        assert authority["configMap"]["name"] == "kube-root-ca.crt"


@pytest.mark.parametrize(
    ("name", "verbs"),
    [
        ("defaults", ["get", "watch", "patch"]),
        ("no-hold", ["get", "watch"]),
        ("no-watch", None),
        ("everything", ["get", "watch", "patch"]),
    ],
)
def test_its_rights_are_these_and_no_others(name: str, verbs: list[str] | None) -> None:
    found = rendered(name)
    roles = [o for o in found if o["kind"] in ("Role", "ClusterRole")]
    # The other one is the right to use OpenShift's constraints.
    rules = [rule for o in roles if "security" not in str(o["rules"]) for rule in o["rules"]]
    wanted = {"apiGroups": [""], "resources": ["nodes"], "verbs": verbs}
    assert rules == ([] if verbs is None else [wanted])
    has = {o["kind"] for o in found if o["kind"].startswith("ValidatingAdmission")}
    policy = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    assert has == (policy if verbs is not None and "patch" in verbs else set())


def test_what_is_told_of_nodes_is_in_force() -> None:
    settings = settings_of(rendered("everything"))
    assert settings["node_watch"] == "kubernetes"
    assert settings["node_labels"]["rack"] == "example.com/rack"
    assert settings["node_taints"] == ["example.com/retire", "example.com/broken"]
    assert settings["node_hold"] == "1h"


# -- the policy ---------------------------------------------------------------------------------

NODE: Object = {
    "metadata": {
        "name": "gpu-1",
        "labels": {"zone": "a"},
        "annotations": {"theirs": "1"},
        "finalizers": ["karpenter.sh/termination"],
    },
    "spec": {"podCIDR": "10.0.0.0/24"},
}


def _value(expression: str, **names: Any) -> Any:
    environment = celpy.Environment()
    program = environment.program(environment.compile(expression))
    return program.evaluate({key: celpy.json_to_cel(value) for key, value in names.items()})


def refused(after: Object, *, before: Object = NODE, node: str | None = "gpu-1") -> list[str]:
    """What the policy says to a change by an agent whose pod is on ``node``."""
    spec = the(rendered("defaults"), "ValidatingAdmissionPolicy")["spec"]
    extra = {} if node is None else {NODE_NAME: [node]}
    request = {"userInfo": {"username": ACCOUNT, "extra": extra}}
    names = {"request": request, "object": after, "oldObject": before}
    [condition] = spec["matchConditions"]
    assert _value(condition["expression"], **names)
    names["variables"] = {v["name"]: _value(v["expression"], **names) for v in spec["variables"]}
    rules = spec["validations"]
    return [rule["message"] for rule in rules if not _value(rule["expression"], **names)]


def changed(**metadata: Any) -> Object:
    node = copy.deepcopy(NODE)
    node["metadata"] |= metadata
    return node


HELD = {
    "theirs": "1",
    "cluster-autoscaler.kubernetes.io/scale-down-disabled": "true",
    "karpenter.sh/do-not-disrupt": "true",
    "tierkeep.dev/held": "why",
}


def test_an_agent_holds_its_own_node_and_lets_it_go() -> None:
    held = changed(annotations=HELD)
    assert refused(held) == []
    assert refused(NODE, before=held) == []
    bare = changed()
    del bare["metadata"]["annotations"]
    assert refused(changed(annotations={"tierkeep.dev/held": "why"}), before=bare) == []


def test_an_agent_changes_nothing_else_of_it() -> None:
    no_other = "an agent of tierkeep changes no annotations but those that hold its Node"
    nothing = "an agent of tierkeep changes nothing of its Node but annotations"
    for values in ({"theirs": "2"}, {}, {"theirs": "1", "more": "1"}):
        assert refused(changed(annotations=values)) == [no_other]
    for metadata in (
        {"labels": {"zone": "b"}},
        {"labels": {}},
        {"finalizers": []},
        {"ownerReferences": [{"name": "x"}]},
    ):
        assert refused(changed(**metadata)) == [nothing]
    tainted = copy.deepcopy(NODE)
    tainted["spec"]["taints"] = [{"key": "a"}]
    assert refused(tainted) == [nothing]


def test_an_agent_changes_no_other_node() -> None:
    held = changed(annotations=HELD)
    said = ["an agent of tierkeep changes no Node but its own"]
    assert refused(held, node="gpu-2") == said
    # A token of no pod, or of a cluster before 1.30.
    assert refused(held, node=None) == said
