"""Small files that name a checkpoint, at the paths that Lightning chooses.

They are there for what Lightning does with paths: look whether one exists, link, list, remove. One
is JSON, so that nobody takes it for a file of torch's; in the directory of its run it names the run
by where it lies, so that both can be moved together.

A marker and the pin of its checkpoint cannot change at once. A note, there while they do, says
which path and which steps it is about: a process that is killed in between leaves it, and the next
one ends the change. Pins that no note tells of are nobody's business here.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from tierkeep.errors import InvalidError
from tierkeep.lightning import _host

_VERSION = 1
_KEY = "tierkeep.lightning"
_NOTE = "tierkeep.lightning.pins"

# One is far smaller; what is larger is something else.
_BYTES_MAX = 64 * 1024


class Marker(NamedTuple):
    """Which checkpoint a path means."""

    run: str
    step: int
    attempt: int


class Change(NamedTuple):
    """A path that is given another marker or none, and the steps that have pins for it."""

    path: str
    steps: list[int]


def run_of(path: str | os.PathLike[str], destination: str | os.PathLike[str] | None) -> str:
    """The run of what is saved at a path."""
    if destination is not None:
        given = os.fspath(destination)
        return given if "://" in given else os.path.abspath(given)
    return _join(_directory(os.fspath(path)), "tierkeep")


def read(path: str | os.PathLike[str]) -> Marker | None:
    """What a path names; None where it is no marker."""
    at = os.fspath(path)
    said = _read(at, _KEY)
    if said is None:
        return None
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
    _write(at, said)


# -- notes -----------------------------------------------------------------------------------


def note_of(run: str, path: str | os.PathLike[str]) -> str:
    """Where a change is noted: beside the run; where that is a bucket's and the path is not, beside
    the path, since nothing else here writes to a bucket.
    """
    at = os.fspath(path)
    if "://" in run and "://" not in at:
        return _join(_parent(at), run.rstrip("/").rpartition("/")[2] + ".pins")
    return run.rstrip("/") + ".pins"


def read_note(note: str) -> Change | None:
    """The change that is under way; None: none is."""
    said = _read(note, _NOTE)
    if said is None:
        return None
    path = said["path"] if said["absolute"] else _join(_parent(note), said["path"])
    return Change(path, [int(step) for step in said["steps"]])


def write_note(note: str, path: str | os.PathLike[str], steps: list[int]) -> None:
    """Before the first pin changes. It names the path by where it lies, as a marker its run."""
    at, start = os.fspath(path), _join(_parent(note), "")
    if "://" not in at:
        at = _join(_parent(at), os.path.basename(at))
    inside = at.startswith(start)
    said = {"path": at.removeprefix(start) if inside else at, "absolute": not inside}
    _write(note, {_NOTE: _VERSION, **said, "steps": steps})


def remove_note(note: str) -> None:
    """The change is done."""
    _host.get_filesystem(note).rm(note)


# -- both ------------------------------------------------------------------------------------


def _read(at: str, key: str) -> dict[str, Any] | None:
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
    if not isinstance(said, dict) or key not in said:
        return None
    if said[key] != _VERSION:
        raise InvalidError(f"{at} was written by a newer tierkeep: version {said[key]}")
    return said


def _write(at: str, said: dict[str, Any]) -> None:
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


def _parent(path: str) -> str:
    """Where a path itself lies, also if it is a link."""
    if "://" in path:
        return path.rpartition("/")[0]
    return os.path.realpath(os.path.dirname(os.path.abspath(path)))


def _directory(path: str) -> str:
    if "://" in path:
        return path.rpartition("/")[0]
    # Of a link, where that which it leads to lies.
    return os.path.dirname(os.path.realpath(path))


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
