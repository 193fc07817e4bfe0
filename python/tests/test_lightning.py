"""Lightning: a training that was stopped anywhere ends as if it had not been; what ModelCheckpoint
saves, links, finds and removes are steps of a run.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from same import fingerprint, same
from test_processes import ended
from test_ranks import start
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import tierkeep
import tierkeep.lightning
from tierkeep import _stop
from tierkeep.lightning import (
    CheckpointCallback,
)
from tierkeep.torch import _runs

JOB = (Path(__file__).parent / "lightning_job.py").read_text()

ROWS, BATCH, EPOCHS = 32, 8, 3
#: Of an epoch.
STEPS = ROWS // BATCH

for noisy in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    _runs.close_all()


class Rows(Dataset[torch.Tensor]):
    """Augmented by all three sources of random numbers."""

    def __init__(self) -> None:
        self.rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = float(numpy.random.rand()) + random.random() + torch.rand(())
        return self.rows[index] + 0.1 * noise


class Stop(Exception):
    """Where a process would have died."""


class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.1, scheduler: str = "step", more: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.stop: tuple[int, Any] | None = None
        self.seen: list[tuple[int, int, int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.stop is not None and self.global_step == self.stop[0]:
            self.stop[1]()
        loss = self.net(batch).square().mean()
        self.seen.append((self.global_step, self.current_epoch, batch_idx, loss.item()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedulers = torch.optim.lr_scheduler
        kind = self.hparams["scheduler"]
        if kind == "plateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val"},
            }
        if kind == "plateau_step":
            plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.9, patience=0, threshold=0.9)
            every: Any = {"monitor": "loss", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, **every}}
        cosine = schedulers.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": kind}}


class Averages(Net):
    """Has a mean of its weights that it moves on after each batch, later than any callback."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("mean", self.net[0].weight.detach().clone())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mean.lerp_(self.net[0].weight.detach(), 0.1)


class Manual(Net):
    """Two optimizers: one step in the very first batch, two in each later one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        both = self.optimizers()
        for optimizer in both[:1] if self.global_step == 0 else both:
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *_, last = self.net
        return [torch.optim.AdamW(part.parameters(), lr=0.1) for part in (first, last)]


class Counts(pl.Callback):
    """Knows of every validation."""

    def __init__(self) -> None:
        self.validations = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations += not trainer.sanity_checking

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validations = state["validations"]


def died() -> None:
    raise Stop


def trainer(callbacks: list[Any], **options: Any) -> pl.Trainer:
    given = {"max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, **given,
    )  # fmt: skip


def loaders(validates: int | None = ROWS) -> list[Any]:
    """The second one has so many rows."""
    train = StatefulDataLoader(Rows(), batch_size=BATCH, shuffle=True)
    if validates is None:
        return [train]
    return [train, DataLoader(Rows().rows[:validates], batch_size=16)]


def fit(
    run: Path,
    stop: tuple[int, Any] | None = None,
    *,
    callbacks: Any = (),
    net: Any = Net,
    scheduler: str = "step",
    validates: int | None = ROWS,
    keeps: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, int, pl.Trainer]:
    """All that a training ends with, the step that it began at, and its Trainer."""
    pl.seed_everything(7, verbose=False)
    model = net(scheduler=scheduler)
    model.stop = stop
    callback = CheckpointCallback(run, **{"every": 1, **(keeps or {})})
    made = [make() for make in (Counts, *callbacks)]
    trains = trainer([callback, *made], **options)
    try:
        trains.fit(model, *loaders(validates))
    except Stop:
        return None, 0, trains
    rate = trains.optimizers[0].param_groups[0]["lr"]
    begin = callback.restored.step if callback.restored else 0
    moments = [s["exp_avg"] for s in trains.optimizers[0].state.values()]
    kept = [one.state_dict() for one in made if not isinstance(one, ModelCheckpoint)]
    tensors = [p.detach() for p in (*model.parameters(), *model.buffers())]
    end = fingerprint([tensors, moments, rate, kept])
    return (end, model.seen), begin, trains


def ends_the_same(run: Path, stops: Any, **options: Any) -> None:
    (end, seen), begin, _ = fit(run / "whole", **options)
    assert begin == 0
    for stop in stops:
        fit(run / str(stop), (stop, died), **options)
        (again, rest), begin, _ = fit(run / str(stop), **options)
        assert begin == stop - stop % (options.get("keeps") or {"every": 1})["every"]
        assert rest == seen[len(seen) - len(rest) :], f"stopped at {stop}"
        assert 0 < len(rest) < len(seen)
        assert again == end, f"stopped at {stop}"


# -- the callback ----------------------------------------------------------------------------

# In the first epoch, where validation follows, between two epochs, and in the second one.
STOPS = (1, 2, STEPS, STEPS + 3)


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        (STOPS, {"validates": None}),
        (STOPS, {"scheduler": "plateau"}),
        (STOPS, {"scheduler": "epoch", "val_check_interval": 0.25}),
        (STOPS, {"max_epochs": -1, "max_steps": 10}),
        ((2, 3), {"accumulate_grad_batches": 2}),
        ((3, 4), {"limit_train_batches": 3}),
        ((5, 8), {"keeps": {"every": 3}}),
        (STOPS, {"scheduler": "plateau_step", "net": Averages, "val_check_interval": 0.5}),
        ((3,), {"keeps": {"every": 2}, "validates": 0, "val_check_interval": 0.5}),
    ],
    ids=[
        "alone",
        "validates",
        "often",
        "max_steps",
        "accumulates",
        "limited",
        "rarely",
        "after",
        "nothing_to_validate",
    ],
)
def test_a_training_that_was_stopped_anywhere_ends_as_if_it_had_not_been(
    run: Path, stops: tuple[int, ...], options: dict[str, Any]
) -> None:
    ends_the_same(run, stops, **options)


def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up while a training saves."""
    steps: list[int] = []
    was = tierkeep.Checkpointer.save

    def save(self: Any, step: int, state: Any, **more: Any) -> Any:
        steps.append(step)
        return was(self, step, state, **more)

    monkeypatch.setattr(tierkeep.Checkpointer, "save", save)
    return steps


def test_steps_that_are_passed_by_are_saved_with_the_next_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = saved_steps(monkeypatch)
    whole, _, _ = fit(run / "whole", net=Manual, keeps={"every": 10})
    assert steps == [11, 21, 23]
    fit(run, (13, died), net=Manual, keeps={"every": 10})
    again, begin, _ = fit(run, net=Manual, keeps={"every": 10})
    assert begin == 11
    assert again[0] == whole[0]
    assert again[1] == whole[1][11:]


class Undecided(pl.Callback):
    """Whether to validate is another answer each time: it is so where the clock decides."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        answers = itertools.cycle([True, False])
        trainer.fit_loop.epoch_loop._should_check_val_fx = lambda fetcher: next(answers)

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_no_save_waits_for_a_validation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = saved_steps(monkeypatch)
    fit(run, callbacks=[Undecided], max_epochs=2)
    assert steps == list(range(1, 2 * STEPS + 1))


class Hooks(Net):
    loaded: Any = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["optimizer_states"][0]["state"]
        checkpoint["state_dict"].pop("net.0.bias")  # It is in the state all the same.
        checkpoint["mine"] = torch.full((2,), float(self.global_step))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert same(checkpoint["mine"], torch.full((2,), float(checkpoint["global_step"])))
        type(self).loaded = checkpoint["mine"]


def test_other_callbacks_and_hooks_go_on_where_they_were(run: Path, tmp_path: Path) -> None:
    best = tmp_path / "best"
    callbacks = [
        EMAWeightAveraging,
        lambda: EarlyStopping("val", patience=9),
        lambda: ModelCheckpoint(best, monitor="val", save_top_k=2),
    ]
    ends_the_same(run / "callbacks", (6,), callbacks=callbacks, enable_checkpointing=True)
    ends_the_same(run / "hooks", (6,), net=Hooks)
    assert Hooks.loaded is not None


def test_the_state_is_copied_from_where_it_lies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    callback = CheckpointCallback(run, every=2)
    trains = trainer([callback], max_epochs=1)
    states: list[Any] = []
    was = tierkeep.Checkpointer.save

    def save(self: Any, step: int, state: Any, **more: Any) -> Any:
        states.append(state)
        return was(self, step, state, **more)

    monkeypatch.setattr(tierkeep.Checkpointer, "save", save)
    trains.fit(model, *loaders())
    assert len(states) == STEPS / 2
    assert all(state["model"] is model for state in states)
    assert states[0]["optim"][0].optimizer is trains.optimizers[0]
    # Nothing of them is there a second time.
    kept = tierkeep.load(run)
    assert "state_dict" not in kept["lightning"]
    assert "optimizer_states" not in kept["lightning"]
    assert kept["lightning"]["global_step"] == STEPS


def test_a_training_that_has_ended_is_not_done_again(run: Path) -> None:
    whole, _, _ = fit(run, keeps={"every": 5})
    again, begin, _ = fit(run, keeps={"every": 5})
    # Its end was saved though it was not due; there is nothing left.
    assert begin == STEPS * EPOCHS
    assert again[0] == whole[0]
    assert again[1] == []
    # More epochs go on from it, as in one training.
    longer, _, _ = fit(run / "longer", max_epochs=EPOCHS + 1)
    more, begin, _ = fit(run, max_epochs=EPOCHS + 1)
    assert begin == STEPS * EPOCHS
    assert more[0] == longer[0]
    assert more[1] == longer[1][-STEPS:]


def test_a_second_fit_goes_on_with_what_it_has(run: Path) -> None:
    model = Net()
    callback = CheckpointCallback(run, every=3)
    trains = trainer([callback], max_epochs=2)
    trains.fit(model, *loaders())
    trains.fit_loop.max_epochs = 3
    before = len(model.seen)
    trains.fit(model, *loaders())
    assert callback.restored is None
    assert [step for step, *_ in model.seen[before:]] == list(range(2 * STEPS, 3 * STEPS))
    assert tierkeep.load(run)["lightning"]["global_step"] == 3 * STEPS


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS])
def test_a_sigterm_ends_the_training_after_a_step_that_is_saved(
    run: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(_stop, "_stop", _stop._Stop())
    whole, _, _ = fit(run / "whole")
    try:
        keeps = {"stop_on_sigterm": True}
        asked = (step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        (_, seen), _, _ = fit(run, asked, keeps=keeps)
        assert len(seen) == step + 1  # The signal came after this step had been looked at.
    finally:
        signal.signal(signal.SIGTERM, before)
    again, begin, _ = fit(run)
    assert begin == step + 1
    assert (again[0], seen + again[1]) == whole


def test_a_file_of_lightnings_counts_until_the_run_has_a_checkpoint(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pl.seed_everything(7, verbose=False)
    first = trainer([], max_epochs=1)
    first.fit(Net(), *loaders())
    first.save_checkpoint(tmp_path / "old.ckpt")
    for begin in (None, 2 * STEPS):
        callback = CheckpointCallback(run)
        model = Net()
        trains = trainer([callback], max_epochs=2 if begin is None else 3)
        trains.fit(model, *loaders(), ckpt_path=tmp_path / "old.ckpt")
        assert (callback.restored and callback.restored.step) == begin
        assert model.seen[0][0] == (begin or STEPS)
    assert "fit(ckpt_path=...) is passed over" in caplog.text


def test_what_cannot_be_resumed_is_refused_by_name(run: Path) -> None:
    class FSDPStrategy:
        pass

    class Trains:
        strategy, fast_dev_run, global_step = FSDPStrategy(), False, 0

    with pytest.raises(tierkeep.InvalidError, match="FSDPStrategy is not supported"):
        CheckpointCallback(run).on_fit_start(Trains(), None)


def test_two_ranks_end_the_same_under_every_strategy(run: Path) -> None:
    ranks = [ended(rank) for rank in start(2, JOB, run)]
    assert [code for code, *_ in ranks] == [0, 0], ranks
    for _, out, _ in ranks:
        for kind, (whole, *ends) in json.loads(out.splitlines()[-1]).items():
            assert whole["begin"] == 0
            assert whole["cut"] == (kind in ("fsdp2", "tp"))
            for end in ends:
                assert end["begin"] > 0, kind
                assert end["losses"] == whole["losses"][end["begin"] :], kind
                assert end["weights"] == whole["weights"], kind


def test_the_other_name_of_lightning_is_served_too(run: Path) -> None:
    script = """
        import os, sys
        import pytorch_lightning as pl
        import tierkeep.lightning as ours
        assert issubclass(ours.CheckpointCallback, pl.Callback)
        assert "lightning.pytorch" not in sys.modules
        from pytorch_lightning.demos.boring_classes import BoringModel
        for steps in (3, 5):
            keeps = ours.CheckpointCallback(sys.argv[1] + "/callback")
            trainer = pl.Trainer(
                accelerator="cpu", logger=False, plugins=[ours.CheckpointIO()], max_steps=steps,
                callbacks=[keeps], enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=sys.argv[1])
            trainer.fit(BoringModel())
            print(keeps.restored and keeps.restored.step, trainer.global_step)
            path = trainer.checkpoint_callback.best_model_path
            assert ours.CheckpointIO().load_checkpoint(path)["global_step"] == steps
    """
    [done] = [ended(process) for process in start(1, script, run)]
    assert done[0] == 0, done
    assert done[1].split() == ["None", "3", "3", "5"]
