"""Meta's `torch_checkpointing` writes to a run of tierkeep's and reads from it.

    import tierkeep.torch_checkpointing

    config = CheckpointManager.Config(items=...)
    manager = CheckpointManager(tierkeep.torch_checkpointing.configured(config))
    newest = tierkeep.torch_checkpointing.newest("/ckpt/gpt")
    manager.save("/ckpt/gpt/step_1000", {"model": model.state_dict(), "step": 1000})

The host knows a storage by files, and a barrier after which rank 0 renames a folder. Here the
files that a rank writes to a step are its shard; the barrier publishes it and waits until the
checkpoint of all ranks is there, as every `Checkpointer` does: nothing is renamed, and there is no
rank 0 whose death leaves a half. So both are needed, the storage and the barrier; `configured`
sets both.

What the host forces: it serialises (`torch.save`) before the storage sees a byte. That is a copy
more than a `Checkpointer` makes, and what it reads it unpickles itself.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch_checkpointing.barriers as host_barriers
import torch_checkpointing.storage.base_storage as host
from torch_checkpointing import CheckpointManager
from torch_checkpointing.types import RankInfo
from typing_extensions import Buffer

from tierkeep._address import anywhere
from tierkeep._build import Part
from tierkeep._names import Place, place
from tierkeep._tierkeep import Found, Reader, join_path
from tierkeep.errors import CheckpointNotFoundError, InvalidError
from tierkeep.torch import _runs

logger = logging.getLogger("tierkeep")

_FILES = "files"


def configured(
    config: CheckpointManager.Config | None = None, /, **options: Any
) -> CheckpointManager.Config:
    """`config` with tierkeep's storage and barrier.

    Args:
        config: of the manager; default: its own.
        options: of `StorageConfig`, as `level=` and those of a `tierkeep.Checkpointer`.
    """
    config = config or CheckpointManager.Config()
    storage = StorageConfig(**options)
    writer = dataclasses.replace(config.save.writer_config, barrier_config=BarrierConfig(storage))
    save = dataclasses.replace(config.save, writer_config=writer)
    return dataclasses.replace(config, storage_config=storage, save=save)


def newest(
    run: str | os.PathLike[str],
    *,
    ram_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> str | None:
    """The path of the newest complete checkpoint, for `manager.load`; None where there is none."""
    storage = StorageConfig(ram_dir=ram_dir, storage_options=storage_options).create_storage()
    steps = storage.ls(Path(run))
    return f"{os.fsdecode(run)}/{steps[-1]}" if steps else None


class StorageConfig(host.StorageConfig):
    """Where a path is `<run>/step_1000/<file>`: a run is a directory, or a place in a bucket.

    Args:
        level: what a save waits for, `"ram"`, `"peer"`, `"disk"` or `"object"`; default: the most
            durable of disk and bucket that the run has.
        temp_dir_prefix: as the writer's.
        ram_dir, storage_options: as in `tierkeep.load`.
        options: of the `tierkeep.Checkpointer` that is opened for a run.
    """

    def __init__(
        self,
        *,
        level: Literal["ram", "peer", "disk", "object"] | None = None,
        temp_dir_prefix: str = "tmp_",
        ram_dir: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.level = level
        self.temp_dir_prefix = temp_dir_prefix
        self.ram_dir = None if ram_dir is None else os.fspath(ram_dir)
        self.storage_options = storage_options
        self.options = options
        #: What was made of it in this process, and whether a barrier commits it.
        self.made: list[Storage] = []
        self.has_barrier = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": [], "has_barrier": False}

    def create_storage(self) -> Storage:
        """The storage of this process."""
        self.made.append(Storage(self))
        return self.made[-1]


class BarrierConfig(host_barriers.BarrierConfig):
    """Commits what the storages of `storage` were given."""

    def __init__(self, storage: StorageConfig) -> None:
        super().__init__(timeout_barrier_init_sec=host_barriers.DEFAULT_BARRIER_INIT_TIMEOUT_SEC)
        self.storage = storage

    def create_barrier(self, rank_info: RankInfo) -> Barrier:
        """The barrier of this rank."""
        self.storage.has_barrier = True
        return Barrier(self, rank_info)


class Barrier(host_barriers.Barrier):
    """Publishes this rank's files, and waits for all ranks' checkpoint: no collective, no store."""

    def __init__(self, config: BarrierConfig, rank_info: RankInfo) -> None:
        self._storage = config.storage
        self._who = (rank_info.global_rank, rank_info.global_world_size)

    def execute_barrier(self, timeout_secs: int) -> None:
        """Returns when the checkpoint is as durable as `level` says.

        Raises:
            DeadlineError: not within `timeout_secs` seconds; it names who was missing.
            InvalidError: this rank has written nothing, so nobody told it which step this is.
        """
        written = [storage for storage in self._storage.made if storage.has_written]
        ranks = self._storage.options.get("ranks")
        if not written and (ranks is None or self._who[0] in ranks):
            raise InvalidError(
                f"rank {self._who[0]} wrote no item: each rank that saves has one at least "
                "(ranks= in the options says which ranks save)"
            )
        for storage in written:
            storage.publish(self._who, timeout_secs)


class Storage(host.Storage):
    """The files of steps. What is written is kept in memory until the barrier."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._written: dict[Place, dict[str, Buffer]] = {}
        self._committed: Place | None = None
        self._opened: tuple[Place, _Folder] | None = None

    # -- writing -----------------------------------------------------------------------------

    def stream_write(self, path: Path) -> io.IOBase:
        """A file; it is there when it was closed without an exception."""
        at, name = self._file(path)
        return _Written(self, at, name)

    def write(self, path: Path, data: Buffer) -> None:
        """A file at once."""
        at, name = self._file(path)
        self.keep(at, name, bytearray(data))

    def keep(self, at: Place, name: str, data: Buffer) -> None:
        """A file that was written, until it is published."""
        with self._lock:
            left = [known for known in self._written if known != at]
            if left and self._config.has_barrier:
                # It was not written to its end, or the barrier would have come.
                logger.warning("step %s of %s was given up", left[0].step, left[0].run)
                self._written.clear()
            elif left:
                raise InvalidError(
                    f"step {left[0].step} of {left[0].run} was written and never committed: "
                    "the writer needs barrier_config=tierkeep.torch_checkpointing.BarrierConfig"
                    "(storage_config), as tierkeep.torch_checkpointing.configured sets it"
                )
            self._written.setdefault(at, {})[name] = data

    @property
    def has_written(self) -> bool:
        """Whether there is something to publish."""
        return bool(self._written)

    def publish(self, who: tuple[int, int], timeout_s: float) -> None:
        """Saves what was written, and waits for the others'."""
        with self._lock:
            written, self._written = self._written, {}
        for at, files in written.items():
            assert at.step is not None
            options = {
                **self._config.options,
                "ram_dir": self._config.ram_dir,
                "storage_options": self._config.storage_options,
            }
            ckpt = _runs.handle(at.run, *who, None, options, told=False).ckpt
            _runs.check_new(ckpt, at.run, at.step)
            _runs.begin(ckpt, at.run, at.step, _runs.newest_seen(at.run, at.step))
            save = ckpt.save(at.step, {_FILES: {n: _tensor(data) for n, data in files.items()}})
            level = self._config.level or ("object" if not save.is_due_for_disk else "disk")
            save.wait(level, timeout_s)
            _runs.note(at.run, [at.step])
            self._committed = at

    def mkdir(self, path: Path, recursive: bool = True) -> None:
        """Folders are made by what is in them."""

    def rename(
        self,
        src_path: Path,
        dst_path: Path,
        is_directory: bool = False,
        background_cleanup: bool = False,
    ) -> None:
        """A file that is not committed yet gets another name. A step has been committed by the
        barrier, under its own.
        """
        if is_directory:
            if self._committed == self._step(src_path) == self._step(dst_path):
                return
            raise InvalidError(
                f"{src_path}: a rename commits nothing here: the writer needs barrier_config="
                "tierkeep.torch_checkpointing.BarrierConfig(storage_config), as "
                "tierkeep.torch_checkpointing.configured sets it"
            )
        (at, name), (to, new) = self._file(src_path), self._file(dst_path)
        with self._lock:
            if name not in self._written.get(at, {}):
                raise InvalidError(f"{src_path}: files of a checkpoint keep their names")
            self._written.setdefault(to, {})[new] = self._written[at].pop(name)

    def delete(self, path: Path) -> None:
        """Forgets a file that is not committed. What is goes by the run's retention
        (`keep_last`, `keep_every`): nothing happens.
        """
        at, name = self._file(path)
        with self._lock:
            self._written.get(at, {}).pop(name, None)

    def rmdir(self, path: Path) -> None:
        """The same for a step."""
        with self._lock:
            self._written.pop(self._step(path), None)

    # -- reading -----------------------------------------------------------------------------

    def stream_read(self, path: Path, read_args: host.ReadArgs | None = None) -> io.RawIOBase:
        """A file from the nearest tier, whichever rank wrote it; what is read is checked."""
        at, name = self._file(path)
        folder = self._folder(at)
        _runs.note(at.run, [folder.step])
        return folder.open(name)

    def exists(self, path: Path) -> bool:
        """Whether there is such a run, step or file; also one that is not committed yet, where
        this is who wrote it.
        """
        at, name = self._parts(path)
        with self._lock:
            written = self._written.get(at, {}) if at is not None else {}
            if written and (not name or name in written):
                return True
        return self.isdir(path) or (at is not None and name in self._files(at))

    def isdir(self, path: Path) -> bool:
        """Whether it is a run, a step, or a folder of one."""
        at, name = self._parts(path)
        if at is None:
            return bool(self._steps(path))
        files = self._files(at)
        return any(file.startswith(f"{name}/") for file in files) if name else bool(files)

    def getsize(self, path: Path) -> int:
        """In bytes."""
        at, name = self._file(path)
        return self._folder(at).size(name)

    def ls(self, path: Path) -> list[str]:
        """The steps of a run, as `step-<number>`, or what is in one."""
        at, name = self._parts(path)
        if at is None:
            return self._steps(path)
        below = f"{name}/" if name else ""
        files = [file for file in self._folder(at).files if file.startswith(below)]
        return sorted({file.removeprefix(below).split("/")[0] for file in files})

    def remap_path(self, path: Path) -> str:
        """As it is."""
        return str(path)

    # -- small -------------------------------------------------------------------------------

    def _parts(self, path: Path) -> tuple[Place | None, str]:
        """The step, and what is in it; None: a run."""
        path, prefix = Path(path), self._config.temp_dir_prefix
        for folder in (path, *path.parents):
            name = folder.name.removeprefix(prefix)
            at = place(folder.parent / name) if name else None
            if at is not None and at.step is not None:
                return at, "" if folder == path else path.relative_to(folder).as_posix()
        return None, ""

    def _file(self, path: Path) -> tuple[Place, str]:
        at, name = self._parts(path)
        if at is None or not name:
            raise InvalidError(f"{path} is no file of a step: <run>/step_<number>/<file>")
        return at, name

    def _step(self, path: Path) -> Place:
        at, name = self._parts(path)
        if at is None or name:
            raise InvalidError(f"{path} is no step: <run>/step_<number>")
        return at

    def _reader(self, run: str) -> Reader:
        options = self._config.storage_options
        return Reader(anywhere(run, options), self._config.ram_dir, dict(options or {}))

    def _steps(self, path: Path) -> list[str]:
        try:
            rows = self._reader(str(path)).steps()
        except CheckpointNotFoundError:
            return []
        return [f"step-{row['step']}" for row in rows if row["complete"] and row["in_lineage"]]

    def _files(self, at: Place) -> Collection[str]:
        try:
            return self._folder(at).files
        except CheckpointNotFoundError:
            return ()

    def _folder(self, at: Place) -> _Folder:
        # Of a step that was found: its files stay as they are.
        if self._opened is None or self._opened[0] != at:
            shards = self._reader(at.run).choose(at.step)[0]
            self._opened = (at, _Folder(at, [found for _, found in shards]))
        return self._opened[1]


class _Written(io.BytesIO):
    """A file while it is written."""

    def __init__(self, storage: Storage, at: Place, name: str) -> None:
        super().__init__()
        self._to: tuple[Storage, Place, str] | None = (storage, at, name)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._to = None
        self.close()

    def close(self) -> None:
        if self._to is not None:
            (storage, at, name), self._to = self._to, None
            storage.keep(at, name, self.getbuffer())

    def __del__(self) -> None:
        self._to = None  # Nobody has closed it: it is not whole.


class _Folder:
    """The files of a checkpoint, of all ranks."""

    def __init__(self, at: Place, shards: list[Found]) -> None:
        self._at = at
        self.step = shards[0].step
        self.files: dict[str, tuple[Found, str, int]] = {}
        for found in shards:
            table = found.tensors
            rows = dict(getattr(found.tree, "entries", ())).get(_FILES)
            for name, _ in getattr(rows, "entries", ()):
                stored = join_path((_FILES, name))
                self.files[name] = (found, stored, table[stored][1][0])

    def size(self, name: str) -> int:
        if name not in self.files:
            raise CheckpointNotFoundError(
                f"step {self._at.step} of {self._at.run} has no file {name}"
            )
        return self.files[name][2]

    def open(self, name: str) -> _Read:
        self.size(name)
        return _Read(*self.files[name])


class _Read(io.RawIOBase):
    """A file that is read where it is asked for."""

    def __init__(self, found: Found, stored: str, size: int) -> None:
        self._found, self._stored, self._size = found, stored, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        into = memoryview(buffer).cast("B")
        count = min(len(into), max(0, self._size - self._at))
        if count == 0:
            return 0
        target = torch.frombuffer(into[:count], dtype=torch.uint8)
        part = Part(self._stored, (self._size,), (self._at,), (count,), self._found.rank)
        self._found.read([[(part, target)]])
        self._at += count
        return count


def _tensor(data: Buffer) -> torch.Tensor:
    if memoryview(data).nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8)
