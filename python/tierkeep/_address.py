"""What a destination may be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from tierkeep.errors import InvalidError


def is_url(path: str) -> bool:
    """Whether it is a place in a bucket, as in `s3://bucket/root/run`."""
    return re.match(r"[A-Za-z][A-Za-z0-9]*://", path) is not None


def directory(destination: str | os.PathLike[str]) -> str:
    """The directory `<root>/<run>` that `destination` names."""
    path = os.fsdecode(destination)
    if is_url(path):
        raise InvalidError(
            f"{path}: a job saves to a directory, <root>/<run>, in this version; "
            "`tierkeep restore DIRECTORY --to URL` copies a checkpoint to a bucket"
        )
    return path


def anywhere(destination: str | os.PathLike[str], options: Mapping[str, str] | None) -> str:
    """The directory or the place in a bucket that `destination` names."""
    path = os.fsdecode(destination)
    if options and not is_url(path):
        raise InvalidError(f"storage_options: {path} is a directory, which has none")
    return path
