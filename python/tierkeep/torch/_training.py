"""What a resumed run needs, gathered: so that it goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tierkeep import _torch
from tierkeep._rng import Rng
from tierkeep.errors import InvalidError


def training_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    *,
    scheduler: Any = None,
    loader: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """The state of a training job, for a `Checkpointer`: made once, restored, and saved each time.

        state = tierkeep.torch.training_state(model, optimizer, scheduler=sched, loader=loader)
        with tierkeep.Checkpointer("/ckpt/gpt", every=50) as ckpt:
            found = ckpt.restore(state)

    With the random numbers of Python, numpy, torch and CUDA. The optimizers' state goes by the
    names of their parameters (`OptimizerState`), so that it finds its way to another mesh, another
    number of ranks, or another cut of a pipeline.

    Args:
        model: a module; of a wrapped one (DDP, `torch.compile`) the one inside.
        optimizer: one or several, of this model.
        scheduler, loader: anything with `state_dict` and `load_state_dict`, as torchdata's
            `StatefulDataLoader`, whose position comes back too.
        more: what else there is, as `scaler=`, `ema=`, or plain values, by name.

    Raises:
        InvalidError: an optimizer has parameters that the model has not.
    """
    model = unwrapped(model)
    single = isinstance(optimizer, torch.optim.Optimizer)
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    named = [OptimizerState(model, one) for one in optimizers]
    state: dict[str, Any] = {"model": model, "rng": Rng()}
    if named:
        state["optim"] = named[0] if single else named
    given = {"scheduler": scheduler, "loader": loader, **more}
    for name, value in given.items():
        if value is None:
            continue
        if name in state:
            raise InvalidError(f"{name}: that is the name of something else in the state")
        state[name] = value
    return state


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside `torch.compile` and DistributedDataParallel."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        wraps = name == "_orig_mod" or isinstance(model, torch.nn.parallel.DistributedDataParallel)
        if wraps and isinstance(inner, torch.nn.Module):
            return unwrapped(inner)
    return model


class OptimizerState:
    """An optimizer's state by the names of its parameters, not by their order.

    Args:
        model: the module whose parameters it steps.
        optimizer: of torch, or one with its `state_dict`.

    Raises:
        InvalidError: it has parameters that the model has not.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # Of tied ones the first name.
        names = {id(param): name for name, param in reversed([*model.named_parameters()])}
        self._names: list[list[str]] = []
        for index, group in enumerate(optimizer.param_groups):
            if any(id(param) not in names for param in group["params"]):
                raise InvalidError(
                    f"group {index} of the optimizer has a parameter that the model has not "
                    "(make the optimizer after the model is wrapped or cut)"
                )
            self._names.append([names[id(param)] for param in group["params"]])

    def tierkeep_params(self) -> dict[str, torch.Tensor]:
        """The parameters by name: moments lie where these do, and are cut as they are."""
        groups = zip(self._names, self.optimizer.param_groups, strict=True)
        return {
            name: param
            for names, group in groups
            for name, param in zip(names, group["params"], strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's, with names in place of numbers."""
        tree = self.optimizer.state_dict()
        names = [name for group in self._names for name in group]
        groups = zip(tree["param_groups"], self._names, strict=True)
        return {
            "state": {names[index]: of_param for index, of_param in tree["state"].items()},
            "param_groups": [{**group, "params": list(params)} for group, params in groups],
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Takes `tree` over: tensors as they are, without a cast."""
        saved, groups = tree["state"], tree["param_groups"]
        by_name = {name: group for group in groups for name in group["params"]}
        state: dict[int, Any] = {}
        loaded: list[dict[str, Any]] = []
        number = 0
        for index, names in enumerate(self._names):
            known = next((by_name[name] for name in names if name in by_name), None)
            if known is None:
                # All its parameters were saved by other ranks, with the same groups.
                known = groups[min(index, len(groups) - 1)]
            indices = list(range(number, number + len(names)))
            state.update(
                (at, saved[name]) for at, name in zip(indices, names, strict=True) if name in saved
            )
            loaded.append({**known, "params": indices})
            number += len(names)
        _torch.load_optimizer(self.optimizer, {"state": state, "param_groups": loaded}, "optim")
