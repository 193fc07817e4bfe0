"""tierkeep under Hugging Face Accelerate: all that an `Accelerator` has prepared, in a run.

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(
        use_stateful_dataloader=True, use_seedable_sampler=True))
    model, optimizer, scheduler, loader = accelerator.prepare(...)
    with tierkeep.accelerate.Keeper(accelerator, "/ckpt/gpt", every=50) as keeper:
        found = keeper.restore()                        # None on a fresh run
        for step, batch in enumerate(loader, found.step + 1 if found else 1):
            ...
            keeper.step(step)                           # saves if due

It takes the place of `accelerator.save_state` and `load_state`, and saves what these do: models,
optimizers, schedulers, the gradient scaler, what `register_for_checkpointing` was given, loaders,
random numbers of each rank, and the count of gradient accumulation. Each rank makes one copy of
what it has into RAM; nothing is gathered, pickled, or waited for. (A start has one collective,
which is Checkpointer's: all ranks get an id.)

Why it does not sit in `register_save_state_pre_hook`: that hook can keep Accelerate from writing
model weights, and nothing else. Optimizers, schedulers and random numbers are pickled to
`output_dir` in any case, and with FSDP the weights are there before the hook is called. A
checkpoint would be two halves that a crash may tear apart, and what costs most would go to disk
while the training waits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator

from tierkeep import _accelerated
from tierkeep._accelerated import Held, Order, State, numbered
from tierkeep._checkpointer import Checkpointer
from tierkeep._facts import Restored
from tierkeep._rng import Rng
from tierkeep._tierkeep import Save
from tierkeep.errors import InvalidError

logger = logging.getLogger("tierkeep")


class Keeper:
    """Saves what an `Accelerator` has prepared, and brings it back.

    Where the position in the data is to come back too, loaders are torchdata's, and shuffled ones
    have a seed: `DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True)`.
    Of others only the epoch is known: `accelerator.skip_first_batches` finds the place, and random
    numbers are not those of a run that was not interrupted.

    Models that are the same on all ranks (DistributedDataParallel) the first rank saves, as in
    Accelerate; of sharded ones (FSDP2, tensor parallelism) every rank saves its part.

    With `capture="overlap"` the prepared optimizers wait for the copy before they step. A script
    that writes parameters in place by itself after a save (an average of the weights swapped in
    for an evaluation, the best weights loaded at the end) calls `keeper.ckpt.fence()` first.

    Args:
        accelerator: after `prepare` and `register_for_checkpointing`, at the first call at least.
        destination, every, options: of `tierkeep.Checkpointer`, which is `keeper.ckpt`.

    Raises:
        InvalidError: DeepSpeed, Megatron-LM and FSDP1, which keep their state themselves.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        destination: str | os.PathLike[str],
        *,
        every: int | None = None,
        **options: Any,
    ) -> None:
        _accelerated.check(accelerator)
        self.accelerator = accelerator
        self.ckpt = Checkpointer(destination, every=every, **options)
        self._held: Held | None = None
        self._parts: list[int] = []

    def restore(self, *, step: int | None = None, rollback: bool = False) -> Restored | None:
        """Brings all of it back: the newest complete checkpoint, or `step`. See
        `Checkpointer.restore`. Called on all ranks, once everything is prepared, before loops over
        loaders begin.
        """
        for trouble in _without_place(self.accelerator._dataloaders):
            logger.warning("%s", trouble)
        return self._all().restore(step, rollback)

    def step(
        self, step: int, *, metrics: Mapping[str, float] | None = None, tags: Iterable[str] = ()
    ) -> Save | None:
        """Saves if `step` is divisible by `every`; else returns None at once.

        With gradient accumulation: after a step of the optimizer (`accelerator.sync_gradients`),
        as gradients are not saved.
        """
        if step % self.ckpt.every:
            return self.ckpt.step(step, None)
        return self.save(step, metrics=metrics, tags=tags)

    def save(
        self, step: int, *, metrics: Mapping[str, float] | None = None, tags: Iterable[str] = ()
    ) -> Save:
        """Saves now. See `Checkpointer.save`."""
        return self.ckpt.save(step, self._all().saved, metrics=metrics, tags=tags)

    def stop_requested(self) -> bool:
        """Whether to leave the loop now (SIGTERM). See `Checkpointer.stop_requested`."""
        return self.ckpt.stop_requested()

    def close(self) -> None:
        """Waits until the newest checkpoint is on disk. See `Checkpointer.close`."""
        self.ckpt.close()

    def __enter__(self) -> Self:
        self.ckpt.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ckpt.__exit__(kind, error, trace)

    # -- the state ---------------------------------------------------------------------------

    def _all(self) -> Held:
        """All that is prepared now; made anew where there is more of it than before."""
        acc = self.accelerator
        lists = (acc._models, acc._optimizers, acc._schedulers, acc._dataloaders)
        parts = [id(part) for some in (*lists, acc._custom_objects) for part in some]
        if self._held is None or parts != self._parts:
            if not acc._models:
                raise InvalidError("nothing is prepared: accelerator.prepare(...) comes first")
            rest: State = {"accelerator": _Count(acc), "rng": Rng()}
            for name, some in (
                ("scheduler", acc._schedulers),
                ("dataloader", [_Loader(loader) for loader in acc._dataloaders]),
                ("custom_checkpoint", acc._custom_objects),
            ):
                rest.update((numbered(name, index), part) for index, part in enumerate(some))
            if acc.scaler is not None:
                rest["scaler"] = acc.scaler
            big = _accelerated.named(acc._models, acc._optimizers)
            self._held, self._parts = Held(self.ckpt, big, rest), parts
            self.ckpt.guard(*map(_accelerated.own, acc._optimizers))
        return self._held


class _Count:
    """How many batches were accumulated."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> State:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: State) -> None:
        self._accelerator.step = state["step"]


class _Loader:
    """Where a prepared loader is: its epoch, the seed of its order and, if it knows, its place."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._order = Order(loader)

    def state_dict(self) -> State:
        loader = self._loader
        # In the body of the loop, at the last batch, the count of epochs is one behind.
        inside = any(loop is loader for loop in loader.gradient_state.dataloader_references)
        epoch = loader.iteration + (inside and loader.end_of_dataloader)
        place = loader.state_dict() if loader.use_stateful_dataloader else None
        return {"epoch": epoch, "order": self._order.state_dict(), "place": place}

    def load_state_dict(self, state: State) -> None:
        loader = self._loader
        self._order.load_state_dict(state["order"])
        # Before the place: the order of the rows is drawn when that is looked for.
        loader.set_epoch(state["epoch"])
        if state["place"] is not None and loader.use_stateful_dataloader:
            loader.load_state_dict(state["place"])
            # It makes its iterator now, which draws a random number, and not in the script's `for`.
            loader.base_dataloader.state_dict()
            loader.dl_state_dict = state["place"]


def _without_place(loaders: list[Any]) -> Iterable[str]:
    """What is said of loaders that cannot go on in the middle of an epoch."""
    for index, loader in enumerate(loaders):
        name = numbered("dataloader", index)
        sampler = Order(loader).sampler
        if not loader.use_stateful_dataloader:
            yield f"{name} does not know its place in the data: say use_stateful_dataloader=True"
        elif isinstance(sampler, torch.utils.data.RandomSampler) and not hasattr(
            sampler, "initial_seed"
        ):
            yield f"{name} is shuffled in an order that is not known: say use_seedable_sampler=True"
