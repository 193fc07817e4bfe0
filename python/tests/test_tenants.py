"""Trainers that show a token, as on Kubernetes: any uid, an agent without any rights.

The agent runs as a user that owns its three directories and nothing else, without capabilities;
trainers run as users that can enter none of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import COMMAND, Agent
from api_server import ApiServer
from tokens import Cluster

AGENT = 9177

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 and os.environ.get("TIERKEEP_LAB") != "require",
    reason="NOT TESTED: tenants of an agent; it takes root to be several users",
)

TRAIN = """
import os, sys
import numpy, tierkeep
ckpt = tierkeep.Checkpointer(sys.argv[1])
state = {"x": numpy.zeros(100_000)}
found = ckpt.restore(state)
step = found.step if found else 0
print(step, int(state["x"][0]), flush=True)
for step in range(step + 1, step + 1 + int(sys.argv[2])):
    state["x"][:] = step
    ckpt.save(step, state).wait("ram", 60)
if sys.argv[3:] and os.fork() == 0:
    os.close(1), os.close(2), __import__("time").sleep(60)
os._exit(0)  # As if it were killed: what is in RAM is the agent's.
"""


def _as(uid: int) -> list[str]:
    # What a container of the "restricted" standard has: a user, and nothing more.
    return [
        "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
        "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs",
    ]  # fmt: skip


class Node:
    """An agent of tenants, and trainers beside it."""

    def __init__(self, place: Path, ram: Path) -> None:
        self.place, self.cluster = place, Cluster(place / "cluster")
        self.disk, self.ram, self._tokens = place / "disk", ram, place / "tokens"
        for path in (self.disk, self.ram):
            path.mkdir()
            os.chown(path, AGENT, AGENT)
        self.disk.chmod(0o700)
        self._tokens.mkdir()
        settings = ["--identity", "kubernetes", "--disk-dir", str(self.disk)]
        settings += ["--token-keys", str(self.cluster.keys)]
        self.agent = Agent(ram, *settings, before=_as(AGENT))

    def train(
        self,
        token: str,
        uid: int,
        steps: int = 1,
        destination: str = "/runs/gpt",
        fork: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        file = self._tokens / f"{time.monotonic_ns()}"
        file.write_text(token)
        file.chmod(0o644)
        env = os.environ | {"TIERKEEP_AGENT": str(self.agent.socket), "HOME": "/"}
        env |= {"TIERKEEP_TOKEN_FILE": str(file)} if token else {}
        command = [*_as(uid), sys.executable, "-c", TRAIN, destination, str(steps)]
        command += ["fork"] * fork
        return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def anybody() -> None:
    """Other users can run this interpreter: it may lie where they have no way to."""
    command = [*_as(2001), sys.executable, "-c", "import numpy, tierkeep"]
    tried = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if tried.returncode != 0:
        pytest.skip(f"NOT TESTED: tenants of an agent; other users cannot run {sys.executable}")


@pytest.fixture
def node(anybody: None) -> Iterator[Node]:
    # A test's own directory is root's alone: other users have to get through it.
    place = Path(f"/tmp/tierkeep-tenants-{os.getpid()}-{time.monotonic_ns()}")
    place.mkdir()
    node = Node(place, Path("/dev/shm") / place.name)
    try:
        yield node
    finally:
        node.agent.stop(signal.SIGKILL)
        end = time.monotonic() + 20
        # Whoever was started by another program outlives that one for a moment.
        remove = ["rm", "-rf", str(place), str(node.ram), str(node.agent.log)]
        while subprocess.run(remove, stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < end, f"{place} or {node.ram} is still written to"


def test_a_namespace_is_who_it_is_under_any_uid_and_no_other_namespace_is(node: Node) -> None:
    team_a, team_b = (node.cluster.token(ns, "trainer") for ns in ("team-a", "team-b"))
    first = node.train(team_a, 2001, steps=3)
    assert first.stdout == "0 0\n", first.stderr
    # The same namespace under a new uid, as after a pod was made again.
    assert node.train(team_a, 2002).stdout == "3 3\n"
    # The same uid in another namespace, by the same name.
    assert node.train(team_b, 2001).stdout == "0 0\n"
    # Nor by the name that it really has, nor by climbing there.
    real = f"{node.disk}/team-a/trainer/runs/gpt"
    assert node.train(team_b, 2001, destination=real).stdout == "0 0\n"
    assert node.train(team_a, 2003).stdout == "4 4\n"
    entries = sorted(str(p.relative_to(node.disk)) for p in node.disk.glob("*/*"))
    assert entries == ["team-a/trainer", "team-b/trainer"]


def test_keys_are_the_api_servers_and_the_last_ones_where_it_is_away(node: Node) -> None:
    server = ApiServer(node.place / "api", "gpu-1", node.cluster)
    asks = ["--kubernetes-api", server.url, "--kubernetes-dir", str(server.dir)]
    node.agent.stop(signal.SIGTERM)
    node.agent.settings = (*node.agent.settings[:-2], *asks)
    node.agent.start()
    token = node.cluster.token("team-a", "trainer")
    first = node.train(token, 2001)
    assert first.stdout == "0 0\n", first.stderr
    assert server.asked == {"GET /openid/v1/jwks": 1} and server.strangers == 0
    server.stop()
    node.agent.stop(signal.SIGKILL)
    node.agent.start()
    assert node.train(token, 2001).stdout == "1 1\n"
    assert "is not kept" not in node.agent.log.read_text()


def test_a_trainer_that_an_agent_cannot_see_is_followed_in_place_when_it_dies(node: Node) -> None:
    """As in a pod of its own: the agent knows no process of others, not even by a number."""
    node.agent.stop(signal.SIGTERM)
    node.agent.before = ["unshare", "--pid", "--fork", "--kill-child", *_as(AGENT)]
    node.agent.start()
    token = node.cluster.token("team-a", "trainer")
    # A fork of it, as of a data loader, has the socket open for a minute more.
    first = node.train(token, 2001, fork=True)
    assert first.stdout == "0 0\n", first.stderr
    status = [COMMAND, "status", "--json", "--agent", str(node.agent.socket)]
    end, said = time.monotonic() + 30, ""
    while not said and time.monotonic() < end:
        said = subprocess.run(status, capture_output=True, text=True).stdout
    shown = json.loads(said)["ranks"]
    assert [rank["pid"] for rank in shown] == [None], shown
    assert node.train(token, 2001).stdout == "1 1\n"


def test_without_a_good_token_nobody_is_served(node: Node) -> None:
    cluster = node.cluster
    past = cluster.token("team-a", "trainer", exp=int(time.time()) - 600)
    vault = cluster.token("team-a", "trainer", aud=["vault"])
    head, body, _ = cluster.token("team-a", "trainer").split(".")
    signed = cluster.token("team-b", "trainer").split(".")[2]
    for token, said in [
        ("", "neither root nor this user"),
        ("nonsense", "no token of a service account"),
        (past, "the token has ended"),
        (vault, 'audience is "tierkeep"'),
        (f"{head}.{body}.{signed}", "not signed with the cluster's key"),
    ]:
        refused = node.train(token, 2001)
        assert refused.returncode != 0 and said in refused.stderr, refused.stderr
        # No token is in the log, whatever it was worth.
        assert not token or token not in node.agent.log.read_text()
    # The agent's own user is nobody here without one.
    refused = node.train("", AGENT)
    assert "TIERKEEP_TOKEN_FILE" in refused.stderr, refused.stderr
    assert list(node.disk.glob("team*")) == []


def test_an_upgrade_of_an_agent_of_tenants_loses_nothing(node: Node) -> None:
    token = node.cluster.token("team-a", "trainer")
    assert node.train(token, 2001, steps=2).stdout == "0 0\n"
    for how in (signal.SIGTERM, signal.SIGKILL):
        node.agent.stop(how)
        node.agent.start()
    status = [COMMAND, "status", "--agent", str(node.agent.socket)]
    end, shown = time.monotonic() + 30, ""
    # What a dead trainer has left is owned again once the living had time to come back.
    while "team-a/trainer/runs/gpt" not in shown and time.monotonic() < end:
        # Nor does it answer questions from its first moment on.
        shown = subprocess.run(status, capture_output=True, text=True).stdout
    assert "team-a/trainer/runs/gpt" in shown, shown
    assert node.train(token, 2002).stdout == "2 2\n"
    # Trainers can ask the agent for their own checkpoints, and for nothing that is for its user.
    refused = subprocess.run([*_as(2002), *status], capture_output=True, text=True)
    assert refused.returncode != 0 and "ermission denied" in refused.stderr, refused.stderr
