"""tierkeep under the interfaces that PyTorch's users know.

import torch.distributed.checkpoint as dcp
import tierkeep.torch

dcp.save(state_dict, storage_writer=tierkeep.torch.StorageWriter("/ckpt/gpt/step-100"))
dcp.load(state_dict, storage_reader=tierkeep.torch.StorageReader("/ckpt/gpt/step-100"))
"""

from tierkeep.torch._reader import StorageReader
from tierkeep.torch._writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
