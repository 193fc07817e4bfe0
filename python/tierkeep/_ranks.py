"""Which rank this process is: arguments, then an initialised torch.distributed or jax.distributed,
then what its launcher says in the environment (`_launchers`).
"""

from __future__ import annotations

import itertools
import operator
import os
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tierkeep import _jax, _launchers
from tierkeep.errors import InvalidError

#: Handles that were made in this process: each asks once, in the same order on all.
_asked = itertools.count()


@dataclass(frozen=True, slots=True)
class Ranks:
    rank: int
    world_size: int
    #: Who said so, for people.
    source: str


def detect(rank: int | None, world_size: int | None) -> Ranks:
    found = _given(rank, world_size) or _torch() or _of_jax() or _launched()
    found = found or Ranks(0, 1, "alone")
    if not 0 <= found.rank < found.world_size:
        raise InvalidError(
            f"rank = {found.rank}, world_size = {found.world_size} ({found.source}): "
            "ranks count from 0 and are fewer than world_size"
        )
    return found


def _given(rank: int | None, world_size: int | None) -> Ranks | None:
    if rank is None and world_size is None:
        return None
    if rank is None and world_size == 1:
        rank = 0
    if rank is None or world_size is None:
        raise InvalidError(
            f"rank = {rank}, world_size = {world_size}: give both, or none to detect them"
        )
    return Ranks(rank, world_size, "arguments")


def distributed() -> Any:
    """torch.distributed, if it is initialised."""
    module = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized():
        return None
    return module


def _torch() -> Ranks | None:
    group = distributed()
    if group is None:
        return None
    return Ranks(group.get_rank(), group.get_world_size(), "torch.distributed")


def _of_jax() -> Ranks | None:
    processes = _jax.processes()
    return None if processes is None else Ranks(*processes, "jax.distributed")


def _launched() -> Ranks | None:
    found = _launchers.found(os.environ)
    return None if found is None else Ranks(*found)


def savers(ranks: Iterable[int] | None, found: Ranks) -> list[int]:
    """The ranks that save, rising; all of them where nothing is said."""
    if ranks is None:
        return list(range(found.world_size))
    if isinstance(ranks, int | str):
        raise InvalidError(f"ranks = {ranks!r}: several ranks, as in [0]")
    chosen = sorted(operator.index(rank) for rank in ranks)
    if not chosen:
        raise InvalidError("ranks = []: at least one rank saves")
    if twice := [rank for rank, next_one in itertools.pairwise(chosen) if rank == next_one]:
        raise InvalidError(f"ranks = {chosen}: rank {twice[0]} is there twice")
    for rank in chosen:
        if not 0 <= rank < found.world_size:
            raise InvalidError(
                f"ranks = {chosen}: there is no rank {rank}, world_size is {found.world_size}"
            )
    return chosen


def shared_attempt_id(ranks: Ranks) -> str | None:
    """An id of this start of the job that all ranks get, where a process group can carry it, or the
    store of JAX's coordinator.

    The one collective of a Checkpointer's life, at its construction.

    No launcher's restart counter is made an id, though some are at hand. Whoever has an id joins
    its attempt though rank 0 may be dead, so one of two starts would mix them; and no counter is
    new whenever a process is: JobSet's label and a Job's uid stay as they are when the kubelet
    restarts a container (JobSet's default), Slurm's when a task runs its script again in a loop,
    and torchrun counts on each node alone, from 0 in a new pod, under an id that is "none" by
    default. Without an id ranks follow rank 0 while its process lives, and no rank joins an attempt
    that its process before has claimed.
    """
    if ranks.world_size > 1 and ranks.source == "jax.distributed":
        name = f"tierkeep/{next(_asked)}"
        return _jax.shared(name, uuid.uuid4().hex if ranks.rank == 0 else None)
    if ranks.world_size == 1 or ranks.source != "torch.distributed":
        return None
    group = distributed()
    drawn = [uuid.uuid4().hex if ranks.rank == 0 else None]
    group.broadcast_object_list(drawn, src=0)
    return drawn[0]
