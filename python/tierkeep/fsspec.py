"""`tierkeep://` for everything that takes a URL of fsspec's.

    dcp.save(state_dict, checkpoint_id="tierkeep:///ckpt/gpt/step-100")
    dcp.load(state_dict, checkpoint_id="tierkeep://s3://bucket/gpt/step-100")
    fsspec.open("tierkeep:///ckpt/gpt/step-100/rank-0.safetensors")

A run is a directory of its steps, a step one of its ranks' states, each a `.safetensors` file with
whole tensors, whichever ranks hold their parts: bytes are read, and checked, where they are asked
for. Files are only read: what makes a checkpoint is its commit, and files know of none. torch's
`FsspecWriter` and `FsspecReader` give way to `tierkeep.torch`'s where a path begins with
`tierkeep://`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from tierkeep._address import anywhere
from tierkeep._build import Key, Part, empty
from tierkeep._names import Place, place
from tierkeep._tierkeep import Found, Reader
from tierkeep.errors import CheckpointNotFoundError, InvalidError

_FILE = re.compile(r"rank-([0-9]{1,9})\.safetensors")


class FileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """What is in runs, to be read.

    Args:
        ram_dir: as in `tierkeep.load`.
        run_options: `storage_options` there, for a bucket.
    """

    protocol = "tierkeep"
    # Runs change behind this process.
    cachable = False

    def __init__(
        self,
        ram_dir: str | os.PathLike[str] | None = None,
        run_options: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._ram_dir = None if ram_dir is None else os.fspath(ram_dir)
        self._options = run_options

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The steps that a resume could take, or the files of one."""
        path = self._strip_protocol(path)
        at, file = _parts(path)
        if file is not None:
            rows = [self._file(path, at, file)]
        elif at.step is not None:
            files = [(f"{path}/rank-{rank}.safetensors", rank) for rank in self._chosen(at)]
            rows = [self._file(name, at, rank) for name, rank in files]
        else:
            steps = [row for row in self._reader(at).steps() if row["complete"]]
            rows = [
                {"name": f"{path}/step-{row['step']}", "size": 0, "type": "directory"}
                for row in steps
                if row["in_lineage"]
            ]
        return rows if detail else [row["name"] for row in rows]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size and kind."""
        path = self._strip_protocol(path)
        at, file = _parts(path)
        if file is not None:
            return self._file(path, at, file)
        if at.step is not None:
            self._chosen(at)
        else:
            self._reader(at).steps()
        return {"name": path, "size": 0, "type": "directory"}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _File:
        if mode != "rb":
            raise InvalidError(
                f"{path}: files of a run are only read; a Checkpointer or torch's "
                "distributed checkpoint writes it"
            )
        at, rank = _parts(path)
        if rank is None:
            raise IsADirectoryError(path)
        return _File(self, path, self._shard(path, at, rank))

    # -- small -------------------------------------------------------------------------------

    def _reader(self, at: Place) -> Reader:
        options = dict(self._options or {})
        return Reader(anywhere(at.run, self._options), self._ram_dir, options)

    def _chosen(self, at: Place) -> dict[int, Found]:
        return dict(self._reader(at).choose(at.step)[0])

    def _shard(self, path: str, at: Place, rank: int) -> _Safetensors:
        shards = self._chosen(at)
        if rank not in shards:
            raise CheckpointNotFoundError(f"{path}: rank {rank} saved nothing there")
        return _Safetensors(shards[rank], shards)

    def _file(self, path: str, at: Place, rank: int) -> dict[str, Any]:
        return {"name": path, "size": self._shard(path, at, rank).size, "type": "file"}


def _parts(path: str) -> tuple[Place, int | None]:
    """The checkpoint, and the rank whose file it is."""
    folder, _, last = path.rpartition("/")
    named = _FILE.fullmatch(last)
    if named is None or not folder:
        return place(path), None
    return place(folder), int(named[1])


class _Safetensors:
    """A rank's tensors as a file of the safetensors format: its header is made here."""

    def __init__(self, found: Found, shards: Mapping[int, Found]) -> None:
        self._found = found
        self._tensors: list[tuple[int, int, Key, str, tuple[int, ...]]] = []
        header: dict[str, Any] = {}
        end = 0
        elsewhere = found.elsewhere
        forms = {name: shards[rank].tensors[name] for name, rank in elsewhere.items()}
        for saved, (dtype, shape) in {**found.tensors, **forms}.items():
            key: Key = saved
            if saved.endswith("#") or saved in elsewhere:
                key = Part(saved, shape, (0,) * len(shape), shape, elsewhere.get(saved))
            begin, end = end, end + _bytes_of(dtype, shape)
            row = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            header[saved.removesuffix("#")] = row
            self._tensors.append((begin, end, key, dtype, shape))
        header["__metadata__"] = {"step": str(found.step), "attempt": str(found.attempt)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.size = len(self._head) + end
        self._last: tuple[Key, memoryview] | None = None

    def read(self, start: int, end: int) -> bytes:
        """Some of its bytes."""
        parts = [self._head[start:end]]
        start, end = start - len(self._head), end - len(self._head)
        for first, last, key, dtype, shape in self._tensors:
            if first < end and start < last:
                data = self._tensor(key, dtype, shape)
                parts.append(bytes(data[max(0, start - first) : end - first]))
        return b"".join(parts)

    def _tensor(self, key: Key, dtype: str, shape: tuple[int, ...]) -> memoryview:
        if self._last is None or self._last[0] != key:
            target = empty("torch", dtype, shape, (key if isinstance(key, str) else key.name,))
            self._found.read([[(key, target)]])
            if not hasattr(target, "ctypes"):
                target = target.reshape(-1).view(sys.modules["torch"].uint8).numpy()
            self._last = (key, memoryview(target.reshape(-1).view("u1")))
        return self._last[1]


class _File(AbstractBufferedFile):  # type: ignore[misc]
    """One of them, opened."""

    def __init__(self, fs: FileSystem, path: str, file: _Safetensors) -> None:
        super().__init__(fs, path, mode="rb", size=file.size)
        self._file = file

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._file.read(start, end)


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    bits = re.search(r"[0-9]+", dtype)
    return count * (int(bits[0]) if bits else 8) // 8


# Whoever asks torch to find the writer for a URL has looked for its file system first.
if "torch" in sys.modules:
    import tierkeep.torch  # noqa: F401
