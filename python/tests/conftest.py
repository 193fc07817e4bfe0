"""Every test has a ram directory and a run of its own, and leaves nothing in /dev/shm."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import Agent


def pytest_configure() -> None:
    # A shell that starts the tests behind itself makes them ignore Ctrl-C: some wait for it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tierkeep-test-", dir="/dev/shm"))
    monkeypatch.setenv("TIERKEEP_RAM_DIR", str(path))
    yield path
    end = time.monotonic() + 5
    while _prepares() and time.monotonic() < end:
        time.sleep(0.01)
    shutil.rmtree(path, ignore_errors=True)
    path.with_name(f"{path.name}.log").unlink(missing_ok=True)  # An agent's, where a test had one.


def _prepares() -> bool:
    """Whether slots are still being made behind, by a Checkpointer that was closed early."""
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            if path.read_text().startswith("tierkeep-prepar"):
                return True
    return False


@pytest.fixture
def run(ram: Path, tmp_path: Path) -> Path:
    """A destination. Its ram tier is in `ram`."""
    return tmp_path / "run"


@pytest.fixture
def agent(ram: Path) -> Iterator[Agent]:
    """Checkpointers find it by themselves."""
    agent = Agent(ram)
    yield agent
    agent.stop(signal.SIGKILL)
    agent.log.unlink()
