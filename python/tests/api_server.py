"""An API server for tests, over TLS: one Node, read, watched and annotated as on Kubernetes.

What it does of server-side apply is what concerns annotations: each value has the managers that
want it, another value by somebody else is a conflict, and what nobody wants any more goes.
"""

from __future__ import annotations

import copy
import json
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tokens import Cluster

TOKEN = "of-the-agents-pod"
MANAGER = "tierkeep-agent"


class ApiServer:
    """``url`` and ``dir`` are what a pod is given to reach it; ``keys`` are the cluster's."""

    def __init__(self, place: Path, name: str, keys: Cluster | None = None) -> None:
        place.mkdir()
        self.dir, self.name, self._keys = place, name, keys
        new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        self._openssl(*new, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")
        self._openssl(
            *new, "-subj", "/CN=kubernetes", "-addext", "subjectAltName=IP:127.0.0.1",
            "-addext", "basicConstraints=critical,CA:FALSE", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-keyout", "key.pem", "-out", "cert.pem",
        )  # fmt: skip
        (place / "token").write_text(TOKEN + "\n")
        for path in (place, place / "ca.crt", place / "token"):
            path.chmod(0o755)
        self._changed = threading.Condition()
        self._version = 1
        self._spec: dict[str, Any] = {}
        self._labels: dict[str, str] = {}
        #: Annotations by key: the value, and who wants it.
        self._annotations: dict[str, tuple[str, set[str]]] = {}
        self._deleted = False
        #: Requests by what they are, and tokens that were wrong.
        self.asked: dict[str, int] = {}
        self.strangers = 0
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def settings(self, *more: str) -> list[str]:
        """The flags of an agent that asks it."""
        flags = ["--node-watch", "kubernetes", "--node", self.name, *more]
        return [*flags, "--kubernetes-api", self.url, "--kubernetes-dir", str(self.dir)]

    def _openssl(self, *args: str) -> None:
        command = ["openssl", *args]
        subprocess.run(command, cwd=self.dir, check=True, capture_output=True)

    # What a cluster does with a Node.

    def spec(self, **spec: Any) -> None:
        """The Node's spec is this from now on."""
        with self._change():
            self._spec = spec

    def taint(self, *keys: str) -> None:
        self.spec(taints=[{"key": key, "effect": "NoSchedule"} for key in keys])

    def label(self, **labels: str) -> None:
        with self._change():
            self._labels = {key.replace("__", "/"): value for key, value in labels.items()}

    def annotate(self, key: str, value: str, manager: str = "kubectl") -> None:
        with self._change():
            wanted = self._annotations.get(key, (value, set()))
            same = wanted[1] if wanted[0] == value else set()
            self._annotations[key] = (value, same | {manager})

    def delete(self) -> None:
        with self._change():
            self._deleted = True

    def annotations(self) -> dict[str, str]:
        with self._changed:
            return {key: value for key, (value, _) in self._annotations.items()}

    def _change(self) -> _Change:
        return _Change(self)

    def _node(self) -> dict[str, Any]:
        metadata = {"name": self.name, "labels": dict(self._labels)}
        metadata |= {"resourceVersion": str(self._version)}
        values = {key: value for key, (value, _) in self._annotations.items()}
        metadata |= {"annotations": values} if values else {}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": self._spec}
        return copy.deepcopy(node)

    # How it is reached.

    def start(self) -> None:
        """At the port that it had before, if it had one."""
        server = _Server(("127.0.0.1", self._port), _handler(self))
        server.daemon_threads = True
        self._port = server.server_address[1]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.dir / "cert.pem", self.dir / "key.pem")
        # Hands are shaken on the connection's own thread: one that is silent holds up nobody.
        wrap = {"server_side": True, "do_handshake_on_connect": False}
        server.socket = context.wrap_socket(server.socket, **wrap)
        self._server = server
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()

    def stop(self) -> None:
        """It is away: connections end, new ones are refused."""
        server, self._server = self._server, None
        assert server is not None
        server.shutdown()
        server.server_close()
        with self._changed:
            self._changed.notify_all()

    def answer(self, method: str, target: str, body: bytes, send: Callable[..., None]) -> None:
        at = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(at.query).items()}
        what = f"{method} {at.path}" + (" watch" if "watch" in query else "")
        with self._changed:
            self.asked[what] = self.asked.get(what, 0) + 1
        if at.path == "/openid/v1/jwks" and self._keys is not None:
            send(200, self._keys.keys.read_bytes())
        elif what == "GET /api/v1/nodes watch":
            assert query["fieldSelector"] == f"metadata.name={self.name}", query
            self._watch(int(query["resourceVersion"]), send)
        elif at.path != f"/api/v1/nodes/{self.name}" or self._deleted:
            send(404, _status(404, f"nodes {at.path.rsplit('/', 1)[1]} not found"))
        elif method == "GET":
            with self._changed:
                node = self._node()
            send(200, json.dumps(node).encode())
        elif method == "PATCH":
            self._apply(json.loads(body), query["fieldManager"], send)

    def _apply(self, wanted: dict[str, Any], manager: str, send: Callable[..., None]) -> None:
        assert set(wanted) == {"apiVersion", "kind", "metadata"}, wanted
        values = wanted["metadata"].get("annotations", {})
        with self._change():
            for key, value in values.items():
                has, managers = self._annotations.get(key, (value, set()))
                if has != value and managers - {manager}:
                    said = f"Apply failed with 1 conflict: .metadata.annotations.{key}"
                    return send(409, _status(409, said))
            for key, value in values.items():
                managers = self._annotations.get(key, (value, set()))[1]
                self._annotations[key] = (value, managers | {manager})
            for key, (_, managers) in list(self._annotations.items()):
                if key not in values:
                    managers.discard(manager)
                    if not managers:
                        del self._annotations[key]
            node = self._node()
        return send(200, json.dumps(node).encode())

    def _watch(self, version: int, send: Callable[..., None]) -> None:
        send(200, None)
        server = self._server
        while True:
            with self._changed:
                while self._version == version and self._server is server:
                    self._changed.wait(60)
                if self._server is not server:
                    return
                version = self._version
                kind = "DELETED" if self._deleted else "MODIFIED"
                line = json.dumps({"type": kind, "object": self._node()})
            send(None, line.encode() + b"\n")


class _Change:
    """A change of the Node, which watches hear of."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server

    def __enter__(self) -> None:
        self._server._changed.acquire()

    def __exit__(self, *_: object) -> None:
        self._server._version += 1
        self._server._changed.notify_all()
        self._server._changed.release()


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True

    def handle_error(self, *_: object) -> None:
        """A client that went away is none."""


def _status(code: int, message: str) -> bytes:
    status = {"kind": "Status", "status": "Failure", "message": message, "code": code}
    return json.dumps(status).encode()


def _handler(api: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 70

        def do_GET(self) -> None:
            if self.headers["authorization"] != f"Bearer {TOKEN}":
                api.strangers += 1
                self._send(401, _status(401, "Unauthorized"))
                return
            length = int(self.headers.get("content-length", 0))
            api.answer(self.command, self.path, self.rfile.read(length), self._send)

        do_PATCH = do_GET

        def _send(self, code: int | None, body: bytes | None) -> None:
            if code is not None:
                self.send_response(code)
                self.send_header("content-type", "application/json")
                if body is not None:
                    self.send_header("content-length", str(len(body)))
                else:
                    self.send_header("connection", "close")
                self.end_headers()
            if body is not None:
                self.wfile.write(body)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
