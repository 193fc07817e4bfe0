"""`checkpoint_id="tierkeep://..."`: torch finds our writer and reader by the URL.

torch's list of storages is fixed: the file system, then fsspec. So its two classes for fsspec give
way where a path is ours; `tierkeep.fsspec` is the file system that they look for. Through files
alone there would be a second copy, torch's serialisation, and no commit.
"""

from __future__ import annotations

import os
from typing import Any

from tierkeep.torch._reader import StorageReader
from tierkeep.torch._writer import StorageWriter

SCHEME = "tierkeep://"


def register() -> None:
    """Makes the scheme known; nothing happens where fsspec is not installed."""
    try:
        import fsspec
    except ImportError:
        return
    from torch.distributed.checkpoint import fsspec_filesystem as host

    # As the entry point of the package says too.
    fsspec.register_implementation("tierkeep", "tierkeep.fsspec.FileSystem", clobber=True)
    for theirs, ours in ((host.FsspecWriter, StorageWriter), (host.FsspecReader, StorageReader)):
        theirs.__new__ = staticmethod(_chosen(theirs, ours))  # type: ignore[method-assign]


def _chosen(theirs: type, ours: type) -> Any:
    def new(cls: type, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        named = isinstance(path, str | os.PathLike) and os.fsdecode(path).startswith(SCHEME)
        # No subclass: it counts on files.
        return ours(path, *args, **kwargs) if named and cls is theirs else object.__new__(cls)

    return new
