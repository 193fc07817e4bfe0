"""A cluster on one machine: each node is a network namespace with memory and a disk of its own.

    python python/tests/lab.py --nodes 4

The nodes are joined by a bridge, which lies in a namespace too: the machine's own network is not
touched. Every node has the same paths (`here/...`), each in its own mounts: what one node writes no
other sees. Needs root, or the rights to make namespaces and mounts, and `ip`, `tc`, `nsenter`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).with_name("tierkeep"))
GOSSIP_PORT = 9178
# Where no node is: a store that all of them reach, say.
HUB = "10.77.255.1"
TOOLS = ("ip", "tc", "nsenter", "unshare", "mount")


class LabUnavailableError(Exception):
    """This machine has no rights, or no tools, for a lab."""


def run(*command: str) -> str:
    """Runs a tool of the host's; its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabUnavailableError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


class Node:
    """One host: `here` is its directory, by the same path as on all other nodes."""

    def __init__(self, lab: Lab, index: int) -> None:
        self.lab = lab
        self.name = f"n{index}"
        self.namespace = f"{lab.word}-{self.name}"
        self.address = f"10.77.{index // 250}.{index % 250 + 1}"
        # As the host sees it; on the node it is `lab.here`.
        self.root = lab.root / self.name
        self.processes: list[subprocess.Popen[Any]] = []
        self.labels: dict[str, str] = {}
        self._holder: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Plugs it in."""
        self.root.mkdir()
        hub, plug = self.lab.hub, f"v{self.name}"
        run("ip", "netns", "add", self.namespace)
        pair = ("type", "veth", "peer", "name", plug, "netns", hub)
        run("ip", "-n", self.namespace, "link", "add", "eth0", *pair)
        run("ip", "-n", hub, "link", "set", plug, "master", "br0", "up")
        run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/16", "dev", "eth0")
        run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        # A process that holds the mounts for as long as the node is there.
        hold = (
            f"mount --make-rprivate / && mount --bind {self.root} {self.lab.here} && "
            f"mkdir -p {self.lab.here}/ram {self.lab.here}/disk && {self._mount()} && "
            "echo ready && exec sleep infinity"
        )
        self._holder = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "sh", "-c", hold],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline().strip() != "ready":
            assert self._holder.stderr is not None
            raise LabUnavailableError(f"{self.name}: {self._holder.stderr.read().strip()}")

    def _mount(self) -> str:
        size = f"size={self.lab.ram_mib}m"
        return f"mount -t tmpfs -o {size} tierkeep-lab {self.lab.here}/ram"

    @property
    def pid(self) -> int:
        """The process that holds its mounts."""
        assert self._holder is not None
        return self._holder.pid

    def command(self, *command: str) -> list[str]:
        """The words that run a command on this node."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--net", "--", *command]

    def start(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Starts a process on it."""
        process = subprocess.Popen(self.command(*command), **options)
        self.processes.append(process)
        return process

    def run(self, *command: str) -> str:
        """Runs a command on it; its output."""
        return run(*self.command(*command))

    # -- its agent ---------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.root / "agent.log"

    @property
    def socket(self) -> str:
        """As trainers on it find it."""
        return f"{self.lab.here}/agent.sock"

    def start_agent(self, **settings: str) -> subprocess.Popen[Any]:
        """Starts `tierkeep agent`, and waits until it serves trainers."""
        seeds = ",".join(f"{node.address}:{GOSSIP_PORT}" for node in self.lab.nodes)
        lines = {
            "gossip": f"{self.address}:{GOSSIP_PORT}",
            "seeds": seeds,
            "node": self.name,
            "cluster_key": f"{self.lab.here}/cluster.key",
            "ram_dir": f"{self.lab.here}/ram/tierkeep",
            "socket": self.socket,
            **self.lab.transport,
            **settings,
        }
        (self.root / "cluster.key").write_text(self.lab.key)
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        if self.labels:
            text += "[labels]\n" + "".join(f'{k} = "{v}"\n' for k, v in self.labels.items())
        (self.root / "agent.toml").write_text(text)
        (self.root / "agent.sock").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            agent = self.start(
                COMMAND, "agent", "--config", f"{self.lab.here}/agent.toml", stdout=log, stderr=log
            )
        end = time.monotonic() + 20
        while not (self.root / "agent.sock").exists():
            if agent.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} has no agent: {self.log.read_text()}")
            time.sleep(0.01)
        return agent

    def status(self) -> Any:
        """`tierkeep status --cluster` there."""
        text = self.run(COMMAND, "status", "--cluster", "--json", "--agent", self.socket)
        return json.loads(text)

    # -- what happens to it ------------------------------------------------------------------

    def cut(self) -> None:
        """Its cable is out."""
        run("ip", "-n", self.lab.hub, "link", "set", f"v{self.name}", "down")

    def mend(self) -> None:
        """Its cable is in again."""
        run("ip", "-n", self.lab.hub, "link", "set", f"v{self.name}", "up")

    def kill(self) -> None:
        """Every process on it dies at once."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(20)
        self.processes.clear()

    def lose(self) -> None:
        """It is gone, with memory and disk: the others hear nothing of it, not even its end."""
        self.cut()
        self.kill()

    def replace(self) -> None:
        """Another host in its place: the same name and address, and nothing on it."""
        self.run("sh", "-c", f"umount {self.lab.here}/ram && rm -rf {self.lab.here}/disk")
        self.run("sh", "-c", f"mkdir {self.lab.here}/disk && {self._mount()}")
        self.mend()

    def end(self) -> None:
        self.kill()
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait(20)
        with contextlib.suppress(LabUnavailableError):
            run("ip", "netns", "del", self.namespace)


class Lab:
    """Nodes, joined by a bridge; gone at the end, with all that was on them."""

    def __init__(self, nodes: int, ram_mib: int = 1024, transport: dict[str, str] | None = None):
        self.word = f"tklab{os.getpid()}{secrets.token_hex(2)}"
        self.hub = f"{self.word}-hub"
        self.ram_mib = ram_mib
        self.transport = {"insecure": "true"} if transport is None else transport
        self.key = secrets.token_hex(16)
        self.root = Path(tempfile.mkdtemp(prefix="tierkeep-lab-"))
        self.here = self.root / "here"
        self.here.mkdir()
        self.nodes: list[Node] = []
        self._count = nodes

    def __enter__(self) -> Lab:
        try:
            check()
            run("ip", "netns", "add", self.hub)
            # An address of its own: it takes the lowest of its ports' otherwise, another one as
            # nodes come and go, and what the others send to it is lost until they ask again.
            bridge = ("br0", "address", "02:00:0a:4d:ff:01", "type", "bridge")
            run("ip", "-n", self.hub, "link", "add", *bridge)
            run("ip", "-n", self.hub, "link", "set", "br0", "up")
            run("ip", "-n", self.hub, "addr", "add", f"{HUB}/16", "dev", "br0")
            run("ip", "-n", self.hub, "link", "set", "lo", "up")
            self.add(self._count)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.end()
        with contextlib.suppress(LabUnavailableError):
            run("ip", "netns", "del", self.hub)
        shutil.rmtree(self.root, ignore_errors=True)

    def add(self, count: int = 1) -> list[Node]:
        """More nodes."""
        new = [Node(self, len(self.nodes) + index) for index in range(count)]
        for node in new:
            self.nodes.append(node)
            node.begin()
        return new

    def start_agents(self, **settings: str) -> None:
        """An agent on each node; returns when all see all."""
        for node in self.nodes:
            node.start_agent(**settings)
        self.gathered(self.nodes)

    def gathered(self, nodes: Sequence[Node], within: float = 20) -> None:
        """Waits until these nodes see each other, and nobody else."""
        wanted = sorted(node.name for node in nodes)
        end = time.monotonic() + within
        for node in nodes:
            while (seen := [member["name"] for member in node.status()["members"]]) != wanted:
                if time.monotonic() > end:
                    raise TimeoutError(f"{node.name} sees {seen}, not {wanted}")
                time.sleep(0.05)

    def limit(self, mbit: int) -> None:
        """Links are this fast from here on, in each direction."""
        shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "1mb", "latency", "100ms")
        for node in self.nodes:
            run("tc", "-n", node.namespace, "qdisc", "replace", "dev", "eth0", *shape)
            run("tc", "-n", self.hub, "qdisc", "replace", "dev", f"v{node.name}", *shape)


def check() -> None:
    """Raises LabUnavailableError, with what is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LabUnavailableError(f"{', '.join(missing)} not found: `make lab-tools` installs them")
    if os.geteuid() != 0:
        raise LabUnavailableError("namespaces and mounts want root")


@contextlib.contextmanager
def lab(nodes: int, **options: Any) -> Iterator[Lab]:
    """A lab with an agent on each node."""
    with Lab(nodes, **options) as made:
        made.start_agents()
        yield made


def main() -> int:
    parser = argparse.ArgumentParser(description="Start a cluster of agents to play with.")
    parser.add_argument("--nodes", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--mbit", type=int, help="speed of each link; default: as fast as it goes")
    wishes = parser.parse_args()
    try:
        with lab(wishes.nodes) as made:
            if wishes.mbit:
                made.limit(wishes.mbit)
            print(f"{wishes.nodes} nodes; on each, {made.here} is its own. A shell on one of them:")
            for node in made.nodes:
                print(f"  {node.name} at {node.address}:  {' '.join(node.command('bash'))}")
            print(f"There, as in:  {COMMAND} status --cluster --agent {made.nodes[0].socket}")
            print("Ctrl-C ends it all.")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    except LabUnavailableError as e:
        print(f"error: no lab here: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
