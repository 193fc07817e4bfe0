"""What `tierkeep.accelerate` and `tierkeep.transformers` share: the Trainer runs on Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tierkeep._build import Include, Make
from tierkeep._checkpointer import Checkpointer
from tierkeep._facts import Restored
from tierkeep._filling import Strict
from tierkeep._init import Origin
from tierkeep._restore import Plan, Wish, planned
from tierkeep._tierkeep import Found
from tierkeep.errors import InvalidError, TierkeepError
from tierkeep.torch import OptimizerState
from tierkeep.torch._training import unwrapped

State = dict[str, Any]

#: What keeps its state where nobody else can reach it, and what is to be used in its place.
_REFUSED = {
    "DEEPSPEED": "DeepSpeed keeps its state itself",
    "MEGATRON_LM": "Megatron-LM keeps its state itself",
    "XLA": "arrays of torch_xla are not known",
}


def check(accelerator: Any) -> None:
    """Refuses what would be saved wrong, or gathered.

    Raises:
        InvalidError: the parameters are not on the model.
    """
    kind = accelerator.distributed_type.name
    if kind in _REFUSED:
        raise InvalidError(f"{_REFUSED[kind]}: save with what it brings along")
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise InvalidError("FSDP1 gathers its flat parameters to be saved: say fsdp_version=2")


def named(models: Sequence[Any], optimizers: Sequence[Any]) -> State:
    """Models and optimizers under the names that Accelerate gives its files: `model`, `model_1`."""
    inner = [unwrapped(model) for model in models]
    state: State = {numbered("model", index): model for index, model in enumerate(inner)}
    # Of several models an optimizer may step some or all: one namespace for all parameters.
    known = inner[0] if len(inner) == 1 else torch.nn.ModuleDict(state)
    ours = {id(param) for param in known.parameters()}
    for index, wrapped in enumerate(optimizers):
        optimizer = own(wrapped)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # Parameters that lie in no model have no name: theirs go by number, as torch has them.
        by_name = all(id(param) in ours for param in params)
        state[numbered("optimizer", index)] = (
            OptimizerState(known, optimizer) if by_name else optimizer
        )
    return state


def numbered(name: str, index: int) -> str:
    """`model`, `model_1`, `model_2`."""
    return f"{name}_{index}" if index else name


def own(optimizer: Any) -> Any:
    """The optimizer of torch's inside Accelerate's."""
    inside = getattr(optimizer, "optimizer", None)
    return own(inside) if isinstance(inside, torch.optim.Optimizer) else optimizer


def plan(
    ckpt: Checkpointer,
    found: Found,
    state: State,
    *,
    strict: Strict = True,
    include: Iterable[str] | None = None,
) -> tuple[Plan, Make]:
    """How `state` is filled from a checkpoint that was decided on (`Checkpointer.restore` would
    decide again).
    """
    savers, allowed = ckpt.settings["savers"], ckpt._allow_pickle
    return planned(found, state, Wish(None, Include(include), strict, savers, allowed))


class Held:
    """What a rank restores, and what of it it saves.

    In DistributedDataParallel all ranks have the same model and optimizer: the first one saves
    them, as Accelerate does, and all read them there. Sharded ones (DTensors) each rank has a part
    of, and saves it.

    Args:
        ckpt: of this rank.
        big: models and optimizers.
        rest: what each rank has alone.
    """

    def __init__(self, ckpt: Checkpointer, big: State, rest: State) -> None:
        self.ckpt = ckpt
        self.big = big
        self.rest = rest
        # `init_from` fills what the state has, and on all ranks.
        apart = ckpt.rank > 0 and ckpt._init_from is None and not _is_sharded(big)
        self.saved = rest if apart else {**big, **rest}
        self._apart = apart

    def restore(self, step: int | None = None, rollback: bool = False) -> Restored | None:
        """Fills all of it from a checkpoint; `None` where there is none."""
        return self.fill(self.ckpt._find(step, None, rollback, False, False))

    def fill(self, found: Found | None) -> Restored | None:
        """The same with what all ranks have decided on."""
        ckpt = self.ckpt
        ckpt.fence()
        if found is None:
            if ckpt._init_from is not None:
                handle, savers = ckpt._handle, ckpt.settings["savers"]
                agree, shard = handle.agree_on_init, handle.shard_rank
                origin = Origin(ckpt._init_from, ckpt._ram_dir, savers, shard, agree)
                how = (None, None, ckpt._allow_pickle, ckpt._threads)
                handle.tell_init(origin.fill(self.saved, *how))
            ckpt._prepare_behind(self.saved)
            return None
        plans = [plan(ckpt, found, self.saved)]
        if self._apart:
            # Before the rest, which has the random numbers.
            plans.insert(0, plan(ckpt, self._first(found), self.big, strict="state"))
        for one, _ in plans:
            one.check()
        told = [one.fill(ckpt._threads) for one, _ in plans]
        new = [make() for _, make in plans][-1]
        ckpt._prepare_behind(self.saved)
        damaged = tuple(sentence for _, sentences in told for sentence in sentences)
        return Restored(found.step, found.attempt, told[0][0], new, found.meta, damaged)

    def _first(self, found: Found) -> Found:
        """The first rank's shard of the same checkpoint."""
        first = min([found.rank, *found.other_ranks])
        if found.rank == first:
            return found
        # One description in place of all ranks'; they are asked for it where this node has not
        # got it: with directories that are each node's own.
        with contextlib.suppress(TierkeepError):
            return self.ckpt._handle.reader().choose_for(first, found.step, found.attempt)
        return next(shard for shard in found.others() if shard.rank == first)


def _is_sharded(state: State) -> bool:
    models = (part for part in state.values() if isinstance(part, torch.nn.Module))
    return any(isinstance(param, DTensor) for model in models for param in model.parameters())


class Order:
    """The order of a loader's rows, where its sampler has a seed (`use_seedable_sampler`)."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    @property
    def sampler(self) -> Any:
        """The sampler, below what Accelerate has put around it."""
        batches = self._loader.batch_sampler
        if isinstance(self._loader.sampler, torch.utils.data.BatchSampler):
            batches = self._loader.sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        return getattr(batches, "sampler", None)

    def state_dict(self) -> State:
        """The seed, if there is one."""
        return {"seed": getattr(self.sampler, "initial_seed", None)}

    def load_state_dict(self, state: State) -> None:
        """Takes the seed over: an order begins anew with each epoch."""
        if state["seed"] is not None and hasattr(self.sampler, "initial_seed"):
            self.sampler.initial_seed = state["seed"]
