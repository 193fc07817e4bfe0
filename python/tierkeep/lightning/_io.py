"""`CheckpointIO`: what Lightning saves as a file is a step of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from tierkeep._checkpointer import Level
from tierkeep._load import load
from tierkeep.errors import CheckpointNotFoundError, InvalidError
from tierkeep.lightning import _host, _markers
from tierkeep.lightning._state import without_code
from tierkeep.torch import _runs


class CheckpointIO(_host.CheckpointIO):  # type: ignore[misc]
    """Where Lightning's own checkpoints go: `ModelCheckpoint`, `Trainer.save_checkpoint`.

        trainer = Trainer(plugins=[tierkeep.lightning.CheckpointIO()], ...)
        trainer.fit(model, ckpt_path="last")

    A checkpoint is copied once, into RAM, with checksums and without pickle, and goes on from there
    to disk as every save does. At the path that Lightning chose lies a small file that names the
    run and the step: names, versions (`-v1`), links (`save_last="link"`), `ckpt_path="last"`,
    `"best"` and `save_top_k` work as ever. While that file is there its checkpoint is pinned; where
    Lightning removes or overwrites it, the checkpoint is given back to retention (`keep_last`, here
    1, newest ones stay). Whoever removes a name by hand takes the pin away, too (`tierkeep pin RUN
    STEP --remove`). What a process was at when it was killed, the next one ends at its first save;
    until then a note lies beside the run (`tierkeep.pins`). Files that torch wrote are read as
    before.

    Steps are `global_step`; where a step was saved already (`last.ckpt` beside another), or a
    training has gone back, the next free number. A checkpoint is never overwritten.

    Saved by rank 0 alone, as Lightning asks for: under DDP, or on one device. FSDPStrategy,
    ModelParallelStrategy and DeepSpeedStrategy read (and the first and last write) their files
    themselves, with no CheckpointIO; `tierkeep.lightning.CheckpointCallback` saves sharded states.
    `LightningModule.load_from_checkpoint` reads files of torch's alone:
    `tierkeep.lightning.load_from_checkpoint` reads these.

    Args:
        destination: the run. Default: `tierkeep` in the directory of each path.
        level: what a save waits for, `"ram"`, `"peer"`, `"disk"` or `"object"`; default: the most
            durable of disk and bucket that the run has. With `"ram"` it returns when the copy is
            taken, and a lost node may leave a name without its checkpoint.
        timeout_s: seconds until then, at most.
        options: of the `tierkeep.Checkpointer`. Hyperparameters that would need a pickle and are
            not in `allow_pickle` are left out, which is logged; elsewhere they are an error.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str] | None = None,
        *,
        level: Level | None = None,
        timeout_s: float = 1800.0,
        **options: Any,
    ) -> None:
        self._destination = destination
        self._level: Level | None = level
        self._timeout_s = timeout_s
        self._options = {"keep_last": 1, **options}
        self._allow_pickle = frozenset(options.get("allow_pickle", ()))
        self._used: set[str] = set()
        self._told: set[str] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves it as the next step, then writes its name to `path`.

        Raises:
            InvalidError: something in it would need a pickle that `allow_pickle` does not name.
            TierkeepError: it did not get where `level` says.
        """
        if storage_options is not None:
            raise InvalidError("storage_options are CheckpointIO's own, given when it is made")
        run = _markers.run_of(path, self._destination)
        ckpt = self._handle(run)
        if not ckpt._begun:
            ckpt._find(None, None, False, False, False)
        note = _markers.note_of(run, path)
        self._settle(run, note)
        step = max(int(checkpoint.get("global_step", 0)), ckpt._newest + 1)
        tree = without_code(checkpoint, self._allow_pickle, self._told)
        save = ckpt.save(step, tree, tags=[os.path.basename(os.fspath(path))])
        level = self._level or ("object" if not save.is_due_for_disk else "disk")
        save.wait(level, self._timeout_s)
        attempt = ckpt._handle.attempt
        assert attempt is not None
        # What a link names has another name, which stays.
        before = None if os.path.islink(path) else _markers.read(path)
        replaces = before is not None and os.path.realpath(before.run) == os.path.realpath(run)
        steps = [step, before.step] if before is not None and replaces else [step]
        _markers.write_note(note, path, steps)
        ckpt.pin(step)
        _markers.write(path, _markers.Marker(run, step, attempt))
        self._settle(run, note)
        if before is not None and not replaces:
            self._handle(before.run).unpin(before.step)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads what `path` names into new memory on the CPU, or where `map_location` says.

        Nothing is unpickled but what `allow_pickle` names, and with `weights_only` not even that.

        Raises:
            CheckpointNotFoundError: the checkpoint that `path` names is not where it was.
            FileNotFoundError: there is no such file.
            CorruptError: no tier has a good copy.
        """
        marker = _markers.read(path)
        if marker is None:
            file = _host.TorchCheckpointIO()
            where = {} if map_location is None else {"map_location": map_location}
            found: dict[str, Any] = file.load_checkpoint(path, weights_only=weights_only, **where)
            return found
        try:
            checkpoint = load(
                marker.run,
                marker.step,
                attempt=marker.attempt,
                ram_dir=self._options.get("ram_dir"),
                storage_options=self._options.get("storage_options"),
                threads=self._options.get("threads"),
                allow_pickle=() if weights_only else self._allow_pickle,
            )
        except CheckpointNotFoundError as error:
            error.add_note(
                f"({os.fspath(path)} names step {marker.step} of {marker.run}: it is no checkpoint "
                "by itself, and does not go elsewhere without it)"
            )
            raise
        moved: dict[str, Any] = _moved(checkpoint, map_location)
        return moved

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes the name, and gives the checkpoint back to retention."""
        # Without a link the checkpoint still has its name.
        marker = None if os.path.islink(path) else _markers.read(path)
        note = "" if marker is None else _markers.note_of(marker.run, path)
        if marker is not None:
            self._settle(marker.run, note)
            _markers.write_note(note, path, [marker.step])
        _host.TorchCheckpointIO().remove_checkpoint(path)
        if marker is not None:
            self._settle(marker.run, note)

    def teardown(self) -> None:
        """Waits until the newest checkpoint is as durable as it can be here, and closes its run."""
        while self._used:
            known = _runs.opened(self._used.pop())
            if known is not None:
                known.ckpt.close()

    def _handle(self, run: str) -> Any:
        self._used.add(run)
        return _runs.handle(run, 0, 1, None, self._options, told=False).ckpt

    def _settle(self, run: str, note: str) -> None:
        """Ends the change that a note tells of, begun now or by a process that was killed: pins of
        its steps go, but for the one that the path names.
        """
        change = _markers.read_note(note)
        if change is None:
            return
        named = _markers.read(change.path)
        ckpt = self._handle(run)
        for step in change.steps:
            if named is not None and named.step == step:
                continue
            with contextlib.suppress(CheckpointNotFoundError):  # Neither it nor its pin is there.
                ckpt.unpin(step)
        _markers.remove_note(note)


def load_from_checkpoint(
    cls: Any,
    path: str | os.PathLike[str],
    *,
    strict: bool | None = None,
    io: CheckpointIO | None = None,
    **kwargs: Any,
) -> Any:
    """`cls.load_from_checkpoint(path)` for what `CheckpointIO` saved: that method reads files of
    torch's alone.

    Args:
        cls: a LightningModule or a LightningDataModule.
        path: as ModelCheckpoint has it, for example its `best_model_path`.
        strict: whether all names must match.
        io: one with other options than the default.
        kwargs: of `cls`, over the hyperparameters that were saved.

    Returns:
        A new `cls`, on the CPU.
    """
    checkpoint = (io or CheckpointIO()).load_checkpoint(path)
    key = cls.CHECKPOINT_HYPER_PARAMS_KEY
    checkpoint[key] = {**checkpoint.get(key, {}), **kwargs}
    return _host.saving._load_state(cls, checkpoint, strict=strict, **kwargs)


def _moved(value: Any, where: Any) -> Any:
    """Tensors on the CPU to where a `map_location` of torch's puts them."""
    if isinstance(value, torch.Tensor):
        if callable(where):
            storage = where(value.untyped_storage(), "cpu")
            return value if storage is None else value.to(storage.device)
        device = where.get("cpu", "cpu") if isinstance(where, Mapping) else where
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], where)
    elif type(value) in (list, tuple):
        return type(value)(_moved(item, where) for item in value)
    return value
