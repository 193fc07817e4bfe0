"""Random numbers go on where they stood; bars are drawn on terminals; CUDA where it is."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy
import pytest
import torch
from same import fingerprint

import tierkeep


def draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.standard_normal(),
        torch.randn(3).tolist(),
    ]


def test_every_generator_goes_on_where_it_stood(run: Path) -> None:
    state = {"rng": tierkeep.Rng()}
    draw()  # An odd number of gaussians: Python and numpy each keep one for later.
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state)
        expected = [draw(), draw()]
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        assert [draw(), draw()] == expected


def test_saving_and_restoring_draw_no_numbers(run: Path) -> None:
    state = {"rng": tierkeep.Rng(), "x": torch.ones(3)}
    before = fingerprint(state["rng"])
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state).wait("disk", 30)
    tierkeep.load(run)
    assert fingerprint(state["rng"]) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def save(run: Path) -> tierkeep.Save:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore({})
        return ckpt.save(3, {"x": torch.ones(1 << 20)})


def test_a_bar_is_drawn_on_a_terminal_only(
    save: tierkeep.Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, file = Terminal(), io.StringIO()
    assert tierkeep.progress.bar(save, file=terminal) is save
    assert terminal.getvalue().endswith(f"step 3 [{'#' * 30}] 4.0/4.0 MiB disk\n")
    tierkeep.progress.bar(save, file=file)
    assert file.getvalue() == ""
    tierkeep.progress.bar(save, file=file, disable=False)
    assert "MiB disk" in file.getvalue()
    monkeypatch.setenv("TIERKEEP_PROGRESS", "0")
    quiet = Terminal()
    tierkeep.progress.bar(save, file=quiet)
    assert quiet.getvalue() == ""


# -- CUDA ------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="NOT TESTED: CUDA tensors through pinned memory; this machine has no GPU",
)


@needs_cuda
@pytest.mark.parametrize("capture", ["now", "overlap"])
def test_cuda_tensors_are_saved_as_they_were(run: Path, capture: str) -> None:
    def make() -> dict[str, object]:
        model = torch.nn.Linear(512, 512).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        return {"model": model, "optim": optimizer, "rng": tierkeep.Rng()}

    def train(state: dict[str, object]) -> None:
        model, optimizer = state["model"], state["optim"]
        assert isinstance(model, torch.nn.Module)
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.zero_grad()
        model(torch.randn(64, 512, device="cuda")).square().mean().backward()
        optimizer.step()

    state = make()
    with tierkeep.Checkpointer(run, capture=capture) as ckpt:  # type: ignore[arg-type]
        ckpt.restore(state)
        ckpt.guard(state["optim"])
        for step in range(4):
            train(state)
            torch.cuda.synchronize()
            expected = fingerprint(state)
            ckpt.save(step + 1, state)
            train(state)
    live = make()
    train(live)
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(live)
        assert found is not None
        assert found.step == 4
        assert fingerprint(live) == expected
