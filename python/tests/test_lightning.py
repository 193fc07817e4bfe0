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
from lightning.pytorch.plugins import TorchCheckpointIO
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
    CheckpointIO,
    _markers,
    load_from_checkpoint,
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


# -- CheckpointIO ----------------------------------------------------------------------------


def checkpointed(
    directory: Path, ckpt_path: Any = None, *, epochs: int = EPOCHS, io: Any = None, **options: Any
) -> tuple[pl.Trainer, ModelCheckpoint, Net]:
    pl.seed_everything(7, verbose=False)
    keeper = ModelCheckpoint(directory, monitor="val", **options)
    plugin = CheckpointIO() if io is None else io
    trains = trainer([keeper], max_epochs=epochs, enable_checkpointing=True, plugins=[plugin])
    model = Net(scheduler="epoch")
    trains.fit(model, *loaders(), ckpt_path=ckpt_path)
    return trains, keeper, model


def steps(directory: Path) -> list[int]:
    with tierkeep.Checkpointer(directory / "tierkeep") as ckpt:
        return [info.step for info in ckpt.steps() if info.complete]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.ckpt")}


def test_model_checkpoint_finds_what_it_saved_and_removes_it(run: Path) -> None:
    trains, keeper, model = checkpointed(run, epochs=2, save_top_k=2, save_last=True)
    assert names(run) == {f"epoch={e}-step={STEPS * (e + 1)}.ckpt" for e in (0, 1)} | {"last.ckpt"}
    saved = {n: v.clone() for n, v in model.state_dict().items()}
    # The best one comes back where it is asked for.
    for parameter in model.parameters():
        parameter.data.zero_()
    [found] = trains.validate(model, loaders()[1], ckpt_path=keeper.last_model_path, verbose=False)
    assert same(dict(model.state_dict()), saved)
    assert found["val"] > 0
    # So does the training, as it does from torch's files.
    *_, again = checkpointed(run, "last", epochs=4, save_top_k=2, save_last=True)
    files: Any = {"io": TorchCheckpointIO(), "save_top_k": 2, "save_last": True}
    checkpointed(run / "files", epochs=2, **files)
    *_, expected = checkpointed(run / "files", "last", epochs=4, **files)
    assert again.seen == expected.seen
    assert same(dict(again.state_dict()), dict(expected.state_dict()))
    # What was replaced is gone, but for the newest that retention keeps.
    kept = {int(json.loads((run / name).read_text())["step"]) for name in names(run)}
    assert len(names(run)) == 3
    assert kept <= set(steps(run))
    assert len(steps(run)) <= len(kept) + 1


def test_versions_and_links_are_names_too(run: Path) -> None:
    checkpointed(run, save_last="link", save_top_k=-1, filename="same")
    assert names(run) == {"same.ckpt", "same-v1.ckpt", "same-v2.ckpt", "last.ckpt"}
    assert (run / "last.ckpt").is_symlink()
    io = CheckpointIO()
    assert io.load_checkpoint(run / "last.ckpt")["global_step"] == STEPS * EPOCHS
    assert io.load_checkpoint(run / "same.ckpt")["global_step"] == STEPS
    # A link is a name more: without it the checkpoint stays.
    (run / "more.ckpt").symlink_to("same.ckpt")
    io.remove_checkpoint(run / "more.ckpt")
    for step in (100, 200):
        io.save_checkpoint({"global_step": step}, run / f"{step}.ckpt")
    assert not (run / "more.ckpt").is_symlink()
    assert io.load_checkpoint(run / "same.ckpt")["global_step"] == STEPS
    # The directory can go elsewhere.
    io.teardown()
    run.rename(run.with_name("moved"))
    assert io.load_checkpoint(run.with_name("moved") / "same.ckpt")["global_step"] == STEPS


def test_a_name_holds_its_checkpoint_and_gives_it_back(run: Path) -> None:
    io = CheckpointIO(run / "elsewhere")
    for step in (10, 10, 5):
        tree = {"global_step": step, "w": torch.full((3,), float(step))}
        io.save_checkpoint(tree, run / "deep" / f"{step}-{len(names(run / 'deep'))}.ckpt")
    marks = {n: json.loads((run / "deep" / n).read_text())["step"] for n in names(run / "deep")}
    assert marks == {"10-0.ckpt": 10, "10-1.ckpt": 11, "5-2.ckpt": 12}
    # keep_last is 1, and all of them are there.
    assert same(io.load_checkpoint(run / "deep/10-0.ckpt")["w"], torch.full((3,), 10.0))
    # One that is written over has no name any more, nor has one that is removed.
    io.save_checkpoint({"global_step": 20}, run / "deep/10-0.ckpt")
    io.remove_checkpoint(run / "deep/10-1.ckpt")
    io.save_checkpoint({"global_step": 30}, run / "deep/30.ckpt")
    io.teardown()
    with tierkeep.Checkpointer(run / "elsewhere") as ckpt:
        assert [info.step for info in ckpt.steps() if info.complete] == [12, 20, 30]
    assert not (run / "deep/10-1.ckpt").exists()
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(run / "deep/10-1.ckpt")
    # A name that outlived its checkpoint says whose it was.
    (run / "deep/copy.ckpt").write_text((run / "deep/30.ckpt").read_text().replace("30", "31"))
    with pytest.raises(tierkeep.CheckpointNotFoundError) as caught:
        io.load_checkpoint(run / "deep/copy.ckpt")
    assert "names step 31 of" in caught.value.__notes__[0]


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("where", ["pin", "write", "unpin"])
def test_a_process_that_is_killed_leaves_no_pin(
    run: Path, where: str, removes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(step: int, name: str, at: Path = run) -> None:
        CheckpointIO(at / "steps").save_checkpoint({"global_step": step}, at / name)

    def pinned() -> list[int]:
        with tierkeep.Checkpointer(moved / "steps") as ckpt:
            return [info.step for info in ckpt.steps() if info.pinned]

    for step in (10, 20, 30):
        save(step, f"{step}.ckpt")
    save(40, "last.ckpt")
    (run / "link.ckpt").symlink_to("10.ckpt")
    (run / "30.ckpt").unlink()  # By hand: so it was a person who keeps its pin.
    owner = _markers if where == "write" else tierkeep.Checkpointer
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(owner, where, lambda *given: died())
        if removes:
            CheckpointIO(run / "steps").remove_checkpoint(run / "20.ckpt")
        save(50, "20.ckpt")
    _runs.close_all()
    moved = run.rename(run.with_name("moved"))  # What a note says holds there, too.
    save(60, "link.ckpt", moved)  # What a link named has its own name still.
    named = [json.loads((moved / name).read_text())["step"] for name in names(moved)]
    assert sorted([30, *named]) == pinned()
    assert 10 in named
    assert not (moved / "steps.pins").exists()


def test_a_model_is_made_from_its_checkpoint(run: Path) -> None:
    _, keeper, model = checkpointed(run)
    made = load_from_checkpoint(Net, keeper.best_model_path, lr=0.5)
    assert (made.hparams["lr"], made.hparams["scheduler"]) == (0.5, "epoch")
    assert same(dict(made.state_dict()), dict(model.state_dict()))


def test_files_of_torchs_are_read_as_before(run: Path, tmp_path: Path) -> None:
    first = trainer([], max_epochs=1)
    first.fit(Net(), *loaders())
    first.save_checkpoint(tmp_path / "old.ckpt")
    _, _, model = checkpointed(run, tmp_path / "old.ckpt", epochs=2)
    assert [step for step, *_ in model.seen] == list(range(STEPS, 2 * STEPS))
    io = CheckpointIO()
    io.remove_checkpoint(tmp_path / "old.ckpt")
    assert not (tmp_path / "old.ckpt").exists()


def test_hyperparameters_that_are_code_are_left_out_and_told(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"lr": 0.1, "where": Path("x"), "kind": nn.ReLU, "part": nn.Linear(1, 1)}
    io = CheckpointIO()
    for _ in range(2):
        io.save_checkpoint({"hyper_parameters": given}, run / "a.ckpt")
    kept = io.load_checkpoint(run / "a.ckpt")["hyper_parameters"]
    assert kept == {"lr": 0.1, "where": Path("x")}
    for name in ("kind", "part"):
        assert caplog.text.count(f"the hyperparameter {name} is not in the checkpoint") == 1
    # Anywhere else it is an error that says where.
    with pytest.raises(tierkeep.InvalidError, match="callbacks/x"):
        io.save_checkpoint({"callbacks": {"x": nn.ReLU}}, run / "b.ckpt")
    with pytest.raises(tierkeep.InvalidError, match="storage_options"):
        io.save_checkpoint({}, run / "b.ckpt", storage_options={"a": 1})
    assert not (run / "b.ckpt").exists()


def test_tensors_go_where_map_location_says(run: Path) -> None:
    io = CheckpointIO()
    io.save_checkpoint({"a": [torch.ones(2)], "b": (1, torch.zeros(1))}, run / "a.ckpt")
    for where in ("meta", torch.device("meta"), {"cpu": "meta"}):
        found = io.load_checkpoint(run / "a.ckpt", map_location=where)
        assert found["a"][0].is_meta
        assert found["b"][1].is_meta
    found = io.load_checkpoint(run / "a.ckpt", map_location=lambda storage, place: storage)
    assert same(found, {"a": [torch.ones(2)], "b": (1, torch.zeros(1))})


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
