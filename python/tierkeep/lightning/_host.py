"""Lightning, by the one of its two names that the script uses. Its classes are not the same."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def _names() -> tuple[str, str]:
    """The packages of the Trainer and of Fabric."""
    imported = "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules
    if imported and importlib.util.find_spec("lightning") is not None:
        return "lightning.pytorch", "lightning.fabric"
    return "pytorch_lightning", "lightning_fabric"


_trainer, _fabric = _names()

Callback: Any = importlib.import_module(f"{_trainer}.callbacks").Callback
CheckpointIO: Any = importlib.import_module(f"{_fabric}.plugins.io.checkpoint_io").CheckpointIO
TorchCheckpointIO: Any = importlib.import_module(f"{_fabric}.plugins.io.torch_io").TorchCheckpointIO
get_filesystem: Any = importlib.import_module(f"{_fabric}.utilities.cloud_io").get_filesystem
saving: Any = importlib.import_module(f"{_trainer}.core.saving")
is_overridden: Any = importlib.import_module(f"{_trainer}.utilities.model_helpers").is_overridden
CheckpointHooks: Any = importlib.import_module(f"{_trainer}.core.hooks").CheckpointHooks
