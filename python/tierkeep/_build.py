"""From a stored tree to a new one: marks become values, tensors get fresh memory.

`Builder.make` gives a function for each part of the tree. The functions are called when the
bytes have been read.
"""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tierkeep import _jax, _merge, _saved, _types
from tierkeep._tierkeep import join_path
from tierkeep._types import MISSING
from tierkeep.errors import InvalidError, TierkeepError, UnavailableError

Make = Callable[[], Any]
Keys = tuple[Any, ...]


class Part(NamedTuple):
    """A box of a tensor."""

    #: As in the table; with a `#` behind it, of a tensor that the ranks have boxes of.
    name: str
    #: Of the tensor, in elements.
    shape: tuple[int, ...]
    #: Where the box begins in it.
    offset: tuple[int, ...]
    #: Of the box.
    size: tuple[int, ...]
    #: The rank whose tensor it is, where it is another one's.
    rank: int | None


#: What is read: a tensor of the rank's own shard by its name, or a box of any.
Key = str | Part


def key_of(saved: _saved.Tensor, shape: tuple[int, ...]) -> Key:
    """The whole of a tensor."""
    if saved.rank is None and not saved.name.endswith("#"):
        return saved.name
    return Part(saved.name, shape, (0,) * len(shape), shape, saved.rank)


def place(keys: Keys) -> str:
    return join_path(keys) if keys else "the state"


class Include:
    """Glob patterns over escaped paths. One that matches a place takes in all below it."""

    def __init__(self, patterns: Iterable[str] | None) -> None:
        if isinstance(patterns, str):
            patterns = (patterns,)
        # `model/*` is the whole of `model`.
        self.patterns = None if patterns is None else [p.removesuffix("/*") for p in patterns]
        self.unused = set(self.patterns or ())

    def __call__(self, keys: Keys) -> bool:
        if self.patterns is None:
            return True
        if not keys:
            return self._match("*")
        return self._match(join_path(keys))

    def _match(self, path: str) -> bool:
        assert self.patterns is not None
        hits = [p for p in self.patterns if fnmatch.fnmatchcase(path, p)]
        self.unused.difference_update(hits)
        return bool(hits)

    def check(self) -> None:
        if self.unused:
            raise InvalidError(
                f"include: nothing in the checkpoint matches {', '.join(sorted(self.unused))}"
            )


class Source(Protocol):
    """Tensors by name, and their bytes: one rank's shard (`Found`), or something like it."""

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]: ...
    def read(
        self, turns: Iterable[Sequence[tuple[Key, Any]]], threads: int | None = None
    ) -> tuple[str, list[str]]: ...


class Builder:
    """Makes the values of one shard's tree."""

    def __init__(
        self,
        found: Source,
        allow_pickle: Collection[str],
        others: Mapping[int, _merge.Table] | None = None,
    ) -> None:
        self.found = found
        self.table = found.tensors
        #: The tables of other ranks.
        self.others = others or {}
        self.allow_pickle = allow_pickle
        #: What the bytes of each tensor or box are read into: torch tensors and numpy arrays.
        self.targets: dict[Key, Any] = {}
        #: What has been made of each tensor, by what is read, library and being a parameter.
        self.made: dict[tuple[Key, str, bool], Any] = {}
        #: Arrays of JAX that were made of them.
        self.arrays: dict[Key, Any] = {}

    def read(self, threads: int | None) -> tuple[str, list[str]]:
        """Reads the bytes. Returns the tier and what was damaged on the way."""
        return self.found.read([list(self.targets.items())], threads)

    def make(self, saved: Any, keys: Keys) -> Make:
        """New values, new containers, fresh memory; objects as the dicts that they gave."""
        if isinstance(saved, _saved.Foreign):
            return self.make(self.foreign(saved, keys), keys)
        if _merge.is_gap(saved):
            return lambda: None
        if isinstance(saved, _saved.Object):
            return self.make(saved.tree, keys)
        if isinstance(saved, _saved.Tensor):
            return self.make_tensor(saved, keys)
        if type(saved) is list:
            items = self.make_all(saved, keys)
            return lambda: [make() for make in items]
        if type(saved) is tuple:
            items = self.make_all(saved, keys)
            return lambda: tuple(make() for make in items)
        if isinstance(saved, _saved.Mapping):
            return self._make_mapping(saved, keys)
        if isinstance(saved, _saved.Deque):
            items, maxlen = self.make_all(saved.items, keys), saved.maxlen
            return lambda: collections.deque((make() for make in items), maxlen)
        if isinstance(saved, _saved.NamedTuple):
            named = saved
            items = self.make_fields(named.fields, keys)
            return lambda: _types.make_named_tuple(named, [make() for make in items])
        if isinstance(saved, _saved.Dataclass):
            record = saved
            items = self.make_fields(record.fields, keys)
            return lambda: _types.make_dataclass(record, [make() for make in items])
        value = self.leaf(saved, keys)
        return lambda: value

    def make_all(self, items: Sequence[Any], keys: Keys) -> list[Make]:
        return [self.make(item, (*keys, index)) for index, item in enumerate(own(items))]

    def make_fields(self, fields: dict[str, Any], keys: Keys) -> list[Make]:
        return [self.make(item, (*keys, name)) for name, item in fields.items()]

    def _make_mapping(self, saved: _saved.Mapping, keys: Keys) -> Make:
        entries = [
            (key, self.make(value, (*keys, key))) for key, value in self.entries(saved, keys)
        ]
        return lambda: _types.make_mapping(saved, {key: make() for key, make in entries})

    def entries(
        self, saved: _saved.Mapping, keys: Keys, live: Container[Any] = ()
    ) -> list[tuple[Any, Any]]:
        """The rows of a mapping with their keys made. Those that only other ranks have: where
        `live` has them too.
        """
        rows = []
        for mark, value in saved.entries:
            key = self.hashable(mark, keys)
            if not isinstance(value, _saved.Foreign):
                rows.append((key, value))
            elif value.inner or key in live:
                rows.append((key, self.foreign(value, (*keys, key))))
        if len({key for key, _ in rows}) != len(rows):
            raise InvalidError(f"{place(keys)}: two keys are equal")
        return rows

    def foreign(self, saved: _saved.Foreign, keys: Keys) -> Any:
        """The tree of a place that only other ranks have."""
        return saved.tree

    def hashable(self, saved: Any, keys: Keys) -> Any:
        """A key of a dict or a member of a set."""
        value = self.make(saved, keys)()
        try:
            hash(value)
        except TypeError as error:
            raise InvalidError(f"{place(keys)}: {value!r} cannot be a key") from error
        return value

    def leaf(self, saved: Any, keys: Keys, live: object = MISSING) -> Any:
        """A value without places below it."""
        try:
            if isinstance(saved, _saved.Set):
                items = [self.hashable(item, keys) for item in saved.items]
                return set(items) if saved.kind == "set" else frozenset(items)
            if isinstance(saved, _saved.Enum):
                return _types.make_enum(saved, live)
            if isinstance(saved, _saved.NumpyScalar):
                return _types.make_numpy_scalar(saved)
            if isinstance(saved, _saved.TorchDtype | _saved.TorchSize | _saved.TorchDevice):
                return _types.make_torch(saved)
            if isinstance(saved, _saved.Pickle):
                return _types.unpickle(saved.data, self.allow_pickle)
        except TierkeepError as error:
            error.add_note(f"(at {place(keys)})")
            raise
        return saved

    def make_tensor(self, saved: _saved.Tensor, keys: Keys) -> Make:
        """A new tensor; arrays of JAX as such where the script has imported it, else as numpy's."""
        memory = self.fresh(saved, keys)
        if saved.lib != "jax" or _jax.if_imported() is None:
            return lambda: memory
        arrays = self.arrays
        key = key_of(saved, self.entry(saved, keys)[1])

        def make() -> Any:
            if key not in arrays:
                arrays[key] = _jax.array(memory)
            return arrays[key]

        return make

    def fresh(self, saved: _saved.Tensor, keys: Keys) -> Any:
        """New memory for a tensor; the same for all its names."""
        name = key_of(saved, self.entry(saved, keys)[1])
        key = (name, saved.lib, saved.param)
        if key not in self.made:
            base = (name, saved.lib, False)
            if base not in self.made:
                self.made[base] = self._bind(saved, keys)
            self.made[key] = _parameter(self.made[base]) if saved.param else self.made[base]
        return self.made[key]

    def _bind(self, saved: _saved.Tensor, keys: Keys) -> Any:
        dtype, shape = self.entry(saved, keys)
        key = key_of(saved, shape)
        current = self.targets.get(key)
        if current is not None and (saved.lib == "torch") == _is_torch(current):
            return current
        if current is not None:
            # One memory under two libraries: a numpy view of a torch tensor, or the reverse.
            return (
                current.numpy()
                if _is_torch(current)
                else _types.library("torch").from_numpy(current)
            )
        self.targets[key] = empty(saved.lib, dtype, shape, keys)
        return self.targets[key]

    def entry(self, saved: _saved.Tensor, keys: Keys) -> tuple[str, tuple[int, ...]]:
        """The dtype (as in safetensors) and the shape of a tensor."""
        table = self.table if saved.rank is None else self.others.get(saved.rank, {})
        # What is cut may have no box here.
        tables = (table, *self.others.values()) if saved.name.endswith("#") else (table,)
        entry = next((found[saved.name] for found in tables if saved.name in found), None)
        if entry is None:
            raise InvalidError(f"{place(keys)}: the checkpoint has no tensor {saved.name}")
        return entry


def own(items: Sequence[Any], live: int = 0) -> Sequence[Any]:
    """The items of a list without those at its end that only other ranks have, unless the live one
    is as long.
    """
    count = len(items)
    while count > live and (
        _merge.is_gap(items[count - 1])
        or (isinstance(items[count - 1], _saved.Foreign) and not items[count - 1].inner)
    ):
        count -= 1
    return items[:count]


def _is_torch(tensor: object) -> bool:
    torch = _types.torch_if_imported()
    return torch is not None and isinstance(tensor, torch.Tensor)


def _parameter(tensor: Any) -> Any:
    if not _is_torch(tensor):
        return tensor
    torch = _types.torch_if_imported()
    learns = tensor.is_floating_point() or tensor.is_complex()
    return torch.nn.Parameter(tensor, requires_grad=learns)


def empty(lib: str, dtype: str, shape: Sequence[int], keys: Keys) -> Any:
    """Memory on the CPU for a tensor that was saved from `lib`."""
    torch = _types.library("torch") if lib == "torch" else None
    if torch is not None and dtype in _types.TORCH_DTYPES:
        name = _types.TORCH_DTYPES[dtype]
        if not hasattr(torch, name):
            raise UnavailableError(f"{place(keys)}: torch {torch.__version__} has no {name}")
        if dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        return torch.empty(tuple(shape), dtype=getattr(torch, name), device="cpu")
    numpy = _types.library("numpy")
    if numpy is None:
        raise UnavailableError(f"{place(keys)}: tensors need torch or numpy, neither is installed")
    if dtype in _types.NUMPY_DTYPES:
        return numpy.empty(tuple(shape), dtype=_types.NUMPY_DTYPES[dtype])
    more = _types.library("ml_dtypes") if dtype in _types.ML_DTYPES else None
    if more is not None:
        return numpy.empty(tuple(shape), dtype=getattr(more, _types.ML_DTYPES[dtype]))
    raise UnavailableError(
        f"{place(keys)}: numpy has no {dtype}, and neither torch nor ml_dtypes is installed "
        "(include= leaves it out)"
    )
