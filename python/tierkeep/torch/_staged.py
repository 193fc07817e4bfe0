"""Staging straight into a slot: what an asynchronous save copies is copied once.

torch plans a save after it has staged the state. But a job saves the same form each time: what this
rank wrote last is what it will write again. So the items of the last plan are copied into a slot at
once, and the plan that comes later is held against them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from tierkeep._tierkeep import Save
from tierkeep.errors import InvalidError
from tierkeep.torch import _items


class Kept(NamedTuple):
    """What a rank wrote last."""

    #: Every name of the state, also of what other ranks wrote.
    names: frozenset[str]
    plan: SavePlan


class Staged(NamedTuple):
    """What is in a slot, and the plan that it was copied by."""

    plan: SavePlan
    save: Save

    def check(self, plan: SavePlan) -> Save:
        """The save, if `plan` is what it was copied by."""
        if _what(plan) != _what(self.plan) or plan.planner_data != self.plan.planner_data:
            raise InvalidError(
                f"step {self.save.step}: the plan is not that of the save before, by which the "
                "state was staged; the next save is staged anew"
            )
        return self.save


def _what(plan: SavePlan) -> list[Any]:
    """What is written, whatever the strides of the tensors are in which it lies."""
    return [
        (item.index, item.type)
        if item.tensor_data is None
        else (
            item.index,
            item.type,
            item.tensor_data.chunk,
            item.tensor_data.size,
            item.tensor_data.properties.dtype,
        )
        for item in plan.items
    ]


def keep(plan: SavePlan, planner: Any) -> Kept | None:
    """What the next save is staged by; `None`: the planner is one of its own kind, which may turn
    the state into something else.
    """
    if type(planner) is not DefaultSavePlanner or not planner.flatten_state_dict:
        return None
    return Kept(frozenset(planner.state_dict), plan)


class Source(_items.Plain):
    """The state as the planner will see it."""

    def __init__(self, state_dict: dict[str, Any], kept: Kept) -> None:
        self._flat, _ = flatten_state_dict(state_dict)
        self._planner = DefaultSavePlanner()
        self.fits = self._flat.keys() == kept.names and all(
            map(self._is_as_before, kept.plan.items)
        )

    def _is_as_before(self, item: WriteItem) -> bool:
        found = self.lookup_object(item.index)
        if item.tensor_data is None:
            return not isinstance(found, torch.Tensor)
        return (
            isinstance(found, torch.Tensor)
            and found.shape == item.tensor_data.chunk.sizes
            and found.dtype == item.tensor_data.properties.dtype
        )

    def resolve_data(self, item: WriteItem) -> Any:
        """As the planner's."""
        found = self.lookup_object(item.index)
        return self._planner.transform_object(item, found)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """As the planner's."""
        return find_state_dict_object(self._flat, index)
