"""Every test has a ram directory and a run of its own, and leaves nothing in /dev/shm."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tierkeep-test-", dir="/dev/shm"))
    monkeypatch.setenv("TIERKEEP_RAM_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def run(ram: Path, tmp_path: Path) -> Path:
    """A destination. Its ram tier is in `ram`."""
    return tmp_path / "run"
