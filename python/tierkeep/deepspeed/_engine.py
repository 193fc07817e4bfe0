"""The engine of DeepSpeed's that saves and loads, and the two calls that a script makes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointEngine as _CheckpointEngine,
)

from tierkeep._address import anywhere
from tierkeep._build import Include
from tierkeep._checkpointer import Checkpointer
from tierkeep._restore import Wish, planned
from tierkeep._tierkeep import Reader
from tierkeep.deepspeed import _files, _values
from tierkeep.deepspeed._reading import OWN, Reading, tag_of
from tierkeep.errors import CheckpointNotFoundError, InvalidError
from tierkeep.torch import _runs

logger = logging.getLogger("tierkeep")

Level = Literal["ram", "peer", "disk", "object"]


def attach(
    engine: Any, destination: str | os.PathLike[str], *, own: Any = None, **options: Any
) -> CheckpointEngine:
    """Makes `engine` save to the run at `destination`. Called by all ranks.

    A checkpoint is one of the step `engine.global_steps`, under whatever tag.

    Args:
        engine: what `deepspeed.initialize` returned.
        destination: the run, as for `tierkeep.Checkpointer`; it may be the directory that
            `save_checkpoint` is given.
        own, options: as for `CheckpointEngine`.

    Raises:
        InvalidError: the config asks for a checkpoint writer, or for optimizer states on NVMe, of
            which DeepSpeed copies files past its checkpoint engine.
    """
    before = engine.checkpoint_engine
    if isinstance(before, CheckpointEngine):
        before.cleanup()
    elif type(before) is not TorchCheckpointEngine:
        raise InvalidError(
            f"the config asks for {type(before).__name__}: leave its `checkpoint` writer out, "
            "tierkeep writes behind the training by itself"
        )
    if engine.zero_nvme_offload_optimizer():
        raise InvalidError(
            "offload_optimizer to nvme: DeepSpeed copies its files past the checkpoint engine, "
            "they would not be in the checkpoint"
        )
    ours = CheckpointEngine(destination, own=own, step=lambda: engine.global_steps, **options)
    engine.checkpoint_engine = ours
    return ours


def resume(
    engine: Any,
    load_dir: str | os.PathLike[str],
    tag: str | None = None,
    *,
    accept_older: bool = False,
    **how: Any,
) -> tuple[str | None, Any]:
    """`engine.load_checkpoint` from the newest checkpoint that is complete, whatever `latest` says
    and also where this node's directory was lost; then puts back what is each rank's `own`. Called
    by all ranks: one on each node writes what DeepSpeed looks for, the others wait at a barrier.

    Args:
        engine: one that tierkeep is attached to.
        load_dir: as `save_checkpoint` is given.
        tag: this one instead of the newest. Newer ones are abandoned.
        accept_older: as for `tierkeep.Checkpointer.restore`.
        how: of `load_checkpoint`, as in `load_optimizer_states=False`.

    Returns:
        (path, client_state) as `load_checkpoint` does, (None, None) on a run without checkpoints.

    Raises:
        CheckpointNotFoundError: no complete checkpoint has this tag.
        UnavailableError: a tier that may have a newer checkpoint does not answer.
    """
    ours = engine.checkpoint_engine
    if not isinstance(ours, CheckpointEngine):
        raise InvalidError("tierkeep.deepspeed.attach(engine, ...) comes first")
    tag = ours.begin(os.fspath(load_dir), tag, accept_older=accept_older)
    if tag is None:
        return None, None
    path, client_state = engine.load_checkpoint(os.fspath(load_dir), tag, **how)
    ours.restore_own()
    return path, client_state


class CheckpointEngine(_CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's interface to a run; `attach` gives one to an engine.

    `save_checkpoint` returns when the checkpoint of all ranks is as durable as `level` says: the
    `latest` that DeepSpeed writes then names one that exists. Where it cannot be, all ranks raise.
    A step has one checkpoint under one tag: DeepSpeed would overwrite, tierkeep never does.

    Loading reads what is asked for, whichever rank saved it, every byte checked, into new memory on
    the CPU, as DeepSpeed asks for it; from there DeepSpeed copies it (a copy that its interface
    forces). Nothing is unpickled but what `allow_pickle` names.

    Args:
        destination: the run, as for `tierkeep.Checkpointer`.
        own: what each rank has of its own and DeepSpeed does not save: random number states, the
            position in the data, running statistics of BatchNorm. A tree as for
            `Checkpointer.save`. (Buffers and `client_state` DeepSpeed saves of the first data
            parallel rank alone, but with ZeRO 3.)
        step: tells the number of completed steps. Default: the number in the tag.
        level: what a save waits for: `"ram"`, `"peer"`, `"disk"` or `"object"`.
        timeout_s: seconds until then, at most.
        options: of the `tierkeep.Checkpointer` that is opened.

    Raises:
        InvalidError: `busy="skip"`: DeepSpeed's `latest` would name a step that was passed over.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        own: Any = None,
        step: Callable[[], int] | None = None,
        level: Level = "ram",
        timeout_s: float = 1800.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if options.setdefault("busy", "wait") != "wait":
            raise InvalidError(
                'busy="skip": DeepSpeed names each save in `latest`, none is skipped'
            )
        self.name = "tierkeep"
        self.ckpt = Checkpointer(destination, **options)
        self._run = os.fspath(destination)
        self._own = own
        self._step = step
        self._level = level
        self._timeout_s = timeout_s
        self._storage_options = options.get("storage_options")
        #: Between `create` and `commit`: the tag's directory, and what was saved into it; `None`:
        #: so far no rank was told that this is a checkpoint.
        self._directory = ""
        self._files: dict[str, Any] | None = None
        #: The newest save that is complete.
        self._saved: tuple[int, str] | None = None
        #: What this process loaded last of the run: (step, tag).
        self._loaded: tuple[int, str] | None = None
        self._reading: Reading | None = None
        self._glance: tuple[str, Any] | None = None

    # -- saving ------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        """A checkpoint, or weights for somebody else, are about to be saved."""
        self._directory = os.path.join(info.save_dir, info.tag)
        self._files = self._reading = self._glance = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """All ranks make the tag's directory, also those that have nothing to save there."""
        os.makedirs(path, exist_ok=exist_ok)
        if _same(path, self._directory) and self._files is None:
            self._files = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Takes note of what is to be saved; it is copied at `commit`."""
        directory, name = os.path.split(path)
        if not _same(directory, self._directory):
            # `save_16bit_model`: others read this.
            torch.save(state_dict, path)
            return
        if self._files is None:
            self._files = {}
        self._files[name] = state_dict

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Copies it into RAM, and waits until all ranks have."""
        files, self._files = self._files, None
        if files is None:
            return True
        tag = info.tag
        step = self._step() if self._step is not None else _number(tag)
        self._go_on(step)
        if self._saved == (step, tag):
            logger.info("%s was saved before, of the same step: it stays as it is", tag)
            return True
        if self._saved is not None and step <= self._saved[0]:
            raise InvalidError(
                f"{tag} is of step {step}, which comes not after {self._saved[1]}, step "
                f"{self._saved[0]}: a checkpoint is never overwritten, each step has one tag"
            )
        tree = {name: _values.plain(state) for name, state in files.items()}
        if self._own is not None:
            tree[OWN] = self._own
        save = self.ckpt.save(step, tree, tags=[tag])
        save.wait(self._level, self._timeout_s)
        self._saved = (step, tag)
        place = _files.Place(self._run, step) if _is_first_here() else None
        _files.lay(self._directory, place, dict.fromkeys(files, self.ckpt.rank))
        return True

    def preserves_storage_sharing(self) -> bool:
        """No: of a view its elements are copied, and DeepSpeed need not clone it first."""
        return False

    def cleanup(self) -> None:
        """Waits until the newest checkpoint is where it goes, and gives the rank up. The end of the
        process does it, too.
        """
        self.ckpt.close()

    # -- loading -----------------------------------------------------------------------------

    def tags(self) -> dict[str, int]:
        """The tags of all checkpoints that are complete, with their steps, oldest first."""
        reader = self.ckpt._handle.reader()
        infos = [info for info in self.ckpt.steps() if info.complete and info.in_lineage]
        tags = {}
        for info in infos:
            try:
                found = reader.choose_for(self.ckpt.rank, info.step, info.attempt)
            except CheckpointNotFoundError:
                continue  # Deleted since it was listed: the policy does not keep it.
            tags[tag_of(found)] = found.step
        return tags

    def begin(
        self, load_dir: str, tag: str | None = None, *, accept_older: bool = False
    ) -> str | None:
        """Decides with the other ranks which checkpoint the job goes on from, and writes what
        DeepSpeed looks for in `load_dir`. Returns its tag for `load_checkpoint`; `None` where there
        is none. `resume` does this.
        """
        step = None
        if tag is not None:
            known = self.tags()
            if tag not in known:
                has = ", ".join(known) or "none"
                raise CheckpointNotFoundError(
                    f"{self._run} has no complete {tag} (complete: {has})"
                )
            newest = max(known.values())
            step = None if known[tag] == newest else known[tag]
        self._glance = None
        found = self.ckpt._find(step, None, step is not None, False, accept_older)
        if found is None:
            return None
        self._reading = Reading(self._run, found, self.ckpt._handle.reader())
        tag = tag_of(found)
        self._saved = (found.step, tag)
        self._loaded = None
        try:
            if _is_first_here():
                place = _files.Place(self._run, found.step)
                _files.lay(os.path.join(load_dir, tag), place, self._reading.names())
                _files.name_latest(load_dir, tag)
        finally:
            if self.ckpt.world_size > 1 and dist.is_initialized():
                dist.barrier()
        return tag

    def load(self, path: str, map_location: Any = None) -> Any:
        """What was saved under `path`, on the CPU, where DeepSpeed always wants it."""
        if self._glance is not None and self._glance[0] == path:
            # DeepSpeed loads a model's file, looks at a number, and loads it again.
            value, self._glance = self._glance[1], None
            return value
        directory, name = os.path.split(path)
        reading = self._open(_files.place(directory))
        hint = _files.rank_of(path)
        value = reading.load(name, hint, self.ckpt._allow_pickle, self.ckpt._threads)
        self._glance = (path, value) if name.endswith("model_states.pt") else None
        return value

    def restore_own(self) -> None:
        """Puts back what is each rank's own, of the checkpoint that was loaded last."""
        if self._own is None:
            return
        if self._reading is None:
            raise InvalidError("restore_own comes after load_checkpoint")
        # As `Checkpointer.restore`, which would choose again.
        savers, allowed = self.ckpt.settings["savers"], self.ckpt._allow_pickle
        wish = Wish(None, Include([OWN]), True, savers, allowed)
        plan, make = planned(self._reading.found, {OWN: self._own}, wish)
        plan.check()
        plan.fill(self.ckpt._threads)
        make()

    # -- small -------------------------------------------------------------------------------

    def _open(self, place: _files.Place) -> Reading:
        """The checkpoint that `place` names, and a note that the job goes on from there."""
        known = self._reading
        ours = _same(place.run, self._run)
        if known is None or known.found.step != place.step or not _same(known.run, place.run):
            if ours:
                reader = self.ckpt._handle.reader()
            else:
                ram_dir, options = self.ckpt._ram_dir, self._storage_options
                reader = Reader(anywhere(place.run, options), ram_dir, dict(options or {}))
            try:
                found = reader.choose_for(self.ckpt.rank, place.step)
            except CheckpointNotFoundError as error:
                raise CheckpointNotFoundError(
                    f"{place.run} has no complete step {place.step}, though files name it: "
                    "tierkeep.deepspeed.resume takes the newest that is complete"
                ) from error
            known = self._reading = Reading(place.run, found, reader)
        if ours:
            at = (known.found.step, tag_of(known.found))
            self._loaded = None if at == self._saved else at
        return known

    def _go_on(self, step: int) -> None:
        """Begins the attempt that saves `step` where none goes on, or goes back to what was loaded:
        what is newer is abandoned.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            _runs.begin(self.ckpt, self._run, step, None)
            return
        back = self.ckpt._begun or loaded[0] != self.ckpt.latest_step()
        if back:
            logger.warning("%s goes on from %s: newer ones are abandoned", self._run, loaded[1])
        self.ckpt._find(loaded[0] if back else None, None, back, False, False)
        self._saved = loaded


def _number(tag: str) -> int:
    """The number at the end of a tag."""
    numbered = re.search(r"([0-9]{1,18})$", tag)
    if numbered is None:
        raise InvalidError(
            f"{tag!r} has no number at its end: tierkeep.deepspeed.attach takes the engine's steps"
        )
    return int(numbered[1])


def _same(path: str, other: str) -> bool:
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def _is_first_here() -> bool:
    """Whether this is the rank of its node that writes what is for all of them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
