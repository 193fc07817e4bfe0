"""Marks: what the Rust side puts into a stored tree where something must still be made.

A type is looked up, a tensor gets memory, a dict needs its keys. Nothing here does any of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Tensor:
    #: In the table of the shard; with a `#` behind it, of one that the ranks have boxes of.
    name: str
    lib: str
    param: bool
    #: The rank whose table it is, where it is another one's.
    rank: int | None = None


@dataclass(slots=True, eq=False)
class Object:
    """The `state_dict()` of an object, in the object's own place."""

    tree: Any


@dataclass(slots=True, eq=False)
class Foreign:
    """A place that only other ranks have, as the first of them has it."""

    tree: Any
    #: As the other ones have it.
    others: list[Any]
    #: It is in another one: taken where that is.
    inner: bool


@dataclass(slots=True, eq=False)
class Mapping:
    kind: str
    entries: list[tuple[Any, Any]]
    factory: str | None


@dataclass(slots=True, eq=False)
class Set:
    kind: str
    items: list[Any]


@dataclass(slots=True, eq=False)
class Deque:
    maxlen: int | None
    items: list[Any]


@dataclass(slots=True, eq=False)
class NamedTuple:
    type_name: str
    fields: dict[str, Any]


@dataclass(slots=True, eq=False)
class Dataclass:
    type_name: str
    fields: dict[str, Any]


@dataclass(slots=True, eq=False)
class Enum:
    type_name: str
    name: str


@dataclass(slots=True, eq=False)
class NumpyScalar:
    dtype: str
    data: bytes


@dataclass(slots=True, eq=False)
class TorchDtype:
    name: str


@dataclass(slots=True, eq=False)
class TorchSize:
    dims: tuple[int, ...]


@dataclass(slots=True, eq=False)
class TorchDevice:
    name: str


@dataclass(slots=True, eq=False)
class Pickle:
    data: bytes


def kind(saved: Any) -> str:
    """What a place was saved as, in words."""
    names = {Mapping: "a dict", Tensor: "a tensor", Object: "an object", type(None): "None"}
    return names.get(type(saved), type(saved).__name__)
