"""Small files that name a checkpoint, at the paths that Lightning chooses.

They are there for what Lightning does with paths: look whether one exists, link, list, remove. One
is JSON, so that nobody takes it for a file of torch's; in the directory of its run it names the run
by where it lies, so that both can be moved together.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from tierkeep.errors import InvalidError
from tierkeep.lightning import _host

_VERSION = 1
_KEY = "tierkeep.lightning"

# One is far smaller; what is larger is something else.
_BYTES_MAX = 64 * 1024


class Marker(NamedTuple):
    """Which checkpoint a path means."""

    run: str
    step: int
    attempt: int


def run_of(path: str | os.PathLike[str], destination: str | os.PathLike[str] | None) -> str:
    """The run of what is saved at a path."""
    if destination is not None:
        given = os.fspath(destination)
        return given if "://" in given else os.path.abspath(given)
    return _join(_directory(os.fspath(path)), "tierkeep")


def read(path: str | os.PathLike[str]) -> Marker | None:
    """What a path names; None where it is no marker."""
    at = os.fspath(path)
    files = _host.get_filesystem(at)
    if not files.isfile(at) or files.size(at) > _BYTES_MAX:
        return None
    with files.open(at, "rb") as file:
        data = file.read(_BYTES_MAX)
    if not data.startswith(b"{"):
        return None
    try:
        said: Any = json.loads(data)
    except ValueError:
        return None
    if not isinstance(said, dict) or _KEY not in said:
        return None
    if said[_KEY] != _VERSION:
        raise InvalidError(f"{at} was written by a newer tierkeep: version {said[_KEY]}")
    run = said["run"] if said["absolute"] else _join(_directory(at), said["run"])
    return Marker(run, int(said["step"]), int(said["attempt"]))


def write(path: str | os.PathLike[str], marker: Marker) -> None:
    """Puts it at the path, whole or not at all."""
    at = os.fspath(path)
    start = _join(_directory(at), "")
    inside = marker.run.startswith(start)
    said = {
        _KEY: _VERSION,
        "run": marker.run.removeprefix(start) if inside else marker.run,
        "absolute": not inside,
        "step": marker.step,
        "attempt": marker.attempt,
    }
    data = (json.dumps(said) + "\n").encode()
    files = _host.get_filesystem(at)
    if "://" in at:
        files.pipe(at, data)
        return
    if os.path.islink(at):
        os.unlink(at)
    directory = os.path.dirname(os.path.abspath(at))
    os.makedirs(directory, exist_ok=True)
    staged = f"{at}.{os.getpid()}.tmp"
    with open(staged, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, at)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _directory(path: str) -> str:
    if "://" in path:
        return path.rpartition("/")[0]
    # Of a link, where that which it leads to lies.
    return os.path.dirname(os.path.realpath(path))


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
