"""What a run without checkpoints begins with: the weights of another run, or of a plain safetensors
file.

The source is only read: no attempt, no lock, no repair. What fits is planned first, and all that
does not fit is reported before a byte is changed.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tierkeep import _rename, _saved, _torch, _types
from tierkeep._address import directory
from tierkeep._build import Include, Key, Keys, Make, Part, Source, empty, key_of
from tierkeep._filling import is_tensor
from tierkeep._restore import Plan, is_object
from tierkeep._tierkeep import Found, Reader, describe, join_path
from tierkeep.errors import (
    CheckpointNotFoundError,
    CorruptError,
    MismatchError,
    TierkeepError,
)

# As in the safetensors library: a header that is longer is no header.
_HEADER_BYTES_MAX = 100_000_000


@dataclasses.dataclass(slots=True)
class Origin:
    """Where a run's first state comes from, and for whom."""

    path: str
    ram_dir: str | None
    #: The ranks that save here, and whose shard this one restores.
    savers: list[int]
    shard_rank: int
    #: Which checkpoint all ranks take; given this rank's choice.
    agree: Callable[[str], str]

    def fill(
        self,
        state: Any,
        include: Iterable[str] | None,
        rename: _rename.Rename | None,
        allow_pickle: set[str],
        threads: int | None,
    ) -> str:
        """Fills `state`; a sentence about what was taken."""
        weights = dict(_weights(state))
        try:
            source, where = self._source()
            plan = _Plan(source, allow_pickle=allow_pickle, strict=False, include=Include(include))
            if include is not None and isinstance(source, Found):
                # As a restore would, for whatever is named: optimizers and values too.
                make = plan.match(_rename.renamed(source.tree, rename), state, ())
            else:
                make = plan.match_by_name(_names(source, weights, state, rename), state)
            plan.check()
            wanted = {**{key: lives[0] for key, lives in plan.on_device.items()}, **plan.targets}
            if not wanted:
                raise _nothing(source, weights)
            if isinstance(source, _Shards | _File):
                source.check(wanted)
            plan.fill(threads)
        except TierkeepError as error:
            error.add_note(f"(init_from={self.path!r})")
            raise
        make()
        filled = len(plan.filled & weights.keys())
        return f"{filled} of the state's {len(weights)} tensors were taken from {where}"

    def _source(self) -> tuple[Source, str]:
        """What is read, and that in words."""
        if os.path.isfile(self.path) or self.path.endswith(".safetensors"):
            return _File(self.path), self.path
        shards, where = self._choose()
        return (shards[0][1] if len(shards) == 1 else _Shards(shards)), where

    def _choose(self) -> tuple[list[tuple[int, Found]], str]:
        """The shards to read, and the checkpoint in words."""
        reader = Reader(directory(self.path), self.ram_dir)
        found = reader.choose()[0][0][1]
        mine = f"{found.step} {found.attempt}"
        # That run may go on meanwhile: all ranks take the one that the first one saw.
        step, attempt = map(int, self.agree(mine).split())
        shards, _ = reader.choose(step, attempt)
        where = f"{self.path}, step {step} of attempt {attempt}"
        if [rank for rank, _ in shards] == self.savers:
            shards, _ = reader.choose(step, attempt, [self.shard_rank])
        return shards, where


class _Plan(Plan):
    """A plan that knows which places of the state it fills, by path."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.filled: set[str] = set()

    def _fits(self, saved: _saved.Tensor, live: Any, keys: Keys) -> dict[str, Any] | None:
        facts = super()._fits(saved, live, keys)
        if facts is not None:
            self.filled.add(join_path(keys))
        return facts

    def match_by_name(self, names: Mapping[str, str], state: Any) -> Make:
        """Plans what `names` has, from paths in the state to names in the source."""
        makes: list[Make] = []
        for keys, live in _places(state, ()):
            included = any(self.include(keys[:end]) for end in range(len(keys) + 1))
            if not is_tensor(live):
                paths = {name: join_path((*keys, name)) for name in _torch.module_state(live)}
                rows = [
                    (name, _saved.Tensor(names[path], "torch", False))
                    for name, path in paths.items()
                    if path in names
                ]
                if rows:
                    tree = _saved.Mapping("dict", rows, None)
                    makes.append(self._match_module(tree, live, keys, included))
            elif included and (name := names.get(join_path(keys))) is not None:
                self.into(_saved.Tensor(name, _library(live), False), live, keys)
        return lambda: [make() for make in makes]


# -- the state -------------------------------------------------------------------------------


def _places(live: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """What holds weights: torch modules, and tensors outside of other objects."""
    if is_tensor(live) or _is_module(live):
        yield keys, live
    elif is_object(live):
        return
    elif isinstance(live, dict):
        for key, value in live.items():
            yield from _places(value, (*keys, key))
    elif isinstance(live, tuple) and hasattr(live, "_fields"):
        for name in live._fields:
            yield from _places(getattr(live, name), (*keys, name))
    elif isinstance(live, list | tuple | collections.deque):
        for index, value in enumerate(live):
            yield from _places(value, (*keys, index))
    elif dataclasses.is_dataclass(live) and not isinstance(live, type):
        for field in dataclasses.fields(live):
            yield from _places(getattr(live, field.name, None), (*keys, field.name))


def _weights(state: Any) -> Iterator[tuple[str, Any]]:
    """Each tensor among them by its path."""
    for keys, live in _places(state, ()):
        if is_tensor(live):
            yield join_path(keys), live
            continue
        for name, value in _torch.module_state(live).items():
            if is_tensor(value):
                yield join_path((*keys, name)), value


def _is_module(live: Any) -> bool:
    torch = _types.torch_if_imported()
    return torch is not None and isinstance(live, torch.nn.Module)


def _library(live: Any) -> str:
    torch = _types.torch_if_imported()
    return "torch" if torch is not None and isinstance(live, torch.Tensor) else "numpy"


def _names(
    source: Source, weights: Mapping[str, Any], state: Any, rename: _rename.Rename | None
) -> dict[str, str]:
    """Names in the source by the paths that they stand for in the state."""
    if isinstance(source, Found):
        paths = {name: name for name in source.tensors}
        paths.update((path, tensor.name) for path, tensor in _rename.tensors(source.tree))
    else:
        paths = {name: name for name in source.tensors}
    renamed = {new: paths[old] for new, old in _rename.rename_paths(paths, rename).items()}
    modules = [keys for keys, live in _places(state, ()) if not is_tensor(live)]
    if isinstance(source, _File) and len(modules) == 1 and not renamed.keys() & weights.keys():
        # A module's own file: its names are those inside the module.
        return {join_path((*modules[0], name)): old for name, old in renamed.items()}
    return renamed


def _nothing(source: Source, weights: Mapping[str, Any]) -> MismatchError:
    there, here = sorted(source.tensors), sorted(weights)
    return MismatchError(
        "no tensor has the name of a tensor of the state: "
        f"the source has {_some(there)}, the state {_some(here)} (rename= maps one to the other)",
        [f"{path}: not in the source" for path in here],
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


# -- the sources -----------------------------------------------------------------------------


class _Shards:
    """The tensors of several ranks' shards, each found whole in one of them. Where several have
    one, they have the same bytes, or it is nobody's.
    """

    def __init__(self, shards: Sequence[tuple[int, Found]]) -> None:
        self._shards = dict(shards)
        self._tables = {rank: found.tensors for rank, found in shards}
        #: Path to (rank, name there).
        self._places: dict[str, list[tuple[int, str]]] = {}
        for rank, found in shards:
            elsewhere = found.elsewhere
            for path, tensor in _rename.tensors(found.tree):
                # What ranks hold alike lies in one place.
                place = (elsewhere.get(tensor.name, rank), tensor.name)
                places = self._places.setdefault(path, [])
                # What is cut is one tensor, whichever rank's shard is asked for it.
                if place not in places and not (places and tensor.name.endswith("#")):
                    places.append(place)
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, places in self._places.items():
            for rank, name in places:
                if name in self._tables[rank]:
                    self.tensors.setdefault(path, self._tables[rank][name])

    def check(self, wanted: Mapping[Key, Any]) -> None:
        """Raises those that the ranks do not agree about."""
        differ = []
        for path in {_path(key): None for key in wanted}:
            first, *others = self._places[path]
            for other in others:
                if not self._same(first, other):
                    differ.append(
                        f"{path}: rank {first[0]} and rank {other[0]} have different ones"
                    )
                    break
        if differ:
            lines = "".join(f"\n  {line}" for line in differ)
            raise MismatchError(
                f"the source was saved by {len(self._shards)} ranks, this job has other ones that "
                f"save, and which rank's tensor is meant cannot be told:{lines}",
                differ,
            )

    def _same(self, one: tuple[int, str], other: tuple[int, str]) -> bool:
        entries = [self._tables[rank].get(name) for rank, name in (one, other)]
        if entries[0] is None or entries[0] != entries[1]:
            return False
        if 0 in entries[0][1]:
            return True
        return self._bytes(*one) == self._bytes(*other)

    def _bytes(self, rank: int, name: str) -> bytes:
        lib = "numpy" if _types.torch_if_imported() is None else "torch"
        tensor = empty(lib, *self._tables[rank][name], (name,))
        self._shards[rank].read([[(name, tensor)]])
        return bytes(_memory(tensor))

    def read(
        self, turns: Iterable[Sequence[tuple[Key, Any]]], threads: int | None = None
    ) -> tuple[str, list[str]]:
        tier, damaged = "", list[str]()
        for targets in turns:
            left = list(targets)
            while left:
                # Of one shard at a time, and of tied tensors one.
                rank = self._places[_path(left[0][0])][0][0]
                batch: dict[Key, Any] = {}
                rest = []
                for key, target in left:
                    there, name = self._places[_path(key)][0]
                    real = self._there(key, name)
                    if there == rank and real not in batch:
                        batch[real] = target
                    else:
                        rest.append((key, target))
                tier, found = self._shards[rank].read([list(batch.items())], threads)
                damaged += found
                left = rest
        return tier, list(dict.fromkeys(damaged))

    def _there(self, key: Key, name: str) -> Key:
        """What is read of the shard that has it by that name."""
        shape = self.tensors[_path(key)][1]
        if isinstance(key, Part):
            return Part(name, shape, key.offset, key.size, None)
        return key_of(_saved.Tensor(name, "", False), shape)


def _path(key: Key) -> str:
    return key if isinstance(key, str) else key.name


class _File:
    """A plain safetensors file, of whoever wrote it. It has no checksums."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _HEADER_BYTES_MAX):
                    raise ValueError("its header is too long")
                header = json.loads(file.read(length))
            for name, row in header.items():
                if name != "__metadata__":
                    self._add(name, row, 8 + length, size)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"there is no {path}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptError(f"{path} is not a safetensors file: {error}") from error

    def _add(self, name: str, row: Any, data: int, size: int) -> None:
        shape = tuple(int(n) for n in row["shape"])
        begin, end = (int(n) for n in row["data_offsets"])
        if not 0 <= begin <= end <= size - data or min(shape, default=0) < 0:
            raise ValueError(f"{name} does not lie in it")
        self.tensors[name] = (str(row["dtype"]), shape)
        self._spans[name] = (data + begin, end - begin)

    def read(
        self, turns: Iterable[Sequence[tuple[Key, Any]]], threads: int | None = None
    ) -> tuple[str, list[str]]:
        for targets in turns:
            self._fill(targets)
        return "file", []

    def check(self, wanted: Mapping[Key, Any]) -> None:
        """Raises before anything is changed: its bytes are not those of its shape."""
        for key, target in wanted.items():
            name = _path(key)
            shape = target.shape if isinstance(key, str) else key.shape
            if math.prod(shape) * target.itemsize != self._spans[name][1]:
                raise CorruptError(f"{self._path}: {name} has {self._spans[name][1]} bytes")

    def _fill(self, targets: Sequence[tuple[Key, Any]]) -> None:
        with open(self._path, "rb") as file:
            for key, target in targets:
                name, part, shape = _path(key), None, None
                if isinstance(key, Part):
                    part, shape = _slices(key), key.shape
                in_place = part is None and describe(target)["contiguous"]
                whole = target if in_place else _torch.like(target, shape)
                begin, length = self._spans[name]
                file.seek(begin)
                if length and file.readinto(_memory(whole)) != length:
                    raise CorruptError(f"{self._path}: {name} is cut off")
                if whole is not target:
                    _torch.copy(target, whole if part is None else whole[part])


def _slices(part: Part) -> tuple[slice, ...]:
    """The place of a box in its tensor."""
    return tuple(
        slice(begin, begin + size) for begin, size in zip(part.offset, part.size, strict=True)
    )


def _memory(tensor: Any) -> memoryview:
    """The memory of a contiguous tensor, for as long as that lives."""
    low, high = describe(tensor)["span"]
    return memoryview((ctypes.c_char * (high - low)).from_address(low)).cast("B")
