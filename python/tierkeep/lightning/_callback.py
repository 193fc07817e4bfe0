"""`CheckpointCallback`: a `Trainer` saves its whole state, and goes on from the newest."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

from tierkeep._checkpointer import Checkpointer
from tierkeep._facts import Restored
from tierkeep._rng import Rng
from tierkeep.errors import InvalidError
from tierkeep.lightning import _host
from tierkeep.lightning._loaders import orders, put_back
from tierkeep.lightning._state import Rest, state_of

logger = logging.getLogger("tierkeep")


class CheckpointCallback(_host.Callback):  # type: ignore[misc]
    """Saves the whole state of a training every few steps, and goes on from the newest at `fit`.

        trainer = Trainer(callbacks=[tierkeep.lightning.CheckpointCallback("/ckpt/gpt", every=50)])
        trainer.fit(model, loader)      # the same line at first and after any failure

    The state is model, optimizers, schedulers, precision, loops, other callbacks, datamodule, a
    stateful loader's position (torchdata's `StatefulDataLoader`) and random numbers: a resumed
    training ends with the same weights, bit for bit, from the middle of an epoch too. Tensors are
    copied once, from where they lie; each rank saves what it has and nothing is gathered, under
    DDPStrategy as under ModelParallelStrategy (FSDP2, tensor parallelism). It stands beside
    ModelCheckpoint; where that is not wanted, `Trainer(enable_checkpointing=False)`.

    A step is one of `trainer.global_step`; where that goes up by several at once, what is due in
    between is saved with the next one. A save is taken between two batches, when all hooks,
    schedulers and the validation of the first are done, and at the end of an epoch before the next
    one begins: then nothing is done twice or left out.

    Under DDP every rank has the same model: `ranks=[0]` saves one of them (the others' random
    numbers are then rank 0's after a resume), on CPUs `replicated=["model/*", "optim/*"]` shares it
    out.

    `fit(ckpt_path=...)` counts where the run has no checkpoint yet, and is passed over later.

    Not in the state, as in Lightning's own checkpoints: metrics of an epoch that is not at its end,
    gradients (nothing is saved between two steps of the optimizer), and random numbers inside a
    loader's workers. A loader without a length is read one batch ahead of the training by
    Lightning: a resume in the middle of an epoch leaves that batch out, and a warning says so.

    Args:
        destination: the run, as in `tierkeep.Checkpointer`.
        every: optimizer steps from save to save.
        stop_on_sigterm: after a SIGTERM all ranks stop after the same step, saved; `fit` returns.
            In place of what Lightning does on it, which ends with an exception.
        options: of the `tierkeep.Checkpointer`.

    Raises (at `fit`):
        InvalidError: the strategy has its state elsewhere (FSDPStrategy, DeepSpeedStrategy, XLA).
        MismatchError: what was saved does not fit this model.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        every: int | None = None,
        stop_on_sigterm: bool = False,
        allow_pickle: Iterable[str] = (),
        **options: Any,
    ) -> None:
        self._destination = destination
        self._stop_on_sigterm = stop_on_sigterm
        self._allow_pickle = frozenset(allow_pickle)
        self._options = {"every": every, "allow_pickle": self._allow_pickle, **options}
        self._ckpt: Checkpointer | None = None
        #: What `fit` went on from; None: it began anew.
        self.restored: Restored | None = None
        self._state: dict[str, Any] = {}
        self._rest: Rest | None = None
        self._rng: dict[str, Any] | None = None
        self._handler: Any = None
        self._loaders: list[dict[str, Any]] = []
        # The step that was looked at last, and whether a save waits for the epoch's end.
        self._seen = 0
        self._is_due = False
        self._loop: Any = None

    @property
    def checkpointer(self) -> Checkpointer | None:
        """The handle on the run while `fit` runs: `pin`, `steps`, `last_error`."""
        return self._ckpt

    # -- the beginning -----------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Takes its places: first at the edges of an epoch, else last."""
        if stage == "fit":
            ours = [self, *(c for c in trainer.callbacks if getattr(c, "owner", None) is self)]
            others = [c for c in trainer.callbacks if c not in ours]
            # A new list: the old one is being walked through.
            trainer.callbacks = [_First(self), *others, self]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is made: it is filled from the newest checkpoint."""
        if trainer.fast_dev_run:
            return
        self._state, self._rest = state_of(trainer, self._allow_pickle)
        self._ckpt = ckpt = Checkpointer(self._destination, **self._options)
        if self._stop_on_sigterm and threading.current_thread() is threading.main_thread():
            ckpt.stop_requested()  # Takes the signal, before Lightning does.
            self._handler = signal.getsignal(signal.SIGTERM)
        self._seen, self._is_due, self.restored = trainer.global_step, False, None
        if self._seen > 0 and self._seen >= (ckpt.latest_step() or 0):
            ckpt._find(None, None, False, False, False)  # A second `fit`, further than the run.
        else:
            self.restored = ckpt.restore(self._state)
        if self.restored is not None:
            if trainer.ckpt_path:
                logger.warning(
                    "fit(ckpt_path=...) is passed over: %s goes on from step %d",
                    self._destination,
                    self.restored.step,
                )
            self._go_on(trainer)
        self._watch(trainer)

    def _go_on(self, trainer: Any) -> None:
        """The loops have their places back, loaders and random numbers get theirs when made."""
        assert self._rest is not None
        self._seen = trainer.global_step
        self._rng = Rng().state_dict()
        loop = trainer.fit_loop
        self._loaders = loop._combined_loader_states_to_load
        loop._combined_loader_states_to_load = []
        if self._rest.at_epoch_start:
            # All its counts are at an end: this is no restart, whatever `max_steps` says.
            loop._restarting = loop._resuming_from_checkpoint = False
            loop.epoch_loop.restarting = False
            loop.epoch_loop.val_loop.restarting = True  # No sanity check in a resumed run.

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Loaders have made their iterators, which drew random numbers: both are put back."""
        if self._rest is None:
            return
        self._rest.begun = True
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if self._rng is None:
            self._rest.orders = orders(trainer.fit_loop, drawn=True)
            return
        if trainer.ckpt_path and trainer.strategy.restore_checkpoint_after_setup:
            raise InvalidError(
                f"{type(trainer.strategy).__name__} has loaded fit(ckpt_path=...) over the newest "
                f"step of {self._destination}: give it where the run has no checkpoint yet"
            )
        put_back(trainer.fit_loop, self._loaders, self._rest.orders, self._rest.at_epoch_start)
        Rng().load_state_dict(self._rng)
        self._rng, self._loaders, self._rest.at_epoch_start = None, [], False

    # -- every step --------------------------------------------------------------------------

    def _watch(self, trainer: Any) -> None:
        """Looks at the training between two batches.

        No hook is called there: after the last one of a batch come its counts, validation and
        ReduceLROnPlateau, and before the first one of the next its rows are read and it is counted.
        """
        self._loop = loop = trainer.fit_loop.epoch_loop
        finish = loop.on_advance_end

        def on_advance_end(data_fetcher: Any) -> None:
            if loop._skip_next_val and self.restored is not None:
                # A resumed loop does the end of the last batch once more, without its validation.
                # It was saved after all of that (a file of Lightning's was not).
                loop._skip_next_val = False
                return
            finish(data_fetcher)
            self._look(trainer)

        loop.on_advance_end = on_advance_end

    def _look(self, trainer: Any) -> None:
        """Saves if it is due, or remembers to at the end of the epoch."""
        # Else ReduceLROnPlateau would be left out at the end of a resumed epoch.
        trainer.fit_loop._restarting = False
        step, before = trainer.global_step, self._seen
        if self._ckpt is None or step == before:
            return  # Gradients are being gathered.
        self._seen = self._ckpt._completed(step)
        every = self._ckpt.every
        is_last = 0 < trainer.max_steps <= step
        if self._stop_on_sigterm and self._ckpt.stop_requested():
            is_last = trainer.should_stop = True
        if is_last or step // every > before // every:
            self._is_due = True
            if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
                self._save(trainer)

    def save_epoch(self, trainer: Any) -> None:
        """Saves what waited for the end of the epoch before."""
        if self._rest is not None and trainer.current_epoch > 0:
            self._rest.orders = orders(trainer.fit_loop, drawn=False)
        self._save_boundary(trainer)

    def save_end(self, trainer: Any) -> None:
        """Saves the end of the training, if it is the end of an epoch."""
        self._is_due |= trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        self._save_boundary(trainer)

    def _save_boundary(self, trainer: Any) -> None:
        if self._rest is not None:
            self._rest.at_epoch_start = True
            self._save(trainer)
            self._rest.at_epoch_start = False

    def _save(self, trainer: Any) -> None:
        is_due, self._is_due = self._is_due, False
        if self._ckpt is not None and is_due:
            # The number of what is there now; hooks may have stepped since it became due.
            self._ckpt.save(trainer.global_step, self._state)

    # -- the end -----------------------------------------------------------------------------

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """What was saved stays where it is; nothing more is waited for than a few seconds."""
        ckpt = self._forget()
        if ckpt is not None:
            ckpt._hurry()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Waits until the newest checkpoint is on disk, and in the bucket where it goes there."""
        ckpt = self._forget()
        if ckpt is not None:
            ckpt.close()

    def _forget(self) -> Checkpointer | None:
        ckpt, self._ckpt = self._ckpt, None
        self._state, self._rest, self._rng, self._loaders = {}, None, None, []
        loop, self._loop = self._loop, None
        if loop is not None:
            vars(loop).pop("on_advance_end", None)
        return ckpt


class _First(_host.Callback):  # type: ignore[misc]
    """An epoch's end is saved before other callbacks begin the next one, or end the training."""

    def __init__(self, owner: CheckpointCallback) -> None:
        self.owner = owner

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.owner.save_epoch(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.owner.save_end(trainer)
