"""A server that speaks S3, for tests and to play with."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

KEY, SECRET = "tierkeep", "tierkeep-secret"
BUCKET = "bucket"

_IDENTITY = (
    '{"identities":[{"name":"t","credentials":[{"accessKey":"%s","secretKey":"%s"}],'
    '"actions":["Admin","Read","Write","List","Tagging"]}]}'
)


class Reached(dict[str, str]):
    """What a server is reached with, as `storage_options`; and its process."""

    def __init__(self, pid: int, **options: str) -> None:
        super().__init__(options)
        self.pid = pid


def _free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def ports(count: int) -> list[int]:
    """Free ones, and free 10,000 above, where the server has gRPC.

    Below those that the kernel gives to whoever connects: they stay free until the server is there.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 19_000)
        if port not in found and _free(port) and _free(port + 10_000):
            found.append(port)
    return found


def _weed() -> str:
    weed = Path(sys.executable).with_name("weed")
    assert weed.exists(), f"{weed} is not there: `make setup` installs it"
    return str(weed)


@contextlib.contextmanager
def s3(
    directory: Path,
    volumes: int = 30,
    *,
    ip: str = "127.0.0.1",
    within: Sequence[str] = (),
    bucket: str = BUCKET,
) -> Iterator[Reached]:
    """A server with an empty bucket, for as many GB as it has `volumes`.

    `within`: the words that run a command where it is to be, with the address `ip`. Gives what it
    is reached with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    identities = directory / "s3.json"
    identities.write_text(_IDENTITY % (KEY, SECRET))
    master, volume, filer, port = ports(4)
    command = [
        *within, _weed(), "server", f"-ip={ip}", f"-ip.bind={ip}", f"-dir={directory}",
        f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={port}", f"-s3.config={identities}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024", f"-volume.max={volumes}",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _make_bucket(server, within, (ip, master, port), directory / "log", bucket)
        yield Reached(
            server.pid,
            aws_endpoint=f"http://{ip}:{port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            aws_region="us-east-1",
        )
    finally:
        server.kill()
        server.wait()


def _make_bucket(
    server: subprocess.Popen[bytes],
    within: Sequence[str],
    at: tuple[str, int, int],
    log: Path,
    bucket: str,
) -> None:
    ip, master, port = at
    end = time.monotonic() + 60
    made = ""
    connect = f"import socket; socket.create_connection(({ip!r}, {port}), 1)"
    while time.monotonic() < end and server.poll() is None:
        there = subprocess.run([*within, sys.executable, "-c", connect], capture_output=True)
        if there.returncode == 0:
            shell = [*within, _weed(), "shell", f"-master={ip}:{master}"]
            asked = f"s3.bucket.create -name {bucket}\ns3.bucket.list\n"
            made = subprocess.run(shell, input=asked, capture_output=True, text=True).stdout
            if f"\n  {bucket}\t" in made:
                return
        time.sleep(0.1)
    raise AssertionError(f"no bucket: {made}\n{log.read_text()[-4000:]}")
