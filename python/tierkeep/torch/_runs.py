"""Which run and step a path of torch's means, and the handles of this process on runs.

torch's tools name each checkpoint (`/ckpt/gpt/step-100`) and make a new writer for each; a run has
one handle, which stays open from save to save.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from typing import Any, NamedTuple

from tierkeep._checkpointer import Checkpointer
from tierkeep.errors import InvalidError
from tierkeep.torch._staged import Kept

logger = logging.getLogger("tierkeep")

_STEP = re.compile(
    r"(?:(?:step|global_step|checkpoint|ckpt|epoch|iter|iteration)[-_.=]?)?([0-9]{1,18})"
)


class Place(NamedTuple):
    """A checkpoint by its name."""

    #: The run's directory, or its place in a bucket.
    run: str
    #: `None`: the newest to read, the next one to write.
    step: int | None


def place(checkpoint_id: str | os.PathLike[str]) -> Place:
    """`<run>/step-100` (or `checkpoint-100`, `epoch_3`, `100`) is a step of `<run>`; any other path
    is a run.
    """
    path = os.fsdecode(checkpoint_id).removeprefix("tierkeep://").rstrip("/")
    if not path:
        raise InvalidError(f"{checkpoint_id!r} names no checkpoint: <run>/step-<number>")
    run, _, last = path.rpartition("/")
    numbered = _STEP.fullmatch(last)
    if numbered is None or not run:
        return Place(path, None)
    return Place(run, int(numbered[1]))


#: Of the addresses that a run may have; any other is somebody else's.
_SCHEMES = ("tierkeep", "file", "s3", "gs", "az")


def is_place(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint of ours may have that name: torch asks each storage it knows."""
    scheme, colon, _ = os.fsdecode(checkpoint_id).partition("://")
    return bool(scheme.strip("/")) and (not colon or scheme in _SCHEMES)


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

#: What was loaded last of each run, by this process: the step that it goes on from.
_loaded: dict[str, int] = {}


def note_loaded(run: str, step: int) -> None:
    """The run goes on from here."""
    _loaded[_key(run)] = step


def loaded(run: str) -> int | None:
    """The step that this process loaded last of a run."""
    return _loaded.get(_key(run))


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


def begin(ckpt: Checkpointer, run: str, step: int) -> None:
    """Begins the attempt that saves `step`, where none goes on: from what this process loaded, else
    from the newest checkpoint before it. torch's tools do not say where a job goes on. What is
    newer is abandoned, and stays until `tierkeep gc --abandoned`.
    """
    if ckpt._begun:
        return
    newest = ckpt.latest_step()
    before = _loaded.get(_key(run), newest)
    if newest is None:
        ckpt._fresh = True  # Nothing that can be restored is there.
    elif before is not None and before < step:
        if before != newest:
            logger.warning("%s goes on from step %s: newer ones are abandoned", run, before)
        ckpt._find(None if before == newest else before, None, before != newest, False, False)
        return
    else:
        logger.warning("%s begins anew at step %s: step %s is abandoned", run, step, newest)
        ckpt._fresh = True
    ckpt._begin_if_new()


def newest_saved(ckpt: Checkpointer) -> int:
    """The newest step that this process has saved of the run, or goes on from; 0: none."""
    return ckpt._newest


def next_step(ckpt: Checkpointer, told: int | None = None) -> int:
    """The step after the newest, where a path names none. `told` is what the coordinator said,
    perhaps at an earlier save (torch keeps plans): then all ranks count on alike.
    """
    if told is not None and told > ckpt._newest:
        return told
    newest = 0 if ckpt._begun else ckpt.latest_step()
    return max(newest or 0, ckpt._newest) + 1


def has(ckpt: Checkpointer, step: int) -> bool:
    """Whether the run has a checkpoint of that step where it goes on."""
    return any(info.step == step and info.complete for info in ckpt.steps() if info.in_lineage)


def close_all() -> None:
    """Closes the handles of this process."""
    for key, known in list(_open.items()):
        del _open[key]
        if known.pid == os.getpid():
            known.ckpt.close()
