"""`StorageWriter`: `torch.distributed.checkpoint` writes to a run of tierkeep's."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter as _StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tierkeep._names import is_place, place
from tierkeep._tierkeep import Save
from tierkeep.errors import InvalidError
from tierkeep.torch import _items, _runs
from tierkeep.torch._staged import Source, Staged, keep


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the coordinator tells the ranks in their plans: no collective of our own is needed."""

    world: int
    step: int | None
    attempt_id: str
    #: What the run goes on from, where it begins.
    before: int | None


@dataclasses.dataclass(frozen=True)
class _Has:
    """What a rank tells the coordinator: which start its open handle is part of, if it has one."""

    start: str | None


class StorageWriter(_StorageWriter, BlockingAsyncStager):
    """Writes a distributed checkpoint of torch's to a run of tierkeep's.

        writer = tierkeep.torch.StorageWriter("/ckpt/gpt/step-100")
        dcp.save(state_dict, storage_writer=writer)         # or async_save, or no_dist=True

    Each rank's items are one copy into RAM, checksummed, and go on to disk, other nodes and the
    bucket as every save does; the checkpoint exists when every rank's are there. `dcp.save` returns
    when it is as durable as `level` says.

    Takes what `FileSystemWriter` takes, in the same places. What is about its files alone has no
    meaning here (`single_file_per_rank`, `per_thread_copy_ahead`, `serialization_format`).

    Args:
        path: `<run>/step-100` (`checkpoint-100`, `epoch_3`, `100`); the run is a directory or a
            place in a bucket. Without a number it is the run, and each save the next step of it; so
            no run has a name like these.
        sync_files: False: `dcp.save` returns when the checkpoint is in RAM.
        thread_count: threads of the copy; 1, the default there, means as many as help.
        cache_staged_state_dict: as there, for `async_save`.
        overwrite: False: a step that exists is an error. True: it is too while this process goes
            on; another one goes on from the newest step before it, and abandons it.
        level: what a save waits for, `"ram"`, `"peer"`, `"disk"` or `"object"`; default: the most
            durable of disk and bucket that the run has.
        timeout_s: seconds until then, at most.
        options: of the `tierkeep.Checkpointer` that is opened for the run. `fresh=True`: the
            first save of this process abandons what is there.

    Raises:
        InvalidError: `_extensions`, which transform files.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: Any = None,
        *,
        level: Literal["ram", "peer", "disk", "object"] | None = None,
        timeout_s: float = 1800.0,
        **options: Any,
    ) -> None:
        del single_file_per_rank, per_thread_copy_ahead, serialization_format
        # Its cache is pinned memory, which is an error where there is no device.
        cached = cache_staged_state_dict and torch.accelerator.is_available()
        BlockingAsyncStager.__init__(self, cache_staged_state_dict=cached)
        if _extensions:
            raise InvalidError(
                "_extensions transform files of torch's: tierkeep has none "
                "(object_compress=True compresses what goes to a bucket)"
            )
        self.path = path
        self._level = level if sync_files else level or "ram"
        self._timeout_s = timeout_s
        self._overwrite = overwrite
        self._options = options
        if thread_count > 1:
            options.setdefault("threads", thread_count)
        self._rank: int | None = None
        self._use_collectives = True
        #: The steps that the process of the training has seen, where this is another one.
        self._seen: frozenset[int] = frozenset()
        self._save: Save | None = None
        #: What names the save that was written last, here and in the metadata that are read of it.
        self.save_id: str | None = None
        self._staged: Staged | None = None

    def __getstate__(self) -> dict[str, Any]:
        # For a process of its own (`AsyncCheckpointerType.PROCESS`): only what it is told.
        told = {"_seen": _runs.seen(place(self.path).run)}
        return {**self.__dict__, **told, "_save": None, "_staged": None, "state_dict_cache": None}

    # -- the protocol ------------------------------------------------------------------------

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path of the checkpoint that is written."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new checkpoint is about to be written."""
        if checkpoint_id:
            self.path = checkpoint_id
        self._save = self.save_id = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`dcp.async_save`: copies what is to be saved, and returns when the state may be changed.

        From the second save of a form on it is copied into its slot; what is returned is the state
        itself, of which torch then only looks at names and shapes. The first one, and one of
        another form or by another planner than torch's default, is copied on the way, too.
        """
        run, step = place(self.path)
        known = _runs.opened(run)
        if known is not None and known.kept is not None and known.ckpt._begun:
            source = Source(state_dict, known.kept)
            if source.fits:
                step = _runs.next_step(known.ckpt) if step is None else step
                _runs.check_new(known.ckpt, run, step, overwrite=self._overwrite)
                save = known.ckpt.save(step, _items.tree(known.kept.plan, source))
                self._staged = Staged(known.kept.plan, save)
                return state_dict
        return super().stage(state_dict)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learns who this is. (torch passes the rank only to a parameter of the name `kwargs`.)"""
        self._rank = kwargs.get("rank")
        self._use_collectives = kwargs.get("use_collectives", True)

    def storage_meta(self) -> StorageMeta | None:
        """What the planner is told of this checkpoint."""
        return StorageMeta(checkpoint_id=self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing is to be planned: where bytes lie is each rank's own."""
        known = _runs.opened(place(self.path).run)
        return dataclasses.replace(plan, storage_data=_Has(known.start if known else None))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The coordinator: which step it is, and which start of the job."""
        if not self._use_collectives:
            return plans
        run, step = place(self.path)
        world, known = len(plans), _runs.opened(run)
        # Open handles go on. Where one was closed, a new attempt begins, on every rank.
        start = known.start if known else None
        if start is None or any(
            isinstance(plan.storage_data, _Has) and plan.storage_data.start != start
            for plan in plans
        ):
            start = uuid.uuid4().hex
        if self._staged is not None:
            step = self._staged.save.step
        elif step is None:
            rank = self._rank or 0
            known = _runs.handle(run, rank, world, start, self._options, told=True)
            step = _runs.next_step(known.ckpt)
        told = _Told(world, step, start, self._before(run, step))
        return [dataclasses.replace(plan, storage_data=told) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copies this rank's items into RAM; from there they go on behind."""
        run, step = place(self.path)
        told = plan.storage_data if self._use_collectives else None
        rank, world, start = self._who(told)
        was = _runs.opened(run)
        known = _runs.handle(run, rank, world, start, self._options, told=told is not None)
        staged, self._staged = self._staged, None
        if staged is not None and known is not was:
            raise InvalidError(
                f"step {staged.save.step} was staged, and then a rank opened {run} anew; "
                "the next save is staged anew"
            )
        if staged is not None:
            known.kept = None  # Unless this plan is the same.
            self._save = staged.check(plan)
        else:
            if step is None:
                step = _runs.next_step(known.ckpt, told and told.step)
            _runs.check_new(known.ckpt, run, step, overwrite=self._overwrite)
            # Of an earlier save, where torch kept the plan: this process has gone on since.
            is_new = told is not None and told.step == step
            before = told.before if told and is_new else self._before(run, step)
            _runs.begin(known.ckpt, run, step, before)
            self._save = known.ckpt.save(step, _items.tree(plan, planner))
        _runs.note(run, [self._save.step])
        self.save_id = _runs.save_id(self._save.step, known.ckpt._handle.attempt)
        known.kept = keep(plan, planner)
        results = [WriteResult(item.index, _size(item), None) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The coordinator waits until all ranks' items are as durable as was asked for."""
        save = self._save
        if save is None:
            raise InvalidError("finish comes after write_data")
        level = self._level or ("object" if not save.is_due_for_disk else "disk")
        save.wait(level, self._timeout_s)
        metadata.version = _items.VERSION
        metadata.storage_meta = StorageMeta(checkpoint_id=self.path, save_id=self.save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it could be the path of a checkpoint."""
        return is_place(checkpoint_id)

    # -- small -------------------------------------------------------------------------------

    def _before(self, run: str, step: int) -> int | None:
        _runs.note(run, self._seen)
        return _runs.newest_seen(run, step)

    def _who(self, told: _Told | None) -> tuple[int, int, str | None]:
        """(rank, world size, id of this start)."""
        if told is not None:
            return self._rank or 0, told.world, told.attempt_id
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size(), _shared_start()
        return 0, 1, None


_start: str | None = None


def _shared_start() -> str | None:
    """An id that all ranks have, drawn once: without collectives they agree on nothing later."""
    global _start
    if _start is None and dist.get_world_size() > 1:
        drawn = [uuid.uuid4().hex if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(drawn, src=0)
        _start = drawn[0]
    return _start


def _size(item: Any) -> int:
    if item.tensor_data is None:
        return 0 if item.bytes_io_data is None else int(item.bytes_io_data.nbytes)
    return int(item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize)
