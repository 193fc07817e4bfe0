"""What each rank of jobset-torch.yaml runs: a small model, sharded over all ranks, that goes on
from its newest checkpoint wherever it is started. `DEST`, `DISK`: arguments of the Checkpointer.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tierkeep
import tierkeep.torch

WIDTH, BATCH = 256, 32
STEPS = int(os.environ.get("STEPS", "100000"))


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(WIDTH, 1024), nn.GELU(), nn.Linear(1024, WIDTH)).to(kind)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    state = tierkeep.torch.training_state(net, optimizer)
    disk = os.environ.get("DISK")
    with tierkeep.Checkpointer(os.environ["DEST"], disk=disk, every=50) as ckpt:
        found = ckpt.restore(state)
        start = found.step if found else 0
        print(f"{ckpt!r}\nstarts after step {start}", found and f"from {found.tier}", flush=True)
        for step in range(start + 1, STEPS + 1):
            rows = torch.randn(BATCH, WIDTH, device=kind)
            loss = nn.functional.mse_loss(net(rows), rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.step(step, state)
            if step % 100 == 0 and dist.get_rank() == 0:
                print(f"{time.strftime('%X')} step {step} loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
