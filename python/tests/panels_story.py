"""An hour of a cluster in half a minute: agents, jobs that save, and what goes wrong in the end.

Agents of three nodes, whose samples a Prometheus takes with the labels that the chart's PodMonitor
gives them. One job has a rank on each of two nodes; another one ends, and goes on from the bucket
on another node with another disk. Then an agent dies, and the bucket gives no rights any more.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import servers
from agents import Agent
from chart import EVERYTHING, NAMESPACE, render, the
from prometheus import Prometheus, until

#: Names as a cluster has them, except where pods' names follow from the release's.
VALUES = {key: EVERYTHING[key] for key in ("podMonitor", "prometheusRule", "dashboard")}
NODES = ("gpu-0", "gpu-1", "gpu-2")
#: Samples that there are before anything goes wrong, and after, at the least.
HEALTHY, ILL = 12, 6
#: What goes wrong in the end.
PROVOKED = {"AgentDown", "NodesLost", "CopiesMissing", "BucketTrouble"}


@dataclass
class Story:
    """What tests look at."""

    server: Prometheus
    board: dict[str, Any]
    rules: Path
    began: float
    healthy: float = 0
    ended: float = 0


def rule_file(found: list[dict[str, Any]], place: Path) -> Path:
    """The rendered PrometheusRule, as the operator gives it to Prometheus."""
    path = place / "rules.yml"
    path.write_text(json.dumps({"groups": the(found, "PrometheusRule")["spec"]["groups"]}))
    return path


def start(destination: str, agent: Agent, **options: Any) -> subprocess.Popen[bytes]:
    """A trainer. What it has to say goes where the test's own words go."""
    text = json.dumps({"agent": str(agent.socket), **options})
    script = Path(__file__).with_name("panels_job.py")
    return subprocess.Popen([sys.executable, str(script), destination, text])


def _gone(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(20)


@contextlib.contextmanager
def refusing(port: int) -> Iterator[None]:
    """In the place of a bucket's server one that forbids everything: no right to it is left."""

    class Refusing(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            self.close_connection = True
            if self.raw_requestline and self.parse_request():
                self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _agents(stack: contextlib.ExitStack, ram: Path, place: Path) -> tuple[list[Agent], list[str]]:
    """Three of them that know each other, and where their metrics are."""
    key = place / "cluster.key"
    key.write_text("a key of this test's own")
    free = servers.ports(6)
    seeds = ",".join(f"127.0.0.1:{port}" for port in free[:3])
    agents, pages = [], [f"127.0.0.1:{port}" for port in free[3:]]
    for index, name in enumerate(NODES):
        (ram / name).mkdir()
        agent = Agent(
            ram / name, "--insecure", "--cluster-key", str(key), "--seeds", seeds,
            "--gossip", f"127.0.0.1:{free[index]}", "--node", name, "--labels", f"host={name}",
            "--http", pages[index], "--ram-bytes-max", "128MiB",
        )  # fmt: skip
        stack.callback(agent.log.unlink)
        stack.callback(agent.stop, signal.SIGKILL)
        agents.append(agent)
    return agents, pages


@contextlib.contextmanager
def told(place: Path) -> Iterator[Story]:
    """The whole of it; the server that knows it can be asked until the end."""
    found = render(VALUES)
    monitor = the(found, "PodMonitor")["metadata"]["name"]
    pods = the(found, "DaemonSet")["metadata"]["name"]
    board = json.loads(the(found, "ConfigMap", "-dashboard")["data"]["tierkeep.json"])
    rules = rule_file(found, place)
    with contextlib.ExitStack() as stack:
        ram = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        bucket = stack.enter_context(contextlib.ExitStack())
        options = bucket.enter_context(servers.s3(place / "s3"))
        agents, pages = _agents(stack, ram, place)
        targets = {
            at: {
                "namespace": NAMESPACE, "pod": f"{pods}-{index:05x}", "container": "agent",
                "endpoint": "http", "node": node,
            }
            for index, (at, node) in enumerate(zip(pages, NODES, strict=True))
        }  # fmt: skip
        job = f"{NAMESPACE}/{monitor}"
        server = stack.enter_context(Prometheus(place, job, targets, rules))

        def train(destination: str, node: int, disk: Path, **more: Any) -> subprocess.Popen[bytes]:
            more |= {"disk": str(disk), "storage_options": options}
            process = start(destination, agents[node], **more)
            stack.callback(_gone, process)
            return process

        def has(query: str, least: float) -> bool:
            now = server.ask("query", query=query)["result"]
            return bool(now) and float(now[0]["value"][1]) >= least

        gpt, probe = f"s3://{servers.BUCKET}/gpt", f"s3://{servers.BUCKET}/probe"
        runs = place / "team-a" / "trainer"
        for rank in (0, 1):
            ranks = {"rank": rank, "world_size": 2, "attempt_id": "0a" * 16}
            train(gpt, rank, runs, replicas=2, every=2, object_every=8, **ranks)
        first = train(probe, 2, runs, replicas=1, every=5)
        until("the bucket has steps of both", lambda: has("min(tierkeep_step{tier='object'})", 10))
        story = Story(server, board, rules, time.time() - 3)
        first.terminate()
        assert first.wait(60) == 0
        train(probe, 0, place / "team-b" / "trainer", replicas=1, every=5)
        fetched = "sum(tierkeep_object_fetched_bytes_total)"
        until("it goes on from the bucket", lambda: has(fetched, 1))
        tiers = "count(tierkeep_step{run=~'.*/team-b/.*'})"
        until("it is in all tiers", lambda: has(tiers, 4))
        until("there are samples", lambda: time.time() - story.began > HEALTHY)
        until("nothing is wrong", lambda: not server.alerts())
        story.healthy = time.time()

        agents[2].stop(signal.SIGKILL)
        bucket.close()
        stack.enter_context(refusing(int(options["aws_endpoint"].rsplit(":", 1)[1])))
        awaited = {f"Tierkeep{name}" for name in PROVOKED}
        until("alerts", lambda: awaited <= {a["labels"]["alertname"] for a in server.alerts()})
        until("there are samples", lambda: time.time() - story.healthy > ILL)
        story.ended = time.time()
        yield story
