"""`StorageReader`: `torch.distributed.checkpoint` reads from a run of tierkeep's."""

from __future__ import annotations

import dataclasses
import io
import os
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader as _StorageReader
from torch.futures import Future

from tierkeep._address import anywhere
from tierkeep._build import Builder, Key, Part
from tierkeep._names import is_place, place
from tierkeep._tierkeep import Found, Reader
from tierkeep.errors import InvalidError
from tierkeep.torch import _items, _runs


class StorageReader(_StorageReader):
    """Reads a distributed checkpoint from a run of tierkeep's, whoever saved it: torch's
    `dcp.save` or a `tierkeep.Checkpointer`.

        reader = tierkeep.torch.StorageReader("/ckpt/gpt/step-100")
        dcp.load(state_dict, storage_reader=reader)

    Bytes come from the nearest tier and are checked; only chunks with wanted elements are read.
    Takes no lock and writes nothing. Where nodes have directories of their own it sees this node's
    alone: it wants a shared directory or a bucket.

    Args:
        path: `<run>/step-100`, or the run: then the newest complete checkpoint.
        ram_dir, storage_options: as in `tierkeep.load`.
        allow_pickle: `module:Name` of what may be unpickled of a run that a `Checkpointer` saved.
            (What torch's planners have turned into bytes they unpickle themselves.)
        threads: of the copy; default: as many as help.

    Raises:
        CheckpointNotFoundError: there is no such run or step.
        CorruptError: no tier has a good copy.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: Any = None,
        *,
        ram_dir: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, str] | None = None,
        allow_pickle: frozenset[str] = frozenset(),
        threads: int | None = None,
    ) -> None:
        super().__init__()
        del _extension_registry  # It names what transformed a file: no file of ours was.
        self.path = path
        self._ram_dir = None if ram_dir is None else os.fspath(ram_dir)
        self._storage_options = storage_options
        self._allow_pickle = allow_pickle
        self._threads = threads
        self.load_id = uuid.uuid4().hex
        self._shards: list[Found] = []
        self._places: dict[str, _items.Leaf] = {}
        self._metadata = Metadata({})

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The path of the checkpoint that is read."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another checkpoint is about to be read."""
        if checkpoint_id:
            self.path = checkpoint_id
        self.load_id = uuid.uuid4().hex
        self._shards, self._places, self._metadata = [], {}, Metadata({})

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint has: names, dtypes, shapes and chunks, from all ranks' manifests."""
        if kwargs.get("rank") is not None:
            raise InvalidError("a rank has no metadata of its own: the checkpoint is one")
        run, step = place(self.path)
        reader = Reader(
            anywhere(run, self._storage_options), self._ram_dir, dict(self._storage_options or {})
        )
        shards, _ = reader.choose(step)
        self._shards = [found for _, found in shards]
        self._places = _items.leaves(self._shards)
        self._metadata = _items.metadata(self._places, self._shards)
        first = self._shards[0]
        saved = _runs.save_id(first.step, first.attempt)
        meta = StorageMeta(checkpoint_id=self.path, save_id=saved, load_id=self.load_id)
        self._metadata.storage_meta = meta
        _runs.note(run, [first.step])
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Says which checkpoint this rank has chosen."""
        first = self._shards[0]
        return dataclasses.replace(plan, storage_data=(first.step, first.attempt))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """All ranks read one checkpoint: a newer one may come while they choose."""
        chosen = sorted({plan.storage_data for plan in plans})
        if len(chosen) > 1:
            what = " and ".join(f"step {step} of attempt {attempt}" for step, attempt in chosen)
            raise InvalidError(
                f"{self.path}: the ranks chose {what}: name the step, or load while none is saved"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads this rank's items straight into the tensors that the planner names."""
        if not self._shards:
            raise InvalidError("read_data comes after read_metadata")
        targets: list[tuple[Key, torch.Tensor]] = []
        tensors: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        for item in plan.items:
            leaf = self._places[item.storage_index.fqn]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._value(leaf))
                continue
            target = planner.resolve_tensor(item).detach()
            if tuple(target.shape) != tuple(item.lengths):
                raise InvalidError(
                    f"{item.storage_index.fqn}: {tuple(item.lengths)} elements go into "
                    f"a tensor of shape {tuple(target.shape)}"
                )
            shape, dtype = self._form(item.storage_index.fqn)
            within = target
            if target.dtype != dtype or target.device.type != "cpu":
                within = torch.empty(target.shape, dtype=dtype, device="cpu")
            chunk = item.storage_index.offset or (0,) * len(shape)
            offset = tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True))
            if within.numel() > 0:
                size = tuple(within.shape)
                part = Part(leaf.saved.name, shape, offset, size, leaf.saved.rank)
                targets.append((part, within))
            tensors.append((item, target, within))
        if targets:
            self._shards[0].read([targets], self._threads)
        for item, target, within in tensors:
            if within is not target:
                target.copy_(within)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it could be the path of a checkpoint."""
        return is_place(checkpoint_id)

    # -- small -------------------------------------------------------------------------------

    def _form(self, fqn: str) -> tuple[tuple[int, ...], torch.dtype]:
        described = self._metadata.state_dict_metadata[fqn]
        assert isinstance(described, TensorStorageMetadata)
        return tuple(described.size), described.properties.dtype

    def _value(self, leaf: _items.Leaf) -> io.BytesIO:
        builder = Builder(leaf.found, self._allow_pickle)
        make = builder.make(leaf.saved, leaf.path)
        if builder.targets:
            builder.read(self._threads)
        return _items.to_bytes(leaf.saved, make)
