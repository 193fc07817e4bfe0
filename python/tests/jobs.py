"""Small training jobs that their seed determines wholly, and ways to stop and resume them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from same import fingerprint
from torch import nn

import tierkeep

State = dict[str, Any]
Build = Callable[[], tuple[State, Callable[[], float]]]


def interrupted(build: Build, run: Path, before: int, after: int, **options: Any) -> None:
    """`before` steps, a save, `after` steps; then a new process's objects, restored, and the same
    `after` steps. Everything must be the same, to the last bit, right after the restore and at the
    end.
    """
    state, train = build()
    with tierkeep.Checkpointer(run, **options) as ckpt:
        assert ckpt.restore(state) is None
        for step in range(before):
            train()
            ckpt.save(step + 1, state)
        at_save = fingerprint(state)
        losses = [train() for _ in range(after)]
        at_end = fingerprint(state)

    torch.manual_seed(12345)
    state, train = build()
    # A fresh job draws other numbers: what comes out right came out of the checkpoint.
    assert before == 0 or fingerprint(state) != at_save
    with tierkeep.Checkpointer(run, **options) as ckpt:
        found = ckpt.restore(state)
        assert found is not None
        assert found.step == before
        assert fingerprint(state) == at_save
        assert [train() for _ in range(after)] == losses
        assert fingerprint(state) == at_end


def regression(model: nn.Module, optimizers: list[Any], width: int = 6) -> Callable[[], float]:
    """One step of some training that depends on the random numbers."""

    def train() -> float:
        x = torch.randn(8, width).to(next(model.parameters()).dtype)
        loss = model(x).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.item())

    return train


def mlp(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))
