"""One of two ranks: trains with Lightning under one strategy after another, whole, then stopped and
resumed; prints what came out.

    python lightning_job.py DIRECTORY
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

os.environ["LOCAL_RANK"] = os.environ["RANK"]
warnings.filterwarnings("ignore")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402
from same import fingerprint  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

import tierkeep.lightning  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
RANK = int(os.environ["RANK"])
#: 4 steps an epoch under data parallelism, 8 under tensor parallelism.
ROWS, BATCH, EPOCHS = 64, 8, 2


class Stop(Exception):
    pass


class Net(pl.LightningModule):
    def __init__(self, kind: str, stop: int | None) -> None:
        super().__init__()
        self.kind, self.stop, self.cut = kind, stop, False
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.cut or self.kind in ("ddp", "replicated"):
            return
        self.cut = True
        if self.kind == "fsdp2":
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        else:
            plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def on_train_start(self) -> None:
        if self.global_step == 0:
            torch.manual_seed(10 if self.kind == "tp" else 10 + RANK)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.stop:
            raise Stop
        loss = self.net(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def strategy(kind: str) -> Any:
    if kind in ("ddp", "replicated"):
        return DDPStrategy(process_group_backend="gloo")
    sizes = (2, 1) if kind == "fsdp2" else (1, 2)
    return ModelParallelStrategy(*sizes, process_group_backend="gloo")


def fit(kind: str, run: Path, stop: int | None = None) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    torch.use_deterministic_algorithms(True)
    net = Net(kind, stop)
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2))
    options: Any = {"replicated": ["model/*", "optim/*"]} if kind == "replicated" else {}
    callback = tierkeep.lightning.CheckpointCallback(run, every=1, **options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(kind), max_epochs=EPOCHS,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=run,
    )  # fmt: skip
    try:
        trainer.fit(net, StatefulDataLoader(rows, batch_size=BATCH, shuffle=True))
    except Stop:
        return {}
    weights = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]
    return {
        "begin": callback.restored.step if callback.restored else 0,
        "losses": net.losses,
        "weights": hashlib.sha256(repr(fingerprint(weights)).encode()).hexdigest(),
        "cut": any(isinstance(p, DTensor) for p in net.parameters()),
        "steps": trainer.global_step,
    }


def main() -> None:
    directory = Path(sys.argv[1])
    said = {}
    for kind in ("ddp", "replicated", "fsdp2", "tp"):
        whole = fit(kind, directory / f"{kind}-whole")
        ends = []
        # Where an epoch ends, in the second one, and in the first one.
        stops = (whole["steps"] // 2, whole["steps"] - 1, 3)
        for stop in stops[: 1 if kind == "replicated" else 2 if kind == "tp" else 3]:
            fit(kind, directory / f"{kind}-{stop}", stop)
            ends.append(fit(kind, directory / f"{kind}-{stop}"))
        said[kind] = [whole, *ends]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
