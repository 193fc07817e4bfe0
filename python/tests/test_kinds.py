"""What was saved as one kind of thing and is another now: it fits, or is named before anything is
changed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import tierkeep
from tierkeep.torch import OptimizerState


class Pair(NamedTuple):
    w: torch.Tensor
    n: int


@dataclasses.dataclass
class Data:
    w: torch.Tensor
    n: int


class Loader:
    """As torchdata's: it takes over what it is given."""

    def __init__(self) -> None:
        self.state = {"w": torch.ones(3), "n": 1}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Listed(Loader):
    """Its state is no dict."""

    def state_dict(self) -> Any:
        return list(self.state)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


KINDS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(3),
    "array": lambda: numpy.ones(3, numpy.float32),
    "dict": lambda: {"w": torch.ones(3), "n": 1},
    "list": lambda: [torch.ones(3), 1],
    "tuple": lambda: (torch.ones(3), 1),
    "deque": lambda: collections.deque([torch.ones(3)], 5),
    "namedtuple": lambda: Pair(torch.ones(3), 1),
    "dataclass": lambda: Data(torch.ones(3), 1),
    "int": lambda: 3,
    "text": lambda: "x",
    "None": lambda: None,
    "module": lambda: trained()[0],
    "optimizer": lambda: trained()[1],
    "optimizer by name": lambda: OptimizerState(*trained()),
    "scheduler": lambda: StepLR(trained()[1], 1),
    "loader": Loader,
    "listed": Listed,
    "rng": tierkeep.Rng,
}

#: Objects of which tierkeep knows what their state is like.
KNOWN = ("module", "optimizer", "optimizer by name", "scheduler", "rng")

#: Its moments go by the order of the parameters, as torch's own do.
FITS = {("optimizer by name", "optimizer")}

#: These have a dict for their state, which may be any for a loader.
WITH_DICTS = ("dict", *KNOWN, "loader")


@pytest.mark.parametrize("saved", KINDS)
def test_another_kind_fits_or_is_named_before_anything_is_changed(run: Path, saved: str) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, {"first": torch.ones(4), "x": KINDS[saved]()}).wait("disk")
        for live, make in KINDS.items():
            if live == saved:
                continue
            for strict in (True, False):
                first = torch.zeros(4)
                state = {"first": first, "x": make()}
                try:
                    ckpt.restore(state, strict=strict)
                except tierkeep.MismatchError as error:
                    assert not first.any(), live
                    assert all(line.startswith("x") for line in error.differences), error
                else:
                    assert first.all()
                    if live in KNOWN and (strict or live != "module"):
                        assert (saved, live) in FITS, (live, strict)
                    if live == "loader":
                        assert saved in (*WITH_DICTS, "listed"), strict
                    if live == "tensor":
                        assert saved == "array"
                        assert isinstance(state["x"], torch.Tensor)


def test_random_numbers_of_more_devices_than_there_are_are_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = tierkeep.Rng()
    state = rng.state_dict()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8) for _ in range(3)]
    put: dict[int, Any] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, device: put.update({device: x}))
    with caplog.at_level("WARNING", "tierkeep"):
        rng.load_state_dict(state)
    assert list(put) == [0]
    assert "of 3 CUDA devices were saved, this process has 1" in caplog.text
