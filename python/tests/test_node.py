"""An agent that watches its own Node: it leaves by the cluster's word, and is held while it has
what no bucket has.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from agents import COMMAND, Agent
from api_server import ApiServer

import tierkeep

HELD = {
    "cluster-autoscaler.kubernetes.io/scale-down-disabled": "true",
    "karpenter.sh/do-not-disrupt": "true",
    "tierkeep.dev/held": "it has state of a training run that no bucket has",
}


def until(what: str, so: Callable[[], bool], within: float = 40) -> None:
    end = time.monotonic() + within
    while not so():
        assert time.monotonic() < end, f"{what}: not within {within:.0f} s"
        time.sleep(0.05)


class Node:
    """An agent on a node, its API server, and a run with a bucket."""

    def __init__(self, tmp_path: Path, ram: Path) -> None:
        self.api = ApiServer(tmp_path / "api", "gpu-1")
        self.tmp_path, self.ram = tmp_path, ram
        self.agent: Agent | None = None
        self.ckpts: list[tierkeep.Checkpointer] = []

    def start(self, *settings: str) -> Agent:
        self.agent = Agent(self.ram, *self.api.settings(*settings))
        self.wait()
        return self.agent

    def wait(self) -> None:
        """Until the agent answers: first it looks where it is."""
        until("it answers", (self.ram / "control.sock").exists)

    def status(self, *more: str) -> dict[str, Any]:
        assert self.agent is not None
        ask = [COMMAND, "status", "--json", "--agent", str(self.agent.socket), *more]
        said: dict[str, Any] = json.loads(subprocess.check_output(ask))
        return said

    def leaving(self) -> str | None:
        why: str | None = self.status()["leaving"]
        return why

    def open(self, **more: Any) -> tierkeep.Checkpointer:
        assert self.agent is not None
        ckpt = tierkeep.Checkpointer(
            f"file://{self.tmp_path}/bucket/run", disk=self.tmp_path / "disk",
            agent=str(self.agent.socket), **more,
        )  # fmt: skip
        self.ckpts.append(ckpt)
        return ckpt

    def rank(self) -> dict[str, Any]:
        [rank] = self.status()["ranks"]
        return dict(rank)

    def close(self) -> None:
        for ckpt in self.ckpts:
            with contextlib.suppress(tierkeep.errors.TierkeepError):  # Its agent is gone.
                ckpt.close()
        if self.agent is not None and self.agent.process is not None:
            self.agent.stop(signal.SIGKILL)


@pytest.fixture
def node(tmp_path: Path, ram: Path) -> Iterator[Node]:
    node = Node(tmp_path, ram)
    yield node
    node.close()


def save(ckpt: tierkeep.Checkpointer, step: int) -> None:
    ckpt.save(step, {"x": numpy.full(100_000, step)}).wait("ram", 60)


def test_a_node_that_is_to_go_away_lets_go_what_is_newest_and_stays_when_it_is_wanted_again(
    node: Node,
) -> None:
    agent = node.start("--http", "127.0.0.1:0")
    ckpt = node.open(disk_every=1000, object_every=1000)
    save(ckpt, 1)
    assert node.leaving() is None
    assert (node.rank()["disk_step"], node.rank()["object_step"]) == (None, None)
    node.api.spec(unschedulable=True)
    until("it leaves", lambda: node.leaving() == "it is cordoned")
    until("the bucket has it", lambda: node.rank()["object_step"] == 1)
    save(ckpt, 2)
    until("the bucket has the next one", lambda: node.rank()["object_step"] == 2)
    ask = [COMMAND, "status", "--agent", str(agent.socket)]
    assert "this node is to go away: it is cordoned\n" in subprocess.check_output(ask, text=True)
    node.api.spec()
    until("it stays", lambda: node.leaving() is None)
    node.api.taint("example.com/other", "karpenter.sh/disrupted")
    until("Karpenter", lambda: "Karpenter takes it down" in (node.leaving() or ""))
    node.api.delete()
    until("it was deleted", lambda: node.leaving() == "its Node was deleted")
    # An agent that is told to end is told nothing of its node.
    assert agent.stop(signal.SIGTERM) == 0


def test_a_server_that_is_away_changes_nothing_and_what_it_says_then_counts(node: Node) -> None:
    agent = node.start()
    node.api.spec(unschedulable=True)
    until("it leaves", lambda: node.leaving() is not None)
    node.api.stop()
    until("it was noticed", lambda: "does not tell whether" in agent.log.read_text())
    assert node.leaving() == "it is cordoned"
    node.api.spec()
    node.api.start()
    until("it stays", lambda: node.leaving() is None)
    assert agent.log.read_text().count("does not tell whether") == 1


def test_another_server_is_not_believed(node: Node, tmp_path: Path) -> None:
    """One whose certificate another authority has signed gets neither the token nor a word in."""
    other = ApiServer(tmp_path / "other", "gpu-1")
    other.spec(unschedulable=True)
    settings = node.api.settings()
    settings[settings.index(node.api.url)] = other.url
    node.agent = agent = Agent(node.ram, *settings)
    node.wait()
    until("it was refused", lambda: "certificate" in agent.log.read_text())
    assert node.leaving() is None
    assert (other.asked, other.strangers) == ({}, 0)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_where_a_node_is_its_labels_say_and_the_next_agent_knows_it_too(
    node: Node, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    node.api.label(topology__zone="a", rack="r1")
    gossip = ["--gossip", f"127.0.0.1:{free_port()}", "--cluster-key", str(key), "--insecure"]
    names = ["--node-labels", "zone=topology/zone,rack=rack", "--labels", "rack=mine"]
    agent = node.start(*gossip, *names)

    def member() -> dict[str, Any]:
        [member] = node.status("--cluster")["members"]
        return dict(member)

    assert member()["labels"] == {"zone": "a", "rack": "mine"}, "what was given counts more"
    node.api.label(topology__zone="b")
    until("it moved", lambda: member()["labels"]["zone"] == "b")
    node.api.taint("ToBeDeletedByClusterAutoscaler")
    until("others hear of it", lambda: "autoscaler" in (member()["leaving"] or ""))
    node.api.stop()
    agent.stop(signal.SIGTERM)
    agent.start()
    node.wait()
    assert member()["labels"]["zone"] == "b"
    assert "taken from what the last agent knew" in agent.log.read_text()


def test_a_node_is_held_while_it_has_what_no_bucket_has(node: Node) -> None:
    node.api.annotate("karpenter.sh/do-not-disrupt", "true")
    node.start()
    mine = {"karpenter.sh/do-not-disrupt": "true"}
    ckpt = node.open(object_every=1000)
    save(ckpt, 1)
    until("it is held", lambda: node.api.annotations() == HELD)
    node.api.spec(unschedulable=True)  # All that is there goes to the bucket.
    until("the bucket has it", lambda: node.rank()["object_step"] == 1)
    assert node.api.annotations() == HELD, "it trains: the next step is not there yet"
    ckpt.close()
    until("it is let go", lambda: node.api.annotations() == mine)
    node.api.spec()
    until("it stays", lambda: node.leaving() is None)
    ckpt = node.open(object_every=1000)
    ckpt.restore({"x": numpy.zeros(100_000, int)})
    save(ckpt, 2)
    until("it is held again", lambda: node.api.annotations() == HELD)
    agent = node.agent
    assert agent is not None
    agent.stop(signal.SIGTERM)
    assert node.api.annotations() == mine, "nobody would take it back after an uninstall"
    agent.start()
    node.wait()
    until("the next agent holds it", lambda: node.api.annotations() == HELD)


def test_it_is_held_for_so_long_at_most_and_never_against_another_word(node: Node) -> None:
    agent = node.start("--node-hold", "4s")
    ckpt = node.open(object_every=1000)
    save(ckpt, 1)
    until("it is held", lambda: node.api.annotations() == HELD)
    until("nothing moves", lambda: node.api.annotations() == {})
    key = "cluster-autoscaler.kubernetes.io/scale-down-disabled"
    node.api.annotate(key, "false")
    save(ckpt, 2)
    until("it was told", lambda: "somebody else has said" in agent.log.read_text())
    assert node.api.annotations() == {key: "false"}


def test_an_agent_is_left_in_peace_where_it_is_told_so(node: Node) -> None:
    node.start("--node-hold", "0s")
    save(node.open(object_every=1000), 1)
    time.sleep(5)
    assert not any(what.startswith("PATCH") for what in node.api.asked), node.api.asked
