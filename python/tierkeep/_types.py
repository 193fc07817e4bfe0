"""From the names of types in a checkpoint to types, without running code that the checkpoint names.

A type is used if the live state has an instance of it in that place, or if its module has been
imported already and it really is what the checkpoint says: a NamedTuple, a dataclass with these
fields, an enum with this member. Instances are made without `__init__`. All else becomes a generic
stand-in with the same fields.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import importlib
import importlib.util
import io
import pickle
import sys
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tierkeep import _saved, _tierkeep
from tierkeep.errors import InvalidError, UnavailableError

TORCH_DTYPES: dict[str, str] = _tierkeep.torch_dtypes()
NUMPY_DTYPES: dict[str, str] = _tierkeep.numpy_dtypes()
ML_DTYPES: dict[str, str] = _tierkeep.ml_dtypes()


class Missing(enum.Enum):
    """Nothing is there, which is not the same as None."""

    MISSING = enum.auto()


MISSING = Missing.MISSING


class UnknownEnum(NamedTuple):
    """A member of an enum whose class this process does not have."""

    type_name: str
    name: str


def torch_if_imported() -> Any:
    """torch, if the script has imported it."""
    return sys.modules.get("torch")


def library(name: str) -> Any:
    """torch, numpy or ml_dtypes; imported if need be, `None` if it is not installed.

    Only for reading: a tensor that was saved as torch's comes back as torch's.
    """
    if name in sys.modules:
        return sys.modules[name]
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def name_of(cls: type) -> str:
    """`module:QualName`, as manifests have it."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_type(type_name: str, live: object = MISSING) -> type | None:
    if live is not MISSING and name_of(type(live)) == type_name:
        return type(live)
    module, _, qualname = type_name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        # Not getattr: a module's __getattr__ may import.
        if not isinstance(found, type | types.ModuleType):
            return None
        found = vars(found).get(part)
    return found if isinstance(found, type) else None


def make_named_tuple(saved: _saved.NamedTuple, values: list[Any], live: object = MISSING) -> Any:
    cls = find_type(saved.type_name, live)
    names = tuple(saved.fields)
    if cls is not None and issubclass(cls, tuple) and getattr(cls, "_fields", None) == names:
        return tuple.__new__(cls, values)
    name = saved.type_name.rpartition(":")[2].rpartition(".")[2]
    name = name if name.isidentifier() else "Generic"
    generic = collections.namedtuple(name, names, rename=True)  # type: ignore[misc]
    return tuple.__new__(generic, values)


def make_dataclass(saved: _saved.Dataclass, values: list[Any], live: object = MISSING) -> Any:
    cls = dataclass_type(saved, live)
    if cls is None:
        return types.SimpleNamespace(**dict(zip(saved.fields, values, strict=True)))
    made: Any = object.__new__(cls)
    for name, value in zip(saved.fields, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def dataclass_type(saved: _saved.Dataclass, live: object = MISSING) -> type | None:
    cls = find_type(saved.type_name, live)
    if cls is None or not dataclasses.is_dataclass(cls):
        return None
    if cls.__new__ is not object.__new__ or {f.name for f in dataclasses.fields(cls)} != set(
        saved.fields
    ):
        return None
    return cls


def make_enum(saved: _saved.Enum, live: object = MISSING) -> Any:
    cls = find_type(saved.type_name, live)
    if cls is not None and issubclass(cls, enum.Enum):
        member = cls.__members__.get(saved.name)
        if member is not None:
            return member
    return UnknownEnum(saved.type_name, saved.name)


_FACTORIES: dict[str, Callable[[], Any]] = {
    name_of(cls): cls
    for cls in (int, float, complex, bool, str, bytes, list, tuple, dict, set, frozenset)
} | {name_of(cls): cls for cls in (collections.OrderedDict, collections.Counter, collections.deque)}


def make_mapping(saved: _saved.Mapping, entries: Mapping[Any, Any], live: object = MISSING) -> Any:
    if saved.kind == "OrderedDict":
        return collections.OrderedDict(entries)
    if saved.kind == "Counter":
        counter: collections.Counter[Any] = collections.Counter()
        dict.update(counter, entries)
        return counter
    if saved.kind == "defaultdict":
        return collections.defaultdict(_factory(saved.factory, live), entries)
    return dict(entries)


def _factory(name: str | None, live: object) -> Callable[[], Any] | None:
    """A factory is code: one of Python's own, or the one that the live state has."""
    if name is None:
        return None
    current = getattr(live, "default_factory", None)
    if isinstance(current, type) and name_of(current) == name:
        return current
    return _FACTORIES.get(name)


def make_numpy_scalar(saved: _saved.NumpyScalar) -> Any:
    numpy = library("numpy")
    if numpy is None:
        raise UnavailableError("a numpy scalar cannot be made: numpy is not installed")
    try:
        return _numpy_scalar(numpy, saved)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InvalidError(
            f"a numpy scalar of dtype {saved.dtype!r} in {len(saved.data)} bytes"
        ) from error


def _numpy_scalar(numpy: Any, saved: _saved.NumpyScalar) -> Any:
    dtype = numpy.dtype(saved.dtype)
    if dtype.kind in "OV" or dtype.itemsize != len(saved.data):
        raise ValueError("not a scalar")
    # An array of texts drops NULs at their ends, which a scalar keeps.
    if dtype.kind == "S":
        return numpy.bytes_(saved.data)
    if dtype.kind == "U":
        order = "be" if dtype.str[0] == ">" else "le"
        return numpy.str_(saved.data.decode(f"utf-32-{order}", "surrogatepass"))
    return numpy.frombuffer(saved.data, dtype=dtype)[0]


def make_torch(saved: _saved.TorchDtype | _saved.TorchSize | _saved.TorchDevice) -> Any:
    torch = library("torch")
    if isinstance(saved, _saved.TorchSize):
        return torch.Size(saved.dims) if torch else saved.dims
    if torch is None:
        return saved.name
    if isinstance(saved, _saved.TorchDevice):
        return torch.device(saved.name)
    dtype = getattr(torch, saved.name, None) if saved.name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise InvalidError(f"this torch has no dtype {saved.name!r}")
    return dtype


# What pickles of ordinary objects name beside their own class; none of it does anything by itself.
_HARMLESS = frozenset(
    {"copyreg:_reconstructor", "copyreg:__newobj__", "builtins:object", "collections:OrderedDict"}
)


class _NamedOnly(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}:{name}" in self.allowed or f"{module}:{name}" in _HARMLESS:
            return super().find_class(module, name)
        raise InvalidError(
            f"a pickle names {module}:{name}; nothing is unpickled that allow_pickle does not name"
        )


def unpickle(data: bytes, allowed: Collection[str]) -> Any:
    if not allowed:
        raise InvalidError(
            'a pickle: it is opened only if allow_pickle names what is in it, as "module:Name"'
        )
    return _NamedOnly(data, allowed).load()
