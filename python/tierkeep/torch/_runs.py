"""Which run and step a path of torch's means, and the handles of this process on runs.

torch's tools name each checkpoint (`/ckpt/gpt/step-100`) and make a new writer for each; a run has
one handle, which stays open from save to save.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import Any

from tierkeep._checkpointer import Checkpointer
from tierkeep.errors import InvalidError
from tierkeep.torch._staged import Kept

logger = logging.getLogger("tierkeep")


def save_id(step: int, attempt: int | None) -> str:
    """What names a save in torch's metadata: the same on all ranks, and for who reads it."""
    return f"step {step} of attempt {attempt}"


@dataclasses.dataclass(slots=True)
class Open:
    """The handle of this process on a run."""

    ckpt: Checkpointer
    #: (rank, world size, options): a handle of others is another one.
    who: tuple[int, int, tuple[tuple[str, str], ...]]
    #: The id of the start of the job that it is part of: one on all ranks.
    start: str | None
    pid: int
    #: What the next save may be staged by.
    kept: Kept | None = None


_open: dict[str, Open] = {}

#: The steps of each run that this process has loaded or saved, where it goes on now.
_seen: dict[str, set[int]] = {}


def note(run: str, steps: Iterable[int]) -> None:
    """The run has these where this process goes on."""
    _seen.setdefault(_key(run), set()).update(steps)


def seen(run: str) -> frozenset[int]:
    """The steps that were noted."""
    return frozenset(_seen.get(_key(run), ()))


def newest_seen(run: str, step: int) -> int | None:
    """The newest of them before `step`: one may have loaded others only to look at them."""
    return max((known for known in seen(run) if known < step), default=None)


def opened(run: str) -> Open | None:
    """The handle of this process on `run`, if there is one."""
    known = _open.get(_key(run))
    usable = known is not None and known.pid == os.getpid() and not known.ckpt._closed
    return known if usable else None


def handle(
    run: str, rank: int, world: int, start: str | None, options: dict[str, Any], *, told: bool
) -> Open:
    """The same, opened at the first call; anew where the coordinator has `told` another start."""
    who = (rank, world, tuple(sorted((name, repr(value)) for name, value in options.items())))
    known = opened(run)
    if known is not None:
        if known.who == who and (known.start == start or not told):
            return known
        known.ckpt.close()
    ckpt = Checkpointer(run, rank=rank, world_size=world, attempt_id=start, **options)
    _open[_key(run)] = Open(ckpt, who, start, os.getpid())
    return _open[_key(run)]


def _key(run: str) -> str:
    return run if "://" in run else os.path.realpath(run)


def begin(ckpt: Checkpointer, run: str, step: int, before: int | None) -> None:
    """Begins the attempt that saves `step`, where none goes on: from `before`, else from the newest
    checkpoint before it. torch's tools do not say where a job goes on. What is newer is abandoned,
    and stays until `tierkeep gc --abandoned`.

    Which is the newest the ranks decide together: this node's directory may lack it. As many
    attempts begin on every rank, or one would go on in one that the others have left.

    Args:
        before: a step, the same on all ranks; None: none is known.

    Raises:
        InvalidError: everything is newer. A save that abandons all there is before it is complete
            itself is one that was not asked for: `fresh=True` does.
    """
    if ckpt._begun:
        return
    if ckpt._fresh:
        ckpt._begin_if_new()
        return
    found = ckpt._find(None, None, False, False, False)
    if found is None:
        return
    if before is None and found.step < step:
        before = found.step
    if before is None:
        complete = [i.step for i in ckpt.steps() if i.complete and i.in_lineage and i.step < step]
        before = max(complete, default=None)
    if before is None:
        raise InvalidError(
            f"step {step} comes before all that {run} has (the newest is {found.step}): "
            "fresh=True begins anew and abandons them, or this training needs a path of its own"
        )
    if before != found.step:
        logger.warning("%s goes on from step %s: newer ones are abandoned", run, before)
        ckpt._find(before, None, True, False, False)
    _seen[_key(run)] = {known for known in seen(run) if known <= before}


def next_step(ckpt: Checkpointer, told: int | None = None) -> int:
    """The step after the newest, where a path names none. `told` is what the coordinator said,
    perhaps at an earlier save (torch keeps plans): then all ranks count on alike.
    """
    if told is not None and told > ckpt._newest:
        return told
    newest = 0 if ckpt._begun else ckpt.latest_step()
    return max(newest or 0, ckpt._newest) + 1


def check_new(ckpt: Checkpointer, run: str, step: int, *, overwrite: bool = True) -> None:
    """Refuses a step that was saved before."""
    if step <= ckpt._newest or (not overwrite and _has(ckpt, step)):
        raise InvalidError(
            f"step {step} of {run} was saved before (the newest is {ckpt._newest}): "
            "a checkpoint is never overwritten, each save needs a step of its own"
        )


def _has(ckpt: Checkpointer, step: int) -> bool:
    return any(info.step == step and info.complete for info in ckpt.steps() if info.in_lineage)


def close_all() -> None:
    """Closes the handles of this process."""
    for key, known in list(_open.items()):
        del _open[key]
        if known.pid == os.getpid():
            known.ckpt.close()
