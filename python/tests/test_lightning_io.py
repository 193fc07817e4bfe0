"""What Lightning saves as files, as steps of a run: `tierkeep.lightning.CheckpointIO`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from same import same
from test_lightning import EPOCHS, STEPS, Net, Stop, died, loaders, trainer
from test_lightning import closed as closed
from torch import nn

import tierkeep
import tierkeep.lightning
from tierkeep.lightning import (
    CheckpointIO,
    _markers,
    load_from_checkpoint,
)
from tierkeep.torch import _runs


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
