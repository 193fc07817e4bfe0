"""What DeepSpeed puts into its dicts, as plain values and back."""

from __future__ import annotations

import argparse
import collections
from typing import Any, NamedTuple

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from tierkeep._types import name_of
from tierkeep.errors import InvalidError

#: Objects that are their attributes alone; all others need `allow_pickle`. They are made again
#: without `__init__`, and only of these classes: a checkpoint chooses one, and runs nothing.
KNOWN: dict[str, type] = {
    name_of(cls): cls for cls in (LossScaler, DynamicLossScaler, argparse.Namespace)
}

#: Where the versions of a module's `state_dict()` lie among its tensors.
METADATA = "state_dict._metadata"


class Instance(NamedTuple):
    """An object of one of the `KNOWN` classes."""

    type_name: str
    attributes: dict[str, Any]


def plain(value: Any) -> Any:
    """`value` as a `Checkpointer` stores it. Tensors stay what they are, containers are new."""
    kind = type(value)
    if kind in KNOWN.values():
        return Instance(name_of(kind), plain(vars(value)))
    if kind is dict:
        return {key: plain(below) for key, below in value.items()}
    if kind is collections.OrderedDict:
        rows = collections.OrderedDict((key, plain(below)) for key, below in value.items())
        if (metadata := getattr(value, "_metadata", None)) is not None:
            rows[METADATA] = plain(metadata)
        return rows
    return kind(map(plain, value)) if kind in (list, tuple) else value


def given(value: Any) -> Any:
    """The same backwards, of what was just read."""
    kind = type(value)
    if kind is Instance:
        cls = KNOWN.get(value.type_name)
        if cls is None:
            raise InvalidError(f"an object of {value.type_name}: this DeepSpeed has none like it")
        made: Any = object.__new__(cls)
        vars(made).update(given(value.attributes))
        return made
    if kind in (dict, collections.OrderedDict):
        metadata = value.pop(METADATA, None)
        value.update((key, given(below)) for key, below in list(value.items()))
        if metadata is not None:
            value._metadata = given(metadata)
        return value
    return kind(map(given, value)) if kind in (list, tuple) else value
