"""The object tier beside the clients that the registries have, against one real server here.

One shard of `--gib` GiB goes up from disk and comes back to disk, by each client in turn,
`--rounds` times; seconds, and the client's own CPU. Then a shard of `--far-gib` GiB through a proxy
that is as a distant store: each answer comes `--latency` ms late, and a connection carries no more
than `--far-mb` MB/s, with one request at a time and with 64. Large stores give a connection 50 to
90 MB/s; here it is less, so that 64 of them are not held up by this machine. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "python" / "tests"))

import servers

BIN = Path(sys.executable).parent

_BOTO3 = """
import sys, boto3
way, file, key = sys.argv[1:]
client = boto3.client("s3")
if way == "up":
    client.upload_file(file, "bucket", key)
else:
    client.download_file("bucket", key, file)
"""

_S3FS = """
import os, sys, s3fs
way, file, key = sys.argv[1:]
fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
fs.put(file, "bucket/" + key) if way == "up" else fs.get("bucket/" + key, file)
"""

_SAVE = """
import sys, numpy as np, tierkeep
run, ram, gib = sys.argv[1], sys.argv[2], float(sys.argv[3])
words = np.random.default_rng(7).integers(0, 2**63, int(gib * 2**27), dtype=np.uint64)
with tierkeep.Checkpointer(run, ram_dir=ram, agent=False) as ckpt:
    ckpt.restore({"w": words})
    ckpt.save(1, {"w": words}).wait("disk")
"""


def ran(command: list[str | Path], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds, and seconds of the client's CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    took = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, cpu


class Far:
    """A proxy as a distant server: answers are late, and a connection carries so much a second."""

    def __init__(self, upstream: int, seconds: float, rate: float) -> None:
        self.upstream, self.seconds, self.rate = upstream, seconds, rate
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.upstream))
            asked = threading.Event()
            for ends in ((client, server, asked, False), (server, client, asked, True)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(
        self, source: socket.socket, sink: socket.socket, asked: threading.Event, answers: bool
    ) -> None:
        due = 0.0
        try:
            while data := source.recv(1 << 16):
                # Once an answer: what follows, until something is asked again, belongs to it.
                if not answers:
                    asked.set()
                elif asked.is_set():
                    asked.clear()
                    time.sleep(self.seconds)
                now = time.monotonic()
                due = max(due, now) + len(data) / self.rate
                time.sleep(due - now)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=50, help="ms")
    parser.add_argument("--far-gib", type=float, default=2)
    parser.add_argument("--far-mb", type=float, default=5, help="MB/s of one connection")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tierkeep-bench-"))
    try:
        print(json.dumps(measure(work, args), indent=1))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save(work: Path, gib: float) -> Path:
    """A checkpoint on disk; its payload."""
    ram = tempfile.mkdtemp(prefix="tierkeep-bench-", dir="/dev/shm")
    try:
        run = work / "run"
        subprocess.run([sys.executable, "-c", _SAVE, run, ram, str(gib)], check=True)
    finally:
        shutil.rmtree(ram)
    return next(run.glob("*/*/rank-*.safetensors"))


class Clients:
    """The clients, each by its name: a way and a key; seconds, and seconds of CPU."""

    def __init__(self, work: Path, payload: Path, options: dict[str, str]) -> None:
        self.run, self.payload, self.back = work / "run", payload, work / "back"
        self.environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": options["aws_endpoint"],
            "AWS_ACCESS_KEY_ID": options["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": options["aws_secret_access_key"],
            "AWS_REGION": options["aws_region"],
            "AWS_DEFAULT_REGION": options["aws_region"],
            "TIERKEEP_RAM_DIR": str(work / "no-ram"),
        }
        self.all: dict[str, Callable[[str, str], tuple[float, float]]] = {
            "tierkeep": self.ours,
            "boto3": self._script(_BOTO3),
            "awscli": self._aws,
            "s3fs": self._script(_S3FS),
        }

    def ours(self, way: str, key: str, **more: str) -> tuple[float, float]:
        far, near = f"s3://bucket/{key}/run", self.back / "run"
        source, to = (self.run, far) if way == "up" else (far, near)
        command: list[str | Path] = [BIN / "tierkeep", "restore", source, "--to", str(to)]
        return ran(command, {**self.environment, **more})

    def _script(self, text: str) -> Callable[[str, str], tuple[float, float]]:
        def go(way: str, key: str) -> tuple[float, float]:
            file = self.payload if way == "up" else self.back / "file"
            return ran([sys.executable, "-c", text, way, str(file), key], self.environment)

        return go

    def _aws(self, way: str, key: str) -> tuple[float, float]:
        far = f"s3://bucket/{key}"
        ends = (str(self.payload), far) if way == "up" else (far, str(self.back / "file"))
        return ran([BIN / "aws", "s3", "cp", "--quiet", *ends], self.environment)

    def clear(self) -> None:
        shutil.rmtree(self.back, ignore_errors=True)
        self.back.mkdir()


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    payload = save(work, args.gib)
    size = payload.stat().st_size
    times: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number in range(args.rounds):
        # A server for each: what is deleted in one does not free its disk.
        with servers.s3(work / "s3", volumes=30) as options:
            clients = Clients(work, payload, options)
            for name, client in clients.all.items():
                for way in ("up", "down"):
                    clients.clear()
                    took = client(way, f"{name}-{number}")
                    times.setdefault(name, {}).setdefault(way, []).append(took)
        shutil.rmtree(work / "s3")
    gb = size / 1e9
    result: dict[str, Any] = {"bytes": size, "rounds": args.rounds}
    for way in ("up", "down"):
        table = {}
        for name, seen in times.items():
            seconds = statistics.median(took for took, _ in seen[way])
            cpu = statistics.median(cpu for _, cpu in seen[way])
            table[name] = {
                "seconds": round(seconds, 2),
                "gb_per_s": round(gb / seconds, 3),
                "cpu_s_per_gb": round(cpu / gb, 3),
            }
        others = [row for name, row in table.items() if name != "tierkeep"]
        best = max(row["gb_per_s"] for row in others)
        result[way] = {
            **table,
            "against_the_best": round(table["tierkeep"]["gb_per_s"] / best, 3),
            "cpu_of_the_leanest": min(row["cpu_s_per_gb"] for row in others),
        }
    with servers.s3(work / "s3", volumes=30) as options:
        result["far"] = far(work, options, args)
    return result


def far(work: Path, options: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """How much 64 requests at a time win over one, where the store is far away.

    One request gets a sixteenth of the bytes: MB/s are compared.
    """
    upstream = int(options["aws_endpoint"].rsplit(":", 1)[1])
    proxy = Far(upstream, args.latency / 1000, args.far_mb * 1e6)
    seen: dict[str, Any] = {
        "latency_ms": args.latency,
        "mb_per_s_of_a_connection": args.far_mb,
    }
    for requests, gib in ((1, args.far_gib / 16), (64, args.far_gib)):
        shutil.rmtree(work / "run", ignore_errors=True)
        payload = save(work, gib)
        clients = Clients(work, payload, options)
        for way in ("up", "down"):
            clients.clear()
            took, _ = clients.ours(
                way,
                f"far-{requests}",
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}",
                TIERKEEP_OBJECT_REQUESTS_MAX=str(requests),
            )
            rate = payload.stat().st_size / took / 1e6
            seen[f"{way}_{requests}_mb_per_s"] = round(rate, 1)
    for way in ("up", "down"):
        gain = seen[f"{way}_64_mb_per_s"] / seen[f"{way}_1_mb_per_s"]
        seen[f"{way}_gain"] = round(gain, 2)
    return seen


if __name__ == "__main__":
    main()
