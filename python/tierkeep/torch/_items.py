"""What torch's planners write and read, as a tree of tierkeep's and back.

A planner flattens a state: `model.layers.0.weight` is the path `("model", "layers.0.weight")`,
which it keeps as its data. The tree is the nested one, so that a run that torch wrote is read by a
`Checkpointer`, by `tierkeep.load` and by JAX, and what a `Checkpointer` wrote by torch's loaders.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from tierkeep import _merge, _saved, _types
from tierkeep._build import Make
from tierkeep._sharded import Box, Pieces
from tierkeep._tierkeep import Found

Path = tuple[str | int, ...]

#: Of torch's metadata, where this torch numbers them.
VERSION: str | None = getattr(filesystem, "CURRENT_DCP_VERSION", None)


class Pickled(NamedTuple):
    """A value that a planner of torch's has turned into bytes: `torch.save` wrote them."""

    data: bytes


# -- out -------------------------------------------------------------------------------------


class Resolver(Protocol):
    """A planner of torch's, as far as it is asked here."""

    def resolve_data(self, item: Any, /) -> Any: ...


class Plain(ABC):
    """One that resolves as torch's default planner does."""

    @abstractmethod
    def resolve_data(self, item: Any, /) -> Any: ...
    @abstractmethod
    def lookup_object(self, index: MetadataIndex, /) -> Any: ...


def tree(plan: SavePlan, planner: Resolver) -> dict[str, Any]:
    """The state that the items of a plan are."""
    paths: Mapping[str, Path] = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    pieces: dict[str, Pieces] = {}
    root: dict[str, Any] = {}
    for item in plan.items:
        fqn = item.index.fqn
        path = paths.get(fqn, (fqn,))
        if item.type == WriteItemType.BYTE_IO:
            _put(root, path, _value(item, planner))
            continue
        assert item.tensor_data is not None
        local = planner.resolve_data(item)
        assert isinstance(local, torch.Tensor)
        if fqn not in pieces:
            pieces[fqn] = Pieces(tuple(item.tensor_data.size), local.dtype)
            _put(root, path, pieces[fqn])
        if local.numel() > 0:
            offset = tuple(item.tensor_data.chunk.offsets)
            pieces[fqn].boxes.append(Box(offset, local.detach(), ()))
    return root


def _value(item: WriteItem, planner: Resolver) -> Any:
    """A plain value as a `Checkpointer` stores it; any other as torch's bytes, and so all that
    another planner than torch's default may have made into something else.
    """
    if isinstance(planner, Plain) or type(planner) is DefaultSavePlanner:
        found = planner.lookup_object(item.index)
        if _is_plain(found):
            return found
    data: io.BytesIO = planner.resolve_data(item)
    return Pickled(data.getvalue())


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


def _put(root: Any, path: Path, value: Any) -> None:
    """Makes the containers on the way: lists for positions, dicts for keys."""
    at = root
    for key, below in zip(path, (*path[1:], None), strict=True):
        made: Any = value if below is None else [] if isinstance(below, int) else {}
        if isinstance(at, list):
            assert isinstance(key, int)
            at.extend([_merge.Gap()] * (key + 1 - len(at)))
            if isinstance(at[key], _merge.Gap) or below is None:
                at[key] = made
        elif key not in at or below is None:
            at[key] = made
        at = at[key]


# -- in --------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """A place of a checkpoint that torch's loaders can ask for."""

    path: Path
    #: The mark of a tensor, or a value.
    saved: Any
    #: The shard whose tree it is in.
    found: Found


def leaves(shards: list[Found]) -> dict[str, Leaf]:
    """Every place by the name that torch gives it, as the first rank has it."""
    trees = [found.tree for found in shards]
    # A rank may have only values of a list of which others have the tensors.
    split = {path for tree in trees for path in _lists(tree, ())}
    all_of_it: dict[str, Leaf] = {}
    for found, tree in zip(shards, trees, strict=True):
        elsewhere = found.elsewhere
        for path, saved in _walk(tree, (), split):
            if isinstance(saved, _saved.Tensor) and not saved.name.endswith("#"):
                saved.rank = elsewhere.get(saved.name, found.rank)
            fqn = ".".join(map(str, path))
            known = all_of_it.get(fqn)
            if known is None or _merge.is_gap(known.saved):
                all_of_it[fqn] = Leaf(path, saved, found)
    return all_of_it


def _walk(saved: Any, path: Path, split: Container[Path]) -> Iterator[tuple[Path, Any]]:
    """As torch's planners flatten a state: a list without tensors and dicts is one value."""
    if type(saved) is list and path not in split:
        yield path, saved
    elif (rows := _rows(saved)) is not None:
        for key, value in rows:
            yield from _walk(value, (*path, key), split)
    else:
        yield path, saved


def _lists(saved: Any, path: Path) -> Iterator[Path]:
    """The lists that are walked through."""
    if type(saved) is list and not _is_whole(saved):
        yield path
    for key, value in _rows(saved) or ():
        yield from _lists(value, (*path, key))


def _rows(saved: Any) -> list[tuple[str | int, Any]] | None:
    if isinstance(saved, _saved.Object):
        return _rows(saved.tree)
    if isinstance(saved, _saved.Mapping):
        # Keys that are marks have no name there.
        named = ((k, v) for k, v in saved.entries if isinstance(k, str | int | float | bool))
        return [(str(key), value) for key, value in named]
    return list(enumerate(saved)) if type(saved) is list else None


def _is_whole(items: list[Any]) -> bool:
    def holds(value: Any) -> bool:
        value = value.tree if isinstance(value, _saved.Object) else value
        return isinstance(value, _saved.Tensor | _saved.Mapping) or (
            type(value) is list and not _is_whole(value)
        )

    return not any(map(holds, items))


def metadata(places: dict[str, Leaf], shards: list[Found]) -> Metadata:
    """What torch's loaders plan by: every tensor with its chunks, and every other value."""
    boxes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], None]] = {}
    wholes: dict[str, tuple[str, tuple[int, ...]]] = {}
    tables: dict[int, _merge.Table] = {}
    for found in shards:
        tables[found.rank] = found.tensors
        for name, offset, shape in found.boxes:
            boxes.setdefault(name, {})[tuple(offset), tuple(shape)] = None
        wholes.update((n, form) for n, form in found.tensors.items() if n.endswith("#"))
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for fqn, leaf in places.items():
        saved = leaf.saved
        if not isinstance(saved, _saved.Tensor):
            described[fqn] = BytesStorageMetadata()
            continue
        rank = leaf.found.rank if saved.rank is None else saved.rank
        dtype, size = wholes[saved.name] if saved.name in wholes else tables[rank][saved.name]
        chunks = [
            ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
            for offset, shape in boxes.get(saved.name, {(((0,) * len(size)), size): None})
        ]
        properties = TensorProperties(dtype=getattr(torch, _types.TORCH_DTYPES[dtype]))
        described[fqn] = TensorStorageMetadata(properties, torch.Size(size), chunks)
    planner_data = {fqn: leaf.path for fqn, leaf in places.items()}
    whole = Metadata(state_dict_metadata=described, planner_data=planner_data, storage_data={})
    whole.version = VERSION
    return whole


def to_bytes(saved: Any, make: Make) -> io.BytesIO:
    """A value as a planner wants it."""
    if is_pickled(saved):
        return io.BytesIO(saved.fields["data"])
    stream = io.BytesIO()
    torch.save(make(), stream)
    stream.seek(0)
    return stream


def is_pickled(saved: Any) -> bool:
    """Whether it is a value that a planner of torch's turned into bytes."""
    name = f"{Pickled.__module__}:{Pickled.__qualname__}"
    return isinstance(saved, _saved.NamedTuple) and saved.type_name == name
