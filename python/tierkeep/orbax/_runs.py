"""The runs of this process that Orbax saves to, and the order in which a step is committed.

    1. `save` copies this process's shards into RAM.
    2. Behind: the checkpoint of all processes becomes as durable as was asked for.
    3. It is pinned in the run, and the directory of Orbax's says where it is.
    4. Orbax renames the directory.

# Invariants

- A committed directory names a checkpoint that was complete before, at the level asked for.
- A committed directory's checkpoint is pinned: retention in the run follows Orbax's, not the other
  way round. The pin goes when the directory is gone.
- A process that dies between two of these leaves a directory that Orbax does not count, or a
  checkpoint that no directory names. The next attempt goes on from what was restored through Orbax
  and saves the step again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from orbax.checkpoint import multihost

from tierkeep._address import anywhere, places
from tierkeep._build import Builder, Include
from tierkeep._checkpointer import Checkpointer
from tierkeep._checks import names
from tierkeep._facts import StepInfo
from tierkeep._ranks import detect
from tierkeep._restore import Wish, planned
from tierkeep._saves import most_durable
from tierkeep._tierkeep import Found, Reader, Save
from tierkeep.errors import CheckpointNotFoundError, InvalidError, TierkeepError
from tierkeep.orbax import _places, _trees

logger = logging.getLogger("tierkeep")


class How(NamedTuple):
    """How a handler saves."""

    run: str | None
    level: str | None
    timeout_s: float
    primary_host: int | None
    #: Of the `Checkpointer`.
    options: Mapping[str, Any]

    @property
    def is_primary(self) -> bool:
        """Whether this process writes what one has to."""
        return bool(multihost.is_primary_host(self.primary_host))


@dataclasses.dataclass(slots=True)
class Open:
    """The handle of this process on a run."""

    ckpt: Checkpointer
    at: _places.Place
    how: How
    pid: int

    @property
    def is_usable(self) -> bool:
        """Not in a forked child."""
        return self.pid == os.getpid() and not self.ckpt._closed


_open: dict[str, Open] = {}

#: What this process has restored or saved of each run: steps to the attempts that saved them.
_seen: dict[str, dict[int, int]] = {}


@dataclasses.dataclass(slots=True)
class Commit:
    """A save whose copy is taken."""

    known: Open
    save: Save
    at: _places.Place
    reference: _places.Reference

    @property
    def key(self) -> str:
        """Of the run, for `close`."""
        return _key(self.reference.run)

    async def finish(self, directory: epath.Path) -> None:
        """Behind. When it returns, Orbax may commit."""
        await asyncio.to_thread(self._finish, directory)

    def _finish(self, directory: epath.Path) -> None:
        known, at = self.known, self.at
        if known.how.is_primary:
            _release(known)
        self.save.wait(known.how.level or most_durable(self.save), known.how.timeout_s)
        if known.how.is_primary:
            at.pins.mkdir(parents=True, exist_ok=True)
            (at.pins / at.name).touch()
            known.ckpt.pin(at.step)
            _places.write(directory, at, self.reference)


def save(directory: epath.Path, tree: Any, how: How) -> Commit:
    """Copies what this process has of `tree`; returns when it may be changed or donated."""
    at = _places.place(directory)
    run = how.run or at.run
    stored, kinds = _trees.without_keys(tree)
    known = _for_saving(run, at, how)
    saved = known.ckpt.save(at.step, stored)
    attempt = known.ckpt._handle.attempt
    assert attempt is not None
    _seen.setdefault(_key(run), {})[at.step] = attempt
    return Commit(known, saved, at, _places.Reference(run, at.step, attempt, kinds))


def is_ours(directory: epath.Path) -> bool:
    """Whether the arrays of a committed directory are in a run."""
    return _places.read(directory) is not None


def restore(directory: epath.Path, how: How, target: Any, *, partial: bool) -> Any:
    """The tree of a committed directory: read only, no lock is taken. An attempt that begins later
    goes on from here.
    """
    reference = _reference(directory)
    found = _find(reference, how)
    allow_pickle = names(how.options.get("allow_pickle", ()))
    threads = how.options.get("threads")
    if target is None:
        builder = Builder(found, allow_pickle)
        make, kinds = builder.make(found.tree, ()), reference.keys
        if builder.targets:
            builder.read(threads)
    else:
        mine, kinds = _trees.own(target)
        savers = list(how.options.get("ranks") or range(_who(how.options)[1]))
        strict: Any = "state" if partial else True
        wish = Wish(None, Include(None), strict, savers, allow_pickle)
        plan, make = planned(found, mine, wish)
        plan.check()
        plan.fill(threads)
    _seen.setdefault(_key(reference.run), {})[found.step] = found.attempt
    new = _trees.with_keys(make(), kinds)
    return _trees.part(new, target) if partial and target is not None else new


def metadata(directory: epath.Path, how: How) -> Any:
    """The tree with `jax.ShapeDtypeStruct`s."""
    reference = _reference(directory)
    found = _find(reference, how)
    builder = _trees.Abstract(found, names(how.options.get("allow_pickle", ())))
    return _trees.with_keys(builder.make(found.tree, ())(), reference.keys)


def close_all() -> None:
    """Closes the runs that this process saves to: waits for their newest checkpoints, and gives
    them up. (`CheckpointManager.close` does it for those of its own.)
    """
    for key in list(_open):
        close(key)


def close(key: str) -> None:
    """Closes the handle on a run, by its key."""
    known = _open.pop(key, None)
    if known is None or not known.is_usable:
        return
    try:
        if known.how.is_primary:
            _release(known)
    finally:
        known.ckpt.close()


# -- reading ---------------------------------------------------------------------------------


def _find(reference: _places.Reference, how: How) -> Found:
    """This process's part of the checkpoint, from the nearest place that has it."""
    run, step, attempt, _ = reference
    rank, _ = _who(how.options)
    known = _open.get(_key(run))
    if known is not None and known.is_usable:
        return known.ckpt._handle.reader().choose_for(rank, step, attempt)
    options, ram_dir = how.options.get("storage_options"), how.options.get("ram_dir")
    homes = dict.fromkeys((places(run, how.options.get("disk"))[0], run))
    for home in homes:
        said = options if home == run else None
        reader = Reader(anywhere(home, said), ram_dir and os.fspath(ram_dir), dict(said or {}))
        try:
            return reader.choose_for(rank, step, attempt)
        except CheckpointNotFoundError as error:
            missing = error
    missing.add_note(f"(Orbax committed step {step}, and {run} has lost it)")
    raise missing


def _reference(directory: epath.Path) -> _places.Reference:
    reference = _places.read(directory)
    if reference is None:
        raise InvalidError(f"{directory} was not saved by tierkeep")
    return reference


def _who(options: Mapping[str, Any]) -> tuple[int, int]:
    found = detect(options.get("rank"), options.get("world_size"))
    return found.rank, found.world_size


# -- saving ----------------------------------------------------------------------------------


def _for_saving(run: str, at: _places.Place, how: How) -> Open:
    """The handle on the run, in an attempt that can save the step."""
    key = _key(run)
    known = _open.get(key)
    if known is not None and known.is_usable:
        if known.at.item != at.item:
            raise InvalidError(
                f"{run} has the item {known.at.item!r}: {at.item!r} needs a run of its own"
            )
        if known.how.options == how.options and at.step > known.ckpt._newest:
            known.at, known.how = at, how
            return known
        # Orbax may delete a step and save it again, or an older one than it has: in a run that is
        # another attempt.
        try:
            close(key)
        except TierkeepError as error:
            logger.warning("%s: the save before did not end well: %s", run, error)
    known = _open[key] = Open(Checkpointer(run, **how.options), at, how, os.getpid())
    _begin(known.ckpt, run, at.step)
    return known


def _begin(ckpt: Checkpointer, run: str, step: int) -> None:
    """Begins the attempt that saves `step`."""
    # The ranks decide together what is the newest: this node's directory may lack it.
    found = ckpt._find(None, None, False, False, False)
    complete = [info for info in ckpt.steps() if info.complete]
    before = _before(run, step, complete, [info for info in complete if info.in_lineage])
    seen = _seen.get(_key(run), {})
    for later in [known for known in seen if known >= step]:
        del seen[later]
    if found is None:
        return
    if before is None:
        if found.step >= step:
            logger.warning("%s begins anew: step %s is abandoned", run, found.step)
            ckpt._fresh = True
            ckpt._find(None, None, False, False, False)
    elif (before.step, before.attempt) != (found.step, found.attempt):
        logger.warning("%s goes on from step %s: newer ones are abandoned", run, before.step)
        ckpt._find(before.step, before.attempt, True, False, False)


def _before(run: str, step: int, complete: list[StepInfo], line: list[StepInfo]) -> StepInfo | None:
    """What `step` comes after: the newest one before it that this process knows; else that there
    is. Orbax does not say where a job goes on: it may have restored others to look at them.
    """
    seen = _seen.get(_key(run), {})
    known = [info for info in complete if seen.get(info.step) == info.attempt]
    before = [info for info in known if info.step < step]
    before = before or [info for info in line if info.step < step]
    return max(before, key=lambda info: info.step, default=None)


def _release(known: Open) -> None:
    """Takes the pins away of what Orbax has deleted since."""
    root, pins = known.at.root, known.at.pins
    if not pins.exists():
        return
    there = {_places.final(path.name) for path in root.iterdir()}
    for mark in pins.iterdir():
        step = _places.number(mark.name)
        # Looked for again by name: a listing may miss what is just being renamed.
        if step is None or mark.name in there or (root / mark.name).exists():
            continue
        known.ckpt.unpin(step)
        mark.unlink()


def _key(run: str) -> str:
    return run if "://" in run else os.path.realpath(run)
