"""What lies in the directories that DeepSpeed is given.

DeepSpeed looks for a checkpoint on the file system (`latest`, a directory for each tag, names of
files in it) before it asks its checkpoint engine for one. So a tag's directory has a small file
under each name that was saved, and `tierkeep.json`, which says where the checkpoint is: one file
that is replaced at once, so that no two files of a tag are taken from two steps. None of them makes
a checkpoint exist: each load asks the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from tierkeep.errors import CheckpointNotFoundError, InvalidError

_ABOUT = "tierkeep.json"


class Place(NamedTuple):
    """The checkpoint that a tag's directory stands for."""

    run: str
    step: int


def lay(directory: str, place: Place | None, names: Mapping[str, int]) -> None:
    """Puts a small file under each name, with the rank that saved it, and last what they are of."""
    os.makedirs(directory, exist_ok=True)
    for name, rank in names.items():
        _write(os.path.join(directory, name), json.dumps({"tierkeep": _ABOUT, "rank": rank}))
    if place is not None:
        run = place.run
        if "://" not in run:
            # So that a directory that is moved as a whole still knows its run.
            run = os.path.relpath(os.path.realpath(run), os.path.realpath(directory))
        _write(os.path.join(directory, _ABOUT), json.dumps({"run": run, "step": place.step}))


def name_latest(save_dir: str, tag: str) -> None:
    """Writes `latest` as DeepSpeed does, but at once."""
    _write(os.path.join(save_dir, "latest"), tag)


def place(directory: str) -> Place:
    """What a tag's directory stands for."""
    try:
        with open(os.path.join(directory, _ABOUT), encoding="utf-8") as file:
            about = json.load(file)
        run, step = str(about["run"]), int(about["step"])
    except FileNotFoundError:
        raise CheckpointNotFoundError(
            f"{directory} has no {_ABOUT}: tierkeep.deepspeed.resume makes it where the run has "
            "the tag; files of torch's are loaded before tierkeep.deepspeed.attach"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidError(f"{directory}/{_ABOUT} is damaged: delete it, and resume") from error
    if "://" not in run:
        run = os.path.normpath(os.path.join(os.path.realpath(directory), run))
    return Place(run, step)


def rank_of(path: str) -> int | None:
    """The rank that saved a file; a hint."""
    try:
        with open(path, "rb") as file:
            # A file of torch's may be large.
            return int(json.loads(file.read(200))["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: str, text: str) -> None:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if file.read(len(text) + 1) == text:
            return
    beside = f"{path}.{uuid.uuid4().hex}"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
