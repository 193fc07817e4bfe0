"""What a destination may be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from tierkeep.errors import InvalidError


def is_url(path: str) -> bool:
    """Whether it is a place in a bucket, as in `s3://bucket/root/run`."""
    return re.match(r"[A-Za-z][A-Za-z0-9]*://", path) is not None


def places(
    destination: str | os.PathLike[str], disk: str | os.PathLike[str] | None
) -> tuple[str, str | None]:
    """Where the run lies on this node: `<root>/<run>` of the disk tier, or the bucket's URL where
    there is no disk; and the bucket's URL where there is one.
    """
    path = os.fsdecode(destination)
    if not is_url(path):
        if disk is not None:
            raise InvalidError(f"disk: {path} is the disk; it goes with a bucket, as in s3://...")
        return path, None
    path = path.rstrip("/")
    if disk is None:
        return path, path
    return os.path.join(os.fsdecode(disk), path.rsplit("/", 1)[-1]), path


_OF_DISK = ("disk_every", "keep_last", "keep_every")

_OF_BUCKET = (
    "object_every",
    "object_every_minutes",
    "object_keep_last",
    "object_keep_every",
    "object_keep_hours",
    "object_bytes_per_second_max",
    "object_compress",
)


def of_disk(place: tuple[str, str | None], said: Mapping[str, Any]) -> dict[str, object]:
    """What is `said` of the disk in `place` (as `places` has it); nothing, where there is none."""
    path, url = place
    for name in _OF_DISK:
        if path == url and said[name] is not None:
            raise InvalidError(
                f'{name}: {path} has no disk before it: name one, as in disk="/nvme"'
            )
    return {name: said[name] for name in _OF_DISK}


def bucket(
    place: tuple[str, str | None, Mapping[str, str] | None], said: Mapping[str, Any]
) -> dict[str, object]:
    """What is `said` of the bucket in `place` (directory, URL, options); nothing, where there is
    none.
    """
    path, url, options = place
    named = {name: said[name] for name in _OF_BUCKET}
    if url is None and any(value is not None for value in (options, *named.values())):
        raise InvalidError(f"{path} is a directory: what is said of a bucket has no meaning")
    return {"object": url, "storage_options": None if options is None else dict(options), **named}


def directory(origin: str | os.PathLike[str]) -> str:
    """The directory or file that `origin` names."""
    path = os.fsdecode(origin)
    if is_url(path):
        raise InvalidError(f"{path}: a job begins with a directory or a file, not with a bucket")
    return path


def anywhere(destination: str | os.PathLike[str], options: Mapping[str, str] | None) -> str:
    """The directory or the place in a bucket that `destination` names."""
    path = os.fsdecode(destination)
    if options and not is_url(path):
        raise InvalidError(f"storage_options: {path} is a directory, which has none")
    return path
