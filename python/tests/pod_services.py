"""What pods find in a cluster beside each other: names of services, and the API server's keys.

Both are threads of the test's own process, whose sockets lie in another network namespace.
"""

from __future__ import annotations

import ctypes
import json
import os
import socketserver
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from lab import HUB
from tokens import Cluster as Signer

DOMAIN = "cluster.local"
API_NAME = "kubernetes.default.svc"
API_AUDIENCE = "https://kubernetes.default.svc.cluster.local"
_NEW_NET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_A, _NAME_ERROR = 1, 3

T = TypeVar("T")


def inside(namespace: str, do: Callable[[], T]) -> T:
    """What `do` gives, done in a network namespace: by a thread of its own, which ends with it."""

    def work() -> T:
        with open(f"/run/netns/{namespace}") as there:
            if _LIBC.setns(there.fileno(), _NEW_NET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {namespace}")
        return do()

    with ThreadPoolExecutor(1) as one:
        return one.submit(work).result()


class Served:
    """A server of threads, until `end`."""

    def __init__(self, server: socketserver.BaseServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# -- names --------------------------------------------------------------------------------------


def answer(asked: bytes, find: Callable[[str], list[str] | None]) -> bytes:
    """A name server's answer: IPv4 addresses, or that there is no such name."""
    labels, at = [], 12
    while length := asked[at]:
        labels.append(asked[at + 1 : at + 1 + length].decode())
        at += 1 + length
    [kind] = struct.unpack(">H", asked[at + 1 : at + 3])
    found = find(".".join(labels).lower())
    addresses = found if found and kind == _A else []
    flags = 0x8580 | (_NAME_ERROR if found is None else 0)
    head = asked[:2] + struct.pack(">5H", flags, 1, len(addresses), 0, 0)
    record = struct.pack(">HHHIH", 0xC00C, _A, 1, 5, 4)
    parts = (record + bytes(int(n) for n in address.split(".")) for address in addresses)
    return head + asked[12 : at + 5] + b"".join(parts)


def serve_names(namespace: str, find: Callable[[str], list[str] | None]) -> Served:
    """At `HUB`, port 53; `find` gives the addresses of a name, None where there is no such name."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked, socket = self.request
            socket.sendto(answer(asked, find), self.client_address)

    return Served(inside(namespace, lambda: socketserver.ThreadingUDPServer((HUB, 53), Handler)))


# -- the API server -----------------------------------------------------------------------------


class Api:
    """Signs tokens of service accounts, and publishes its keys to who shows one for itself."""

    def __init__(self, place: Path, namespace: str) -> None:
        place.mkdir()
        self._place = place
        self._signer = Signer(place / "signer")
        self._known: set[str] = set()
        self._certificates()
        self.authority = (place / "ca.crt").read_bytes()
        self._served = Served(inside(namespace, self._server))

    def end(self) -> None:
        self._served.end()

    def token(self, namespace: str, account: str, pod: str, node: str, audience: str) -> str:
        """As the kubelet asks for one in a pod's name."""
        bound = {"namespace": namespace, "serviceaccount": {"name": account, "uid": "s"}}
        bound |= {"pod": {"name": pod, "uid": pod}, "node": {"name": node, "uid": node}}
        claims = {"aud": [audience or API_AUDIENCE], "kubernetes.io": bound}
        made = self._signer.token(namespace, account, **claims)
        if not audience:
            self._known.add(f"Bearer {made}")
        return made

    def _certificates(self) -> None:
        curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        for words in (
            f"req -x509 {curve} -keyout ca.key -out ca.crt -subj /CN=kubernetes -days 2",
            f"req {curve} -keyout tls.key -out tls.csr -subj /CN=apiserver",
            "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out tls.crt -days 2 "
            "-extfile names",
        ):
            (self._place / "names").write_text(f"subjectAltName=DNS:{API_NAME}\n")
            command = ["openssl", *words.split()]
            subprocess.run(command, cwd=self._place, check=True, capture_output=True)

    def _server(self) -> ThreadingHTTPServer:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = self.headers.get("Authorization") in api._known
                is_there = self.path == "/openid/v1/jwks"
                code = 200 if is_known and is_there else 404 if is_known else 401
                status = json.dumps({"kind": "Status", "code": code}).encode()
                body = api._signer.keys.read_bytes() if code == 200 else status
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer((HUB, 443), Handler)
        secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        secure.load_cert_chain(self._place / "tls.crt", self._place / "tls.key")
        server.socket = secure.wrap_socket(server.socket, server_side=True)
        return server


# -- files that come and go whole ---------------------------------------------------------------


class Projection:
    """A directory of files as the kubelet writes it for a pod: what is in it changes all at once,
    by a link (`..data`), and what is new is a new file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True)
        self._count = 0

    def write(self, files: dict[str, tuple[bytes, int]], owner: int, group: int | None) -> None:
        """`files`: contents and mode by path. With a group everything is readable by it."""
        self._count += 1
        new = self.place / f"..{self._count:08}"
        for path, (content, mode) in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
            os.chown(new / path, owner, 0 if group is None else group)
            (new / path).chmod(mode if group is None else mode | 0o440)
        for folder in (self.place, new, *(p for p in new.rglob("*") if p.is_dir())):
            folder.chmod(0o755)
            if group is not None:
                os.chown(folder, 0, group)
                folder.chmod(0o2775)
        link = self.place / "..data_tmp"
        link.symlink_to(new.name)
        link.rename(self.place / "..data")
        for name in {path.split("/")[0] for path in files}:
            if not (self.place / name).is_symlink():
                (self.place / name).symlink_to(f"..data/{name}")
