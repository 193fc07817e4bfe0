"""tierkeep under the interfaces that PyTorch's users know.

`StorageWriter` and `StorageReader` are for `torch.distributed.checkpoint`:

    dcp.save(state_dict, storage_writer=tierkeep.torch.StorageWriter("/ckpt/gpt/step-100"))
    dcp.load(state_dict, storage_reader=tierkeep.torch.StorageReader("/ckpt/gpt/step-100"))

so does `checkpoint_id="tierkeep:///ckpt/gpt/step-100"`, without them.

`training_state` gathers what a `tierkeep.Checkpointer` saves and restores:

    state = tierkeep.torch.training_state(model, optimizer, scheduler=scheduler, loader=loader)
"""

from tierkeep.torch import _url
from tierkeep.torch._reader import StorageReader
from tierkeep.torch._training import OptimizerState, training_state
from tierkeep.torch._writer import StorageWriter

__all__ = ["OptimizerState", "StorageReader", "StorageWriter", "training_state"]

_url.register()
