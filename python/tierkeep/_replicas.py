"""`replicated=`: which tensors several ranks hold alike, as the core's rules."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tierkeep.errors import InvalidError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    #: The ranks that hold the same bytes: all that save, these, or none but this one.
    Group = bool | Iterable[int] | ProcessGroup
    Replicated = Group | str | Iterable[str] | Mapping[str, Group]


def rules(replicated: Replicated | None, savers: list[int]) -> list[tuple[str, list[int]]]:
    """(pattern over paths, the ranks that hold what matches); the first that matches counts."""
    if replicated is None or replicated is False:
        return []
    if isinstance(replicated, str):
        return [(replicated, savers)]
    if isinstance(replicated, Mapping):
        named = [(pattern, _ranks(group, savers)) for pattern, group in replicated.items()]
        if all(isinstance(pattern, str) for pattern, _ in named):
            return named
        raise _wrong(replicated)
    if replicated is True or _is_process_group(replicated):
        return [("*", _ranks(replicated, savers))]
    if not isinstance(replicated, Iterable):
        raise _wrong(replicated)
    items = list(replicated)
    if items and all(isinstance(item, str) for item in items):
        return [(str(item), savers) for item in items]
    return [("*", _ranks(items, savers))]


def _ranks(group: Any, savers: list[int]) -> list[int]:
    if group is True:
        return savers
    if group is False:
        return []
    if _is_process_group(group):
        group = sys.modules["torch"].distributed.get_process_group_ranks(group)
    try:
        ranks = sorted(operator.index(rank) for rank in group)
    except TypeError:
        raise _wrong(group) from None
    if not ranks or min(ranks) < 0:
        raise _wrong(group)
    return ranks


def _is_process_group(group: object) -> bool:
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    kind = getattr(distributed, "ProcessGroup", None)
    return kind is not None and isinstance(group, kind)


def _wrong(given: object) -> InvalidError:
    return InvalidError(
        f"replicated = {given!r}: True, patterns as in ['model/*'], ranks, a process group, or a "
        "mapping from patterns to one of True, False, ranks, a process group"
    )
