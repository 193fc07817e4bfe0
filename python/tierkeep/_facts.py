"""What a Checkpointer answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that has been restored.

    Attributes:
        step: completed training steps.
        attempt: number of the attempt that saved it.
        tier: `"ram"` or `"disk"`: where most of its bytes came from.
        state: the whole tree, its containers and tensors the live ones where there are some.
        meta: `metrics` (dict of float), `tags` (tuple of str), `saved_unix_ms` (int).
        damaged: one sentence for each damaged copy that was passed over and repaired.
    """

    step: int
    attempt: int
    tier: str
    state: Any = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A checkpoint that some tier holds.

    Attributes:
        step: completed training steps.
        attempt: number of the attempt that saved it.
        complete: every rank's shard can be read.
        sealed: it is whole on disk.
        in_lineage: a resume may land on it.
        pinned: retention leaves it alone.
        tiers: the tiers that hold a part of it, nearest first.
    """

    step: int
    attempt: int
    complete: bool
    sealed: bool
    in_lineage: bool
    pinned: bool
    tiers: tuple[str, ...]
