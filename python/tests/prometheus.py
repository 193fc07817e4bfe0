"""A Prometheus of a test's own, asked over its API as Grafana asks one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import servers

Labels = Mapping[str, str]
#: Labels, and (time, value) pairs.
Series = tuple[dict[str, str], list[tuple[float, float]]]


def tool(name: str) -> str:
    """`prometheus` or `promtool`. Without it the test is skipped loudly; in CI it fails."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        why = f"NO {name.upper()}, dashboard and alerts are not tried: `make prometheus` fetches it"
        if os.environ.get("TIERKEEP_LAB") == "require":
            pytest.fail(why)
        pytest.skip(why)
    return found


def promtool(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("promtool"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def until(what: str, so: Callable[[], object], within: float = 90) -> None:
    end = time.monotonic() + within
    while not so():
        assert time.monotonic() < end, what
        time.sleep(0.1)


class Prometheus:
    """A server that takes samples of `targets` every second; killed at the end.

    `targets`: labels of each, by its address. `rules`: a file of them.
    """

    def __init__(self, place: Path, job: str, targets: Mapping[str, Labels], rules: Path) -> None:
        own = place / "prometheus.yml"
        static = [{"targets": [at], "labels": dict(labels)} for at, labels in targets.items()]
        every = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
        config = {
            "global": every,
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": job, "static_configs": static}],
        }
        own.write_text(json.dumps(config))  # All JSON is YAML.
        self.at = f"127.0.0.1:{servers.ports(1)[0]}"
        self._log = place / "prometheus.log"
        command = [tool("prometheus"), f"--config.file={own}", f"--web.listen-address={self.at}"]
        command += [f"--storage.tsdb.path={place / 'tsdb'}", "--log.level=warn"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> Prometheus:
        try:
            until("prometheus is ready", self._is_ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(20)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"http://{self.at}/-/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ask(self, path: str, **words: str | float) -> Any:
        """The data of an answer. What it refuses fails the test, in its own words."""
        query = urllib.parse.urlencode(
            {name.replace("_match", "[]"): w for name, w in words.items()}
        )
        try:
            with urllib.request.urlopen(
                f"http://{self.at}/api/v1/{path}?{query}", timeout=60
            ) as got:
                answer = json.load(got)
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{words}: {e.read().decode()}") from None
        assert answer["status"] == "success" and not answer.get("warnings"), (words, answer)
        return answer["data"]

    def values(self, metric: str, label: str) -> list[str]:
        """All values of a label of a metric."""
        found: list[str] = self.ask(f"label/{label}/values", match_match=metric)
        return found

    def range(self, query: str, start: float, end: float) -> list[Series]:
        """What a graph of these times has, a point each second."""
        data = self.ask("query_range", query=query, start=start, end=end, step=1)
        return [
            (one["metric"], [(float(at), float(value)) for at, value in one["values"]])
            for one in data["result"]
        ]

    def alerts(self) -> list[dict[str, Any]]:
        """Those that are pending or firing."""
        found: list[dict[str, Any]] = self.ask("alerts")["alerts"]
        return found
