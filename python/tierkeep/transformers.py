"""tierkeep under the Trainer of Hugging Face transformers: frequent saves beside its own.

    keeper = tierkeep.transformers.CheckpointCallback("/ckpt/gpt", every=50)
    trainer = Trainer(..., callbacks=[keeper])
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))

`newest` answers with the newer one of the run's newest checkpoint and the Trainer's own newest, as
the path that `resume_from_checkpoint` wants; None on a fresh run.

How a run comes back: only the Trainer can leave out the epochs and batches that are done, and it
does so by the `trainer_state.json` of a directory. So it gets a directory with this one file, and
finds its epoch, step, log, best metric and callbacks as in any other. Everything large goes at the
beginning of the training from RAM straight into the live tensors, each rank's parts to it (a
directory of Hugging Face's layout would be the state written and read once more, and gathered where
it is sharded). For that the Trainer must not look for weights there: `_load_from_checkpoint` is
passed over for this one path. It is the one method that is replaced; where it were gone, the
Trainer would refuse the path with an error, not train on with wrong weights. (Stateful callbacks
come back with `restore_callback_states_from_checkpoint=True`, as in any resume.)

When a save is taken: when the next step begins, not when its own ends, since the Trainer logs,
evaluates and finds the best metric between these two, and draws random numbers for it. A resumed
run gets its random numbers back at that very place, and those of its epoch's begin where the order
of the rows is drawn from them. It goes on bit for bit, but where rows are made with random numbers
of the process itself: one or two of them were fetched before the save, as in the Trainer's own
resume.

What the Trainer's host forces: one small broadcast at the start, by which all ranks know the
Trainer's own checkpoints that the first rank sees (and Checkpointer's id of the start). No other
collective, no second copy. `newest` begins the attempt: nodes with directories of their own know
only then which of the run's checkpoints is whole, and all ranks obey the one decision.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tierkeep import _accelerated, _ranks
from tierkeep._accelerated import Held, Order, State
from tierkeep._checkpointer import Checkpointer
from tierkeep._rng import Rng
from tierkeep._tierkeep import Found
from tierkeep.errors import InvalidError

#: What the Trainer has added up since it last logged, which it keeps in none of its files.
_SINCE_LOGGED = ("_tr_loss", "_globalstep_last_logged", "current_flos")


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Saves the training's whole state each `every` steps; the training waits for one copy to RAM.

    That is the model, optimizer, scheduler, gradient scaler, each rank's random numbers, the
    `TrainerState` with what stateful callbacks have in it, the seed of the rows' order, and the
    sums that are not logged yet. Models that are the same on all ranks (DistributedDataParallel)
    the first rank saves, as in the Trainer; of sharded ones (FSDP2) every rank saves its part.

    After SIGTERM the training ends after a step that all ranks agree on, saved; `train` returns,
    and `stopped` is True. See `Checkpointer.stop_requested`.

    With `capture="overlap"` the optimizer waits for the copy before it steps, and the end of an
    epoch does, after which other weights may be put in place (`load_best_model_at_end`). A
    callback that writes parameters in place between a step's begin and its optimizer calls
    `keeper.ckpt.fence()` first.

    Args:
        destination, every, options: of `tierkeep.Checkpointer`, which is `keeper.ckpt` from
            `newest` to the end of the training. With `fresh=True` the training begins anew, or
            at the checkpoint of the Trainer's that is given to `resume_from_checkpoint`.
    """

    def __init__(
        self, destination: str | os.PathLike[str], *, every: int | None = None, **options: Any
    ) -> None:
        self.ckpt: Checkpointer | None = None
        #: Whether a SIGTERM has ended the training.
        self.stopped = False
        self._open: dict[str, Any] = {"destination": destination, "every": every, **options}
        self._trainer: Trainer | None = None
        self._held: Held | None = None
        self._rng, self._epoch_rng = _Numbers(), _Numbers()
        #: The run's newest checkpoint, which all ranks have agreed on.
        self._found: Found | None = None
        #: Random numbers are to be put back, in the first epoch and at its first step.
        self._resumes = False
        #: The step that this training begins at.
        self._begun_at = 0
        #: Between two epochs: the training has come to a step that is not saved.
        self._unsaved = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def newest(self, trainer: Trainer) -> str | None:
        """What `trainer` is to resume from: a path, or None. On all ranks, before `train`.

        Of the Trainer's own checkpoints in `output_dir` only whole ones count: with
        `trainer_state.json`, which is written last, and with a scheduler, which
        `save_only_model` leaves out.

        Raises:
            InvalidError: DeepSpeed and FSDP1, which keep their state themselves;
                `auto_find_batch_size`.
        """
        _accelerated.check(trainer.accelerator)
        if trainer.args.auto_find_batch_size:
            raise InvalidError(
                "auto_find_batch_size begins one training several times, each anew: find the size "
                "first, then say it as per_device_train_batch_size"
            )
        if self.ckpt is not None:
            self.ckpt.close()
        self._trainer, self._held = trainer, None
        self._resumes = self._unsaved = False
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self.ckpt = ckpt = Checkpointer(**self._open)
        theirs: tuple[int, str] | None = None
        if ckpt.rank == 0 and not self._open.get("fresh"):
            theirs = _of_trainer(trainer.args.output_dir)
        group = _ranks.distributed()
        if group is not None and ckpt.world_size > 1:
            # Nodes whose `output_dir` is their own would not see the same.
            told: list[Any] = [theirs]
            group.broadcast_object_list(told, src=0)
            [theirs] = told
        # This node's directory may have less than all of them: the decision is what counts.
        self._found = found = ckpt._find(None, None, False, False, False)
        if theirs is not None and theirs[0] > _step_of(found):
            return theirs[1]
        if found is None:
            return None
        only: State = {"trainer": {"state": {}}}
        plan, make = _accelerated.plan(ckpt, found, only, include=["trainer/state/*"])
        plan.check()
        plan.fill(ckpt._threads)
        make()
        self._folder = tempfile.TemporaryDirectory(prefix="tierkeep-")
        path = os.path.join(self._folder.name, f"{PREFIX_CHECKPOINT_DIR}-{found.step}")
        os.mkdir(path)
        with open(os.path.join(path, TRAINER_STATE_NAME), "w", encoding="utf-8") as file:
            json.dump(only["trainer"]["state"], file, default=_plain)
        _without_weights(trainer, path)
        return path

    # -- events of the Trainer ---------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **more: Any,
    ) -> None:
        """Everything is made and wrapped: it is filled."""
        ckpt, trainer = self.ckpt, self._trainer
        if ckpt is None or trainer is None:
            raise InvalidError(
                "the keeper does not know the Trainer: "
                "trainer.train(resume_from_checkpoint=keeper.newest(trainer))"
            )
        if self._held is not None:
            raise InvalidError(
                "the keeper has begun a training before, which did not end: ask "
                "keeper.newest(trainer) once for each call of train"
            )
        found = self._found
        # Of a later step the Trainer has loaded one of its own.
        if state.global_step < _step_of(found):
            raise InvalidError(
                f"the training begins at step {state.global_step}, the run has step "
                f"{_step_of(found)}: resume from what keeper.newest(trainer) says, or say "
                "fresh=True"
            )
        self._begun_at = state.global_step
        optimizer = _accelerated.own(optimizer)
        rest: State = {
            "trainer": _exported(trainer, state),
            "scheduler": lr_scheduler,
            "order": Order(train_dataloader),
            "rng": self._rng,
            "epoch_rng": self._epoch_rng,
        }
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            rest["scaler"] = scaler
        self._held = Held(ckpt, _accelerated.named([model], [optimizer]), rest)
        ckpt.guard(optimizer)
        if state.global_step > _step_of(found):
            # The run goes on from there.
            ckpt._prepare_behind(self._held.saved)
            return
        self._held.fill(found)
        self._resumes = found is not None
        if found is not None:
            _put_sums_back(trainer, rest["trainer"]["sums"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """The order of the rows is about to be drawn."""
        self._unsaved = False
        if self._resumes:
            self._epoch_rng.put_back()
        else:
            self._epoch_rng.note()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """All that belongs to the steps before is done."""
        assert self.ckpt is not None
        step = state.global_step
        if self._resumes:
            self._rng.put_back()
            self._resumes = False
        elif step > self._begun_at and step % self.ckpt.every == 0:
            self._rng.note()
            self._save(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """The gradient scaler may leave the optimizer's step out, which would wait for the copy."""
        assert self.ckpt is not None
        self.ckpt._guarded.wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Whether this step is the last one."""
        assert self.ckpt is not None
        self.ckpt._completed(state.global_step)
        if self.ckpt.stop_requested():
            self.stopped = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """At the end of the training no next step begins. (In `on_train_end` other weights may be
        in place of these: `load_best_model_at_end`.)
        """
        assert self.ckpt is not None
        self._unsaved = state.global_step > self._begun_at
        if control.should_training_stop:
            self._save_last(state)
        # Until an optimizer steps: others may put other weights in place.
        self.ckpt.fence()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: State | None = None,
        **more: Any,
    ) -> None:
        """An epoch's evaluation may end the training, or the last epoch without anybody's asking:
        then this, the sum of all, is the last that is heard before other weights are loaded.
        """
        if self._unsaved and "train_loss" in (logs or ()):
            self._save_last(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Waits until the newest checkpoint is on disk."""
        assert self.ckpt is not None
        ckpt, self.ckpt, self._held = self.ckpt, None, None
        self._found, self._unsaved = None, False
        if self._folder is not None:
            self._folder.cleanup()
        ckpt.close()

    def _save_last(self, state: TrainerState) -> None:
        """Between two epochs, of which the second may never begin."""
        if not self._unsaved:
            return
        assert self.ckpt is not None
        self._unsaved = False
        self._rng.note()
        if float(state.epoch).is_integer():
            # Who goes on from here begins an epoch, and has these at its begin alone.
            self._epoch_rng.note()
            self._rng.forget()
        self._save(state)
        self.ckpt.fence()

    def _save(self, state: TrainerState) -> None:
        assert self.ckpt is not None and self._held is not None and self._trainer is not None
        self._held.saved["trainer"].update(_exported(self._trainer, state))
        self.ckpt.save(state.global_step, self._held.saved)


class _Numbers:
    """The state of the random numbers at one place of the loop; they are put back at that place,
    not when the rest is.
    """

    def __init__(self) -> None:
        self._noted = Rng().state_dict()

    def note(self) -> None:
        """Here."""
        self._noted = Rng().state_dict()

    def forget(self) -> None:
        """Nothing is to be put back at this place."""
        self._noted = {}

    def put_back(self) -> None:
        """Here."""
        if self._noted:
            Rng().load_state_dict(self._noted)

    def state_dict(self) -> State:
        return self._noted

    def load_state_dict(self, state: State) -> None:
        self._noted = state


# -- the Trainer ------------------------------------------------------------------------------


def _step_of(found: Found | None) -> int:
    return 0 if found is None else found.step


def _exported(trainer: Trainer, state: TrainerState) -> State:
    """What the Trainer would write to its `trainer_state.json`, and what it has not logged yet."""
    parts = [*trainer.callback_handler.callbacks, trainer.control]
    callbacks = [part for part in parts if isinstance(part, ExportableState)]
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    fields["stateful_callbacks"] = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
    sums = {name: getattr(trainer, name) for name in _SINCE_LOGGED if hasattr(trainer, name)}
    return {"state": fields, "sums": sums}


def _put_sums_back(trainer: Trainer, sums: State) -> None:
    for name, value in sums.items():
        setattr(trainer, name, value)
    if isinstance(sums.get("_tr_loss"), torch.Tensor):
        # The `train_loss` at the end is the mean of this call's steps alone.
        trainer._total_loss_scalar = -sums["_tr_loss"].item()


def _of_trainer(output_dir: str | None) -> tuple[int, str] | None:
    """The newest whole checkpoint of the Trainer's own: its step and path."""
    found: list[tuple[int, str]] = []
    if output_dir is not None and os.path.isdir(output_dir):
        for name in os.listdir(output_dir):
            numbered = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name)
            path = os.path.join(output_dir, name)
            files = (os.path.join(path, file) for file in (TRAINER_STATE_NAME, SCHEDULER_NAME))
            if numbered is not None and all(map(os.path.isfile, files)):
                found.append((int(numbered[1]), path))
    return max(found, default=None)


def _without_weights(trainer: Trainer, folder: str) -> None:
    """Has `trainer` resume from `folder`, in which there are no weights."""
    load = trainer._load_from_checkpoint

    def load_others(path: str, *rest: Any, **more: Any) -> None:
        if path != folder:
            load(path, *rest, **more)

    trainer._load_from_checkpoint = load_others


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's, which the metrics of a script may hold, for JSON."""
    return value.item()
