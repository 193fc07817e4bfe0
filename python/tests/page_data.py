"""What an agent says behind its status page, made up: `/status.json` in all kinds of states.

`test_page.py` compares its form with what a real agent says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

HTML = Path(__file__).parents[2] / "node-agent" / "src" / "service" / "page.html"
# As the agent sends it (`test_page.py` compares).
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NOW_MS = 1_790_000_000_000
RUN = "/shared/runs/gpt-7b"

_COUNTERS = (
    "saves", "saves_failed", "saves_skipped", "captured_bytes", "captured_s", "disk_bytes",
    "disk_s", "disk_sealed", "disk_passed_over", "checksum_failures", "repairs", "peer_bytes",
    "peer_s", "peer_whole", "peer_failed", "peer_refused", "peer_fetched_bytes", "object_bytes",
    "object_s", "object_sealed", "object_passed_over", "object_failed", "object_fetched_bytes",
)  # fmt: skip


def rank(
    number: int = 0,
    ram: int | None = 100,
    disk: int | None = 90,
    *,
    peer: int | None = None,
    copies: tuple[int, int] = (0, 0),
    counters: dict[str, int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One rank; `copies`: how many are there, of how many that are wanted."""
    made: dict[str, Any] = {
        "destination": RUN, "rank": number, "world": 1, "uid": 1000, "pid": 4711 + number,
        "gone_s": None, "attempt": 1, "ram_step": ram, "disk_step": disk, "peer_step": peer,
        "copies_wanted": copies[1], "copies_there": copies[0], "carrying": None, "busy": False,
        "slot_bytes": 3 << 30, "trouble": None, "bucket": None, "object_step": None,
        "sending": None, "object_next": None, "object_trouble": None, "object_trouble_s": None,
        "counters": dict.fromkeys(_COUNTERS, 0) | (counters or {}),
    }  # fmt: skip
    assert more.keys() <= made.keys(), more
    return made | more


def across(
    newest: int | None,
    without: dict[str, int | None],
    held: list[tuple[int, str, str, int]],
    *,
    run: str = RUN,
    trouble: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A run over all nodes; `held`: rank, node, tier, step."""
    return {
        "run": run,
        "newest_step": newest,
        "newest_step_without": without,
        "held": [{"rank": r, "node": n, "tier": t, "step": s} for r, n, t, s in held],
        "trouble": list(trouble),
    }


def cluster(
    nodes: list[str],
    *runs: dict[str, Any],
    leaving: Mapping[str, str] = MappingProxyType({}),
    **more: Any,
) -> dict[str, Any]:
    """As the first of `nodes` sees it; `leaving`: why some of them are to go away."""
    members = [
        {
            "name": name,
            "address": f"10.0.0.{index + 1}:9178",
            "began_unix_ms": NOW_MS - 7_000_000,
            "labels": {"zone": "ab"[index % 2], "rack": f"r{index // 2}"},
            "leaving": leaving.get(name),
        }
        for index, name in enumerate(nodes)
    ]
    made = {
        "cluster": "prod", "node": nodes[0], "replaced": False, "refused_packets": 0,
        "members": members, "runs": list(runs),
    }  # fmt: skip
    return made | more


def peers(alive: int, lost: int = 0, shards: int = 0) -> dict[str, int]:
    """What an agent is to the others."""
    return {
        "nodes_alive": alive, "nodes_lost": lost, "held_shards": shards,
        "held_bytes": shards * (3 << 30), "received_bytes": 0, "given_bytes": 0, "healed_bytes": 0,
        "offers_refused": 0,
    }  # fmt: skip


def history(*, peer: bool = False, bucket: bool = False, samples: int = 120) -> dict[str, Any]:
    """Ten minutes of a run that saves every ten steps."""
    steps = [10 * (i // 4) for i in range(samples)]
    return {
        "at_unix_ms": [NOW_MS - 5000 * (samples - 1 - i) for i in range(samples)],
        "ram": list(steps),
        "disk": [max(0, s - 10 * (1 + i % 3)) for i, s in enumerate(steps)],
        "peer": [max(0, s - 10 * (i % 4 == 0)) if peer else None for i, s in enumerate(steps)],
        "object": [s // 60 * 60 if bucket else None for s in steps],
        "capture_ms": [None if i % 4 else 180.0 + i * 7 % 40 for i in range(samples)],
    }


def document(
    ranks: list[dict[str, Any]],
    cluster: dict[str, Any] | None = None,
    *,
    peers: dict[str, int] | None = None,
    trouble: str | None = None,
    history: dict[str, Any] | None = None,
    leaving: str | None = None,
) -> dict[str, Any]:
    """All of `/status.json`."""
    return {
        "at_unix_ms": NOW_MS,
        "status": {
            "agent": {"version": "0.1.0", "uptime_s": 7000.5, "socket": "/run/agent.sock"},
            "ram_bytes": 6 << 30,
            "ram_limit_bytes": 16 << 30,
            "leaving": leaving,
            "ranks": ranks,
            "peers": peers,
        },
        "cluster": cluster,
        "cluster_trouble": trouble,
        "history": history or {},
    }


def eight_nodes() -> dict[str, Any]:
    """Eight nodes with eight ranks each; shards in RAM, on disk, on other nodes, and a bucket."""
    nodes = [f"gpu-{i + 1}" for i in range(8)]
    ranks = [
        rank(
            r, 4820, 4800, peer=4820 - 10 * (r == 5), copies=(1, 1), world=64,
            bucket="s3://models/gpt-7b", object_step=4740, sending=4800,
            counters={"saves": 482, "saves_skipped": 3 * (r == 2)},
        )
        for r in range(8)
    ]  # fmt: skip
    held = []
    for r in range(64):
        own, other = nodes[r // 8], nodes[(r // 8 + 1) % 8]
        held += [(r, own, "disk", 4800), (r, own, "ram", 4820)]
        held.append((r, other, "ram", 4810 if r == 5 else 4820))
    without: dict[str, int | None] = dict.fromkeys(nodes, 4820)
    without["gpu-1"] = 4810
    run = across(4820, without, held)
    seen = history(peer=True, bucket=True, samples=360)
    told = document(ranks, cluster(nodes, run), peers=peers(8, shards=8), history={RUN: seen})
    told["status"] |= {"ram_bytes": 72 << 30, "ram_limit_bytes": 160 << 30}
    return told


class Canned:
    """Serves the page of this tree, and what it is told to say."""

    def __init__(self) -> None:
        self.data: dict[str, Any] | str = document([])
        canned = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    self._send(200, "text/html; charset=utf-8", HTML.read_bytes())
                elif self.path == "/status.json" and isinstance(canned.data, str):
                    self._send(503, "text/plain; charset=utf-8", canned.data.encode())
                elif self.path == "/status.json":
                    self._send(200, "application/json", json.dumps(canned.data).encode())
                else:
                    self._send(404, "text/plain", b"")

            def _send(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", POLICY)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
