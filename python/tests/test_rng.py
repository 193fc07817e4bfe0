"""Random numbers go on where they stood; bars are drawn on terminals."""

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
