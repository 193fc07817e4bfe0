"""What a `Trainer` trains with, as a state: tensors where they lie, and all else as Lightning dumps
it.

Lightning's own dump is the tree; in place of its copies of model and optimizers (which some
strategies gather, or bring to the CPU) come the live ones. Hooks see a dump as they know it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tierkeep import _restore, _tierkeep
from tierkeep.errors import InvalidError
from tierkeep.lightning import _host
from tierkeep.torch import training_state

logger = logging.getLogger("tierkeep")

# Strategies with a state that is not in the module's own tensors and its optimizers'.
_REFUSED = {
    "FSDPStrategy": "it flattens parameters; ModelParallelStrategy (FSDP2) does not",
    "DeepSpeedStrategy": "its engine has the state",
    "XLAStrategy": "its tensors are XLA's",
    "XLAFSDPStrategy": "its tensors are XLA's",
    "SingleDeviceXLAStrategy": "its tensors are XLA's",
}


def state_of(trainer: Any, allow_pickle: Collection[str]) -> tuple[dict[str, Any], Rest]:
    """The whole state of a training, and the part of it that is Lightning's.

    Raises:
        InvalidError: the strategy, or an optimizer, has state that is somewhere else.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _REFUSED:
            why = _REFUSED[kind.__name__]
            raise InvalidError(f"{kind.__name__} is not supported: {why}")
    for optimizer in trainer.optimizers:
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise InvalidError(
                "ZeroRedundancyOptimizer is not supported: it gathers its state on one rank; "
                "ModelParallelStrategy (FSDP2) has it in parts"
            )
    rest = Rest(trainer, allow_pickle)
    module, optimizers = trainer.lightning_module, list(trainer.optimizers)
    return training_state(module, optimizers, lightning=rest), rest


class Rest:
    """Loops, callbacks, schedulers, precision, datamodule, and what hooks add."""

    def __init__(self, trainer: Any, allow_pickle: Collection[str]) -> None:
        self._trainer = trainer
        self._allow_pickle = allow_pickle
        #: Hooks are called once there is something to save.
        self.begun = False
        #: Nothing of the epoch that is to begin has been done.
        self.at_epoch_start = False
        #: Of samplers that keep nothing themselves, as they were when the epoch began.
        self.orders: list[Any] = []
        self._told: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Lightning's dump without what the state has beside it."""
        if not self.begun:
            return {}
        # To be shown; the state has them beside it.
        is_seen = _is_seen(self._trainer)
        model = self._trainer.lightning_module.state_dict() if is_seen else {}
        with _live(self._trainer.strategy, dict(model), is_seen):
            dump: dict[str, Any] = self._trainer._checkpoint_connector.dump_checkpoint(False)
        dump.pop("optimizer_states")
        weights = dump["state_dict"]
        if weights.keys() == model.keys() and all(weights[k] is model[k] for k in model):
            del dump["state_dict"]  # No hook has put others there, as WeightAveraging does.
        dump = without_code(dump, self._allow_pickle, self._told)
        return {**dump, "at_epoch_start": self.at_epoch_start, "orders": self.orders}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Hands it to Lightning; model and optimizers are in place already."""
        trainer = self._trainer
        connector = trainer._checkpoint_connector
        self.at_epoch_start, self.orders = tree.pop("at_epoch_start"), tree.pop("orders")
        model = {"state_dict": trainer.lightning_module.state_dict()}
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        connector._loaded_checkpoint = {**model, **tree, "optimizer_states": optimizers}
        try:
            trainer.lightning_module.on_load_checkpoint(connector._loaded_checkpoint)
            connector.restore_datamodule()
            connector.restore_callbacks()
            connector.restore_precision_plugin_state()
            connector.restore_loops()
            connector.restore_lr_schedulers()
        finally:
            # What `fit(ckpt_path=...)` has loaded too: the run's own state is further.
            connector._loaded_checkpoint = {}


def _is_seen(trainer: Any) -> bool:
    """Whether any hook looks at a dump before it is saved."""
    hook, overridden = "on_save_checkpoint", _host.is_overridden
    return (
        overridden(hook, trainer.lightning_module)
        or overridden(hook, trainer.precision_plugin, _host.CheckpointHooks)
        or any(overridden(hook, callback) for callback in trainer.callbacks)
    )


@contextlib.contextmanager
def _live(strategy: Any, model: dict[str, Any], is_seen: bool) -> Iterator[None]:
    """The strategy shows tensors where they lie, with no copy and no collective."""

    def of(optimizer: Any) -> Any:
        return getattr(optimizer, "_optimizer", optimizer).state_dict() if is_seen else {}

    vars(strategy).update(lightning_module_state_dict=lambda: model, optimizer_state=of)
    try:
        yield
    finally:
        del strategy.lightning_module_state_dict, strategy.optimizer_state


def without_code(
    checkpoint: Mapping[str, Any], allow_pickle: Collection[str], told: set[str]
) -> dict[str, Any]:
    """A checkpoint without hyperparameters that are code or objects: each of them is told once.

    A resume does not need them, and a training is not to end for one at its first save.
    """
    kept = dict(checkpoint)
    for owner in ("", "datamodule_"):
        given = kept.pop(f"{owner}hyper_parameters", None)
        if isinstance(given, dict):
            kept[f"{owner}hyper_parameters"] = _storable(given, owner, allow_pickle, told)
        elif given is not None:  # A tree of omegaconf's, and its type.
            both = {name: kept.pop(f"{owner}{name}", None) for name in ("hparams_type",)}
            both = _storable({"hyper_parameters": given, **both}, owner, allow_pickle, told)
            kept.update({f"{owner}{name}": value for name, value in both.items()})
    return kept


def _storable(
    given: dict[str, Any], owner: str, allow_pickle: Collection[str], told: set[str]
) -> dict[str, Any]:
    kept = {}
    for name, value in given.items():
        why = _refusal(value, allow_pickle)
        if why is None:
            kept[name] = value
        elif owner + name not in told:
            told.add(owner + name)
            logger.warning("the hyperparameter %s is not in the checkpoint: %s", name, why)
    return kept


def _refusal(value: Any, allow_pickle: Collection[str]) -> str | None:
    if _restore.is_object(value):
        return "it has a state of its own (save_hyperparameters(ignore=...) leaves it out)"
    try:
        _tierkeep.encode_tree({"value": value}, set(allow_pickle))
    except InvalidError as error:
        return str(error)
    return None
