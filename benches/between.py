"""What the scripts that measure between nodes share: savers, iperf3, certificates, agents' logs.

Nodes are network namespaces of this machine (python/tests/lab.py), so all of them share its cores.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

from lab import Lab, Node, run

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")


class Saver:
    """A rank of its own on a node (`saver.py`)."""

    def __init__(self, lab: Lab, node: Node, size: int, replicas: int, name: str = "run") -> None:
        command = [sys.executable, str(HERE / "saver.py"), f"{lab.here}/disk/{name}", node.socket]
        self.process = node.start(
            *command,
            str(size),
            str(replicas),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = f"the rank on {node.name}"
        self.begun = self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} died")
        return dict(json.loads(line))

    def try_save(self) -> dict[str, Any]:
        """Saves; `seconds` until the copies were there, or the `error`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._hear()

    def save(self) -> float:
        """Saves; seconds until the copies were there."""
        said = self.try_save()
        assert "error" not in said, said
        return float(said["seconds"])


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def iperf(server: Node, client: Node, seconds: int = 3, streams: int = 4) -> tuple[float, float]:
    """Bytes a second, and CPU seconds a GB of both ends."""
    serving = server.start("iperf3", "-s", "-1", stdout=subprocess.DEVNULL)
    time.sleep(0.3)
    text = client.run("iperf3", "-c", server.address, "-t", str(seconds), "-P", str(streams), "-J")
    serving.wait(20)
    server.processes.remove(serving)
    data = json.loads(text)["end"]
    load = data["cpu_utilization_percent"]
    received = data["sum_received"]
    spent = (load["host_total"] + load["remote_total"]) / 100 * received["seconds"]
    return received["bits_per_second"] / 8, spent / (received["bytes"] / 1e9)


# Of openssl's own settings nothing is taken: they differ from one distribution to the next.
OPENSSL = """
[req]
distinguished_name = name
prompt = no
[name]
CN = tierkeep lab
[authority]
basicConstraints = critical, CA:TRUE
subjectKeyIdentifier = hash
[agent]
basicConstraints = critical, CA:FALSE
subjectAltName = DNS:tierkeep
"""


def certificates(place: Path) -> dict[str, str]:
    """An agent's settings for mTLS; the files are made in `place`, for a day.

    One certificate serves all agents of a lab: they ask each other for the authority's word and
    the cluster's name, not for a host's.
    """
    config, ca, cert = place / "openssl.cnf", place / "ca", place / "agent"
    config.write_text(OPENSSL)
    new = ["openssl", "req", "-x509", "-config", str(config), "-days", "1", "-nodes"]
    new += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    for name, more in (
        (ca, ["-extensions", "authority"]),
        (cert, ["-extensions", "agent", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key"]),
    ):
        run(*new, "-keyout", f"{name}.key", "-out", f"{name}.pem", *more)
    return {"tls_cert": f"{cert}.pem", "tls_key": f"{cert}.key", "tls_ca": f"{ca}.pem"}


@dataclass(frozen=True)
class Death:
    """An agent that counts as dead, as another one's log tells it."""

    at: float
    teller: str
    name: str


# As in "2026-11-28T06:07:00.123456Z  WARN tierkeep_agent::cluster: n3 is gone, which was at ...".
GONE = re.compile(r"^(\S+Z) .*: (\S+) is gone, which was at ")


class Logs:
    """What agents tell their logs from here on."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._begin = [(node, node.log.stat().st_size) for node in nodes]

    def deaths(self) -> list[Death]:
        """Who is gone, as each of them saw it; in no order."""
        found = []
        for node, offset in self._begin:
            with node.log.open("rb") as log:
                log.seek(offset)
                for line in log.read().decode(errors="replace").splitlines():
                    if told := GONE.match(line):
                        at = datetime.fromisoformat(told[1]).timestamp()
                        found.append(Death(at, node.name, told[2]))
        return found


def turn(things: Sequence[T], round_: int) -> list[T]:
    """The same things, with another one first in each round."""
    first = round_ % len(things)
    return [*things[first:], *things[:first]]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
    }


def say(text: str) -> None:
    """What goes on, for whoever waits: figures go to stdout."""
    print(text, file=sys.stderr, flush=True)


def begin() -> None:
    """Before the first lab: agents tell who is gone, and a SIGTERM ends labs as well."""
    os.environ["TIERKEEP_LOG"] = "info"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
