"""Where a resumed training reads on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

logger = logging.getLogger("tierkeep")


def orders(fit_loop: Any, *, drawn: bool) -> list[Any]:
    """The generators of shuffling samplers that Lightning has wrapped for several ranks, as they
    are before they draw the order of an epoch. The wrapper keeps nothing that could be saved.

    Args:
        fit_loop: of the Trainer.
        drawn: they have drawn the order of their first epoch, and nothing before.
    """
    states = []
    for wrapper in _wrappers(fit_loop):
        generator = wrapper._sampler.generator
        if drawn:
            generator = torch.Generator().manual_seed(generator.initial_seed())
        states.append(generator.get_state())
    return states


def put_back(
    fit_loop: Any, states: list[dict[str, Any]], generators: list[Any], at_epoch_start: bool
) -> None:
    """Puts the loaders where they were. Lightning does it too, but before it tells samplers the
    epoch, so that a DistributedSampler would go on in the order of the first one; and not at all
    where an epoch is about to begin.
    """
    combined, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
    epoch = fit_loop.epoch_progress.current.processed
    for loader in combined.flattened:
        _set_epoch(loader, epoch - at_epoch_start)
    wrappers = list(_wrappers(fit_loop))
    if at_epoch_start:
        # The epoch that has ended, also where nobody asked for one batch more than there are. What
        # comes next is Lightning's to begin.
        combined._load_state_dicts([_unfinished(state) for state in states])
        iter(fetcher)
        _set(wrappers, generators)
        return
    _set(wrappers, generators)
    for wrapper in wrappers:
        wrapper.reset()
        # torchdata begins the order three times to get where it was: it is to be one and the same.
        wrapper.reset = lambda: None
    combined._load_state_dicts(states)
    iter(fetcher)
    for wrapper in wrappers:
        del wrapper.reset
    if getattr(fetcher, "batches", None):
        logger.warning(
            "the loader has no length, so that Lightning had read one batch ahead when this was "
            "saved: the resumed training leaves that batch out"
        )


def _unfinished(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "_iterator_finished": False} if "_iterator_finished" in state else state


def _set(wrappers: list[Any], generators: list[Any]) -> None:
    for wrapper, state in zip(wrappers, generators, strict=False):
        wrapper._sampler.generator.set_state(state)


def _set_epoch(loader: Any, epoch: int) -> None:
    for sampler in _samplers(loader):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)


def _wrappers(fit_loop: Any) -> Iterator[Any]:
    for loader in fit_loop._combined_loader.flattened if fit_loop._combined_loader else ():
        for sampler in _samplers(loader):
            wrapper: Any = getattr(sampler, "dataset", None)
            if type(wrapper).__name__ != "_DatasetSamplerWrapper":
                continue
            if isinstance(getattr(wrapper._sampler, "generator", None), torch.Generator):
                yield wrapper


def _samplers(loader: Any) -> tuple[Any, Any]:
    of_batches = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None), getattr(of_batches, "sampler", None)
