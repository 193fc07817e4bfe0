"""Jobs over the nodes of a lab, as a launcher runs them: ranks start, are killed, start again."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lab import Lab, Node
from servers import BUCKET

SCRIPT = str(Path(__file__).with_name("lab_job.py"))


class Launcher:
    """Starts ranks on one node. It is the scheduler's: it outlives what happens to the node."""

    def __init__(self, node: Node, heard: queue.Queue[dict[str, Any]]) -> None:
        self.node = node
        self._heard = heard
        self._process = subprocess.Popen(
            node.command(sys.executable, SCRIPT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard.put({"node": self.node.name, **json.loads(line)})

    def start(self, **wish: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.wait(20)


class Job:
    """One run of some ranks, started as often as a test likes."""

    def __init__(
        self, lab: Lab, world: int, replicas: int = 1, run: str = "run", **wishes: Any
    ) -> None:
        self._run = run
        self.lab = lab
        self.world = world
        self.replicas = replicas
        self._wishes = wishes
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._launchers: dict[str, Launcher] = {}
        self._port = 20000
        # Of this start.
        self.pids: dict[int, int] = {}
        self.resumed: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, dict[str, Any]] = {}
        self.failed: list[dict[str, Any]] = []
        # The newest step that some rank was told to be on other nodes, ever.
        self.on_peers = 0
        # And in the bucket.
        self.in_bucket = 0

    def __enter__(self) -> Job:
        for node in self.lab.nodes:
            self._launcher(node)
        ready = 0
        while ready < len(self._launchers):
            ready += self._hear(60)["event"] == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for launcher in self._launchers.values():
            launcher.end()

    def _launcher(self, node: Node) -> Launcher:
        if node.name not in self._launchers:
            self._launchers[node.name] = Launcher(node, self._heard)
        return self._launchers[node.name]

    def _place(self) -> dict[str, Any]:
        return {"destination": f"{self.lab.here}/disk/{self._run}"}

    def start(self, nodes: list[Node], steps: int, **wishes: Any) -> None:
        """Starts all ranks, in turn on these nodes."""
        self._port += 1
        self.pids, self.resumed, self.ended, self.failed = {}, {}, {}, []
        for rank in range(self.world):
            self._launcher(nodes[rank % len(nodes)]).start(
                rank=rank,
                world=self.world,
                master=f"{nodes[0].address}:{self._port}",
                **self._place(),
                agent=nodes[0].socket,
                replicas=self.replicas,
                steps=steps,
                **{**self._wishes, **wishes},
            )
        self.until(lambda: len(self.pids) == self.world, 30, "ranks start")

    def kill(self) -> None:
        """Every rank dies at once."""
        for pid in self.pids.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for pid in self.pids.values():
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.005)
        self.pids = {}
        while not self._heard.empty():
            self._note(self._heard.get())

    def _hear(self, within: float) -> dict[str, Any]:
        said = self._heard.get(timeout=within)
        self._note(said)
        return said

    def _note(self, said: dict[str, Any]) -> None:
        match said["event"]:
            case "started":
                self.pids[said["rank"]] = said["pid"]
            case "resumed":
                self.resumed[said["rank"]] = said
            case "peer":
                self.on_peers = max(self.on_peers, said["step"])
            case "object":
                self.in_bucket = max(self.in_bucket, said["step"])
            case "end":
                self.ended[said["rank"]] = said
            case "failed":
                self.failed.append(said)

    def until(self, there: Any, within: float, what: str) -> None:
        """Listens until something is there."""
        end = time.monotonic() + within
        while not there():
            assert not self.failed, self.failed
            left = end - time.monotonic()
            try:
                self._hear(max(0.01, min(left, 1)))
            except queue.Empty:
                assert left > 0, (what, self.resumed, self.ended, self.logs())

    def listen(self, seconds: float) -> None:
        """Listens for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                self._hear(left)
            except queue.Empty:
                return

    def has_resumed(self, within: float = 60) -> int:
        """Where all ranks went on."""
        self.until(lambda: len(self.resumed) == self.world, within, "ranks resume")
        steps = {said["step"] for said in self.resumed.values()}
        assert len(steps) == 1, self.resumed
        return int(steps.pop())

    def has_ended(self, within: float = 120) -> None:
        self.until(lambda: len(self.ended) == self.world, within, "ranks end")

    def logs(self) -> str:
        """The ends of all agents' logs."""
        tail = "\n".join
        logs = ((n.name, n.log.read_text().splitlines()[-12:]) for n in self.lab.nodes)
        return "\n".join(f"--- {name}\n{tail(lines)}" for name, lines in logs)


class BucketJob(Job):
    """One whose run is in a bucket, behind the disks of the nodes or without them."""

    def __init__(
        self, lab: Lab, world: int, options: dict[str, str], has_disk: bool, **wishes: Any
    ):
        super().__init__(lab, world, has_disk=has_disk, **wishes)
        self.url = f"s3://{BUCKET}/{lab.word}-{has_disk}/run"
        self._bucket: dict[str, Any] = {"storage_options": options}
        if has_disk:
            self._bucket["disk"] = f"{lab.here}/disk"

    def _place(self) -> dict[str, Any]:
        return {"destination": self.url, "bucket": self._bucket}


def copies(lab: Lab, step: int, world: int) -> list[int]:
    """How many nodes hold each rank's shard of a step in RAM, whole as it seems."""
    found = [0] * world
    for node in lab.nodes:
        listing = node.run("sh", "-c", f"ls -1 {lab.here}/ram/tierkeep/*/{step:020}/* || true")
        for rank in range(world):
            names = (f"rank-{rank:06}.json", f"rank-{rank:06}-")
            found[rank] += all(name in listing for name in names)
    return found
