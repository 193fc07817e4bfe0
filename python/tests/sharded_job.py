"""One process of jobs, one after the other, whose model is cut in one way or another: each restores
what is there, compares it with what was saved, trains, and saves.

    python sharded_job.py RUN '[["fsdp", 3], ["plain", 1]]' checkpointer|dcp
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import tierkeep
import tierkeep.torch
from tierkeep.torch import _runs

#: Sizes that no number of ranks here divides evenly.
WIDTH, HIDDEN = 7, 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.norm(self.down(torch.relu(self.up(x))))


def built(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, cut as `kind` says, and what the Checkpointer is told."""
    torch.manual_seed(0)
    model = Net()
    world = dist.get_world_size()
    if kind == "plain":
        return model, {"replicated": {"*": True}} if world > 1 else {}
    if kind == "fsdp":
        fully_shard(model.up)
        fully_shard(model)
        return model, {}
    if kind == "hsdp":
        names = ("copies", "parts")
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names))
        return model, {}
    assert kind == "fsdp-tp", kind
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    return model, {}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.manual_seed(1)  # Ranks of one tensor-parallel group see the same.
    model(torch.randn(4, WIDTH)).square().mean().backward()
    for param in model.parameters():
        if not isinstance(param, DTensor):  # Nobody else does.
            dist.all_reduce(param.grad)
    optimizer.step()


def whole(state: Any) -> Any:
    """Every tensor as one rank alone would have it."""
    if isinstance(state, DTensor):
        return state.full_tensor().clone()
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(a)} and {sorted(b)}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list):
        return [line for i, v in enumerate(a) for line in differences(v, b[i], f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a} and {b}"]


class Job:
    """Restores, looks, trains, saves."""

    def __init__(self, run: Path, kind: str) -> None:
        self.model, self.how = built(kind)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.run, self.expected = run, run.parent / "expected.pt"

    def now(self) -> Any:
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": whole(model), "optim": whole(optimizer)}

    def look(self) -> list[str]:
        """What is not as it was when it was saved."""
        return differences(torch.load(self.expected, weights_only=False), self.now())

    def go_on(self) -> None:
        train(self.model, self.optimizer)
        after = self.now()
        if dist.get_rank() == 0:
            torch.save(after, self.expected)

    def with_checkpointer(self) -> tuple[int, list[str]]:
        state = {"model": self.model, "optim": self.optimizer}
        with tierkeep.Checkpointer(self.run, **self.how) as ckpt:
            found = ckpt.restore(state)
            step = found.step if found else 0
            told = self.look() if found else []
            self.go_on()
            ckpt.save(step + 1, state).wait("disk", 60)
        return step, told

    def with_dcp(self) -> tuple[int, list[str]]:
        def state() -> dict[str, Any]:
            optimizer = get_optimizer_state_dict(self.model, self.optimizer)
            return {"model": get_model_state_dict(self.model), "optim": optimizer}

        told, step = [], 0
        if self.run.exists():
            step = max(int(path.name) for path in self.run.glob("0*"))
            reader, found = tierkeep.torch.StorageReader(self.run), state()
            dcp.load(found, storage_reader=reader)
            set_model_state_dict(self.model, found["model"])
            set_optimizer_state_dict(self.model, self.optimizer, found["optim"])
            told = self.look()
        self.go_on()
        dcp.save(state(), storage_writer=tierkeep.torch.StorageWriter(self.run))
        _runs.close_all()
        return step, told


def main() -> None:
    run, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=rank == 0)
    for turn, (kind, world) in enumerate(jobs):
        if rank < world:
            own = dist.PrefixStore(str(turn), store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=world)
            job = Job(run, kind)
            step, told = job.with_dcp() if sys.argv[3] == "dcp" else job.with_checkpointer()
            print(json.dumps({"turn": turn, "step": step, "differences": told}))
            dist.destroy_process_group()
        store.add(f"over {turn}", 1)
        while store.add(f"over {turn}", 0) < processes:
            time.sleep(0.01)


main()
