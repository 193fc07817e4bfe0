"""What a destination may be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

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


def of_disk(place: tuple[str, str | None], *numbers: int | None) -> dict[str, object]:
    """The settings of the disk in `place` (as `places` has it), in the order of their names;
    without a disk none may be given.
    """
    path, url = place
    said = dict(zip(("disk_every", "keep_last", "keep_every"), numbers, strict=True))
    for name, value in said.items():
        if path == url and value is not None:
            raise InvalidError(
                f'{name}: {path} has no disk before it: name one, as in disk="/nvme"'
            )
    return dict(said)


_OF_BUCKET = (
    "object_every",
    "object_keep_last",
    "object_keep_every",
    "object_bytes_per_second_max",
)


def bucket(
    place: tuple[str, str | None, Mapping[str, str] | None],
    numbers: tuple[int | None, ...],
    compress: bool | None,
) -> dict[str, object]:
    """The settings of the bucket in `place` (directory, URL, options); without a URL none may be
    given. `numbers` in the order of their names.
    """
    path, url, options = place
    if url is None and any(said is not None for said in (options, compress, *numbers)):
        raise InvalidError(f"{path} is a directory: what is said of a bucket has no meaning")
    named = dict(zip(_OF_BUCKET, numbers, strict=True))
    options = None if options is None else dict(options)
    return {"object": url, "storage_options": options, "object_compress": compress, **named}


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
