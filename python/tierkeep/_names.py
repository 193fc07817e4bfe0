"""Which run and step a path means."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from tierkeep.errors import InvalidError

_STEP = re.compile(
    r"(?:(?:step|global_step|checkpoint|ckpt|epoch|iter|iteration)[-_.=]?)?([0-9]{1,18})"
)


class Place(NamedTuple):
    """A checkpoint by its name."""

    #: The run's directory, or its place in a bucket.
    run: str
    #: `None`: the newest to read, the next one to write.
    step: int | None


def place(checkpoint_id: str | os.PathLike[str]) -> Place:
    """`<run>/step-100` (or `checkpoint-100`, `epoch_3`, `100`) is a step of `<run>`; any other path
    is a run.
    """
    path = os.fsdecode(checkpoint_id).removeprefix("tierkeep://").rstrip("/")
    if not path:
        raise InvalidError(f"{checkpoint_id!r} names no checkpoint: <run>/step-<number>")
    run, _, last = path.rpartition("/")
    numbered = _STEP.fullmatch(last)
    if numbered is None or not run:
        return Place(path, None)
    return Place(run, int(numbered[1]))


#: Of the addresses that a run may have; any other is somebody else's.
_SCHEMES = ("tierkeep", "file", "s3", "gs", "az")


def is_place(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint of ours may have that name: torch asks each storage it knows."""
    scheme, colon, _ = os.fsdecode(checkpoint_id).partition("://")
    return bool(scheme.strip("/")) and (not colon or scheme in _SCHEMES)
