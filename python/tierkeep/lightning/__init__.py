"""tierkeep in Lightning, under either of its names (`lightning.pytorch`, `pytorch_lightning`).

`CheckpointCallback` saves the whole state every few steps and goes on from the newest:

    trainer = Trainer(callbacks=[tierkeep.lightning.CheckpointCallback("/ckpt/gpt", every=50)])

`CheckpointIO` is where Lightning's own checkpoints go, those of `ModelCheckpoint`:

    trainer = Trainer(plugins=[tierkeep.lightning.CheckpointIO()])
"""

from tierkeep.lightning._callback import CheckpointCallback
from tierkeep.lightning._io import CheckpointIO, load_from_checkpoint

__all__ = ["CheckpointCallback", "CheckpointIO", "load_from_checkpoint"]
