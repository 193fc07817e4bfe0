"""`tierkeep://`: for torch's distributed checkpoint, and for whatever reads files by fsspec."""

from __future__ import annotations

import importlib.metadata
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load
from torch.distributed.checkpoint import FsspecReader, FsspecWriter

import tierkeep
from tierkeep._sharded import Box, Pieces
from tierkeep.torch import StorageReader, StorageWriter, _runs

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    _runs.close_all()
    _runs._seen.clear()


def state(at: float = 0.0) -> dict[str, Any]:
    return {"model": {"w": torch.arange(6.0).reshape(2, 3) + at}, "lr": 0.1}


def test_torch_saves_and_loads_by_the_url_alone(run: Path) -> None:
    url = f"tierkeep://{run}/step-5"
    dcp.save(state(1), checkpoint_id=url)
    dcp.async_save(state(2), checkpoint_id=f"tierkeep://{run}/step-6").result()
    got = state()
    dcp.load(got, checkpoint_id=url)
    assert torch.equal(got["model"]["w"], state(1)["model"]["w"])
    dcp.load(got, checkpoint_id=f"tierkeep://{run}")
    assert torch.equal(got["model"]["w"], state(2)["model"]["w"])
    assert tierkeep.load(run, 5)["lr"] == 0.1


def test_a_script_that_names_tierkeep_in_the_url_only_needs_no_import(run: Path) -> None:
    told = {e.name: e.value for e in importlib.metadata.entry_points(group="fsspec.specs")}
    assert told["tierkeep"] == "tierkeep.fsspec.FileSystem"
    script = (
        "import torch, torch.distributed.checkpoint as dcp\n"
        f"dcp.save({{'w': torch.ones(3)}}, checkpoint_id='tierkeep://{run}/step-1')\n"
        "got = {'w': torch.zeros(3)}\n"
        f"dcp.load(got, checkpoint_id='tierkeep://{run}/step-1')\n"
        "assert got['w'].sum() == 3\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert tierkeep.load(run)["w"].sum() == 3


def test_torchs_classes_give_way_to_ours_for_our_paths_alone(tmp_path: Path) -> None:
    ours = FsspecWriter(f"tierkeep://{tmp_path}/run/step-1", overwrite=False)
    assert isinstance(ours, StorageWriter)
    assert isinstance(FsspecReader(f"tierkeep://{tmp_path}/run"), StorageReader)
    theirs = FsspecWriter(f"file://{tmp_path}/other")
    assert type(theirs) is FsspecWriter
    assert type(pickle.loads(pickle.dumps(FsspecReader(f"file://{tmp_path}")))) is FsspecReader
    dcp.save(state(3), storage_writer=theirs)
    got = state()
    dcp.load(got, checkpoint_id=f"file://{tmp_path}/other")
    assert torch.equal(got["model"]["w"], state(3)["model"]["w"])


def test_a_step_is_a_folder_of_safetensors_files_with_whole_tensors(run: Path) -> None:
    whole = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    alike = torch.arange(1000.0)
    ranks = [
        tierkeep.Checkpointer(
            run, rank=rank, world_size=2, attempt_id="5" * 32, replicated=["alike"]
        )
        for rank in range(2)
    ]
    saves = []
    for rank, ckpt in enumerate(ranks):
        cut = Pieces((4, 3), whole.dtype)
        cut.boxes.append(Box((2 * rank, 0), whole[2 * rank : 2 * rank + 2], ()))
        own = torch.tensor([rank == 0, True])
        saves.append(ckpt.save(7, {"cut": cut, "alike": alike, "own": own, "none": own[:0]}))
    for save in saves:
        save.wait("disk", 60)
    for ckpt in ranks:
        ckpt.close()
    fs = fsspec.filesystem("tierkeep")
    assert fs.ls(f"tierkeep://{run}", detail=False) == [f"{run}/step-7"]
    files = fs.find(f"tierkeep://{run}")
    assert files == [f"{run}/step-7/rank-0.safetensors", f"{run}/step-7/rank-1.safetensors"]
    for rank, path in enumerate(files):
        data = fs.cat_file(path)
        assert len(data) == fs.size(path)
        got = load(data)
        assert torch.equal(got.pop("cut"), whole)
        assert torch.equal(got.pop("alike"), alike)
        assert got.pop("own").tolist() == [rank == 0, True]
        assert got.pop("none").shape == (0,)
        assert not got
        # In small reads, as a tool that looks at the header does.
        with fs.open(path, block_size=64) as file:
            assert file.read(8) == data[:8]
            file.seek(len(data) - 100)
            assert file.read() == data[-100:]


def test_what_is_not_there_or_cannot_be_is_an_error_that_says_so(run: Path) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, state())
    fs = fsspec.filesystem("tierkeep")
    for path in (f"{run}/step-2", f"{run}/step-1/rank-1.safetensors", f"{run}-other"):
        assert not fs.exists(path)
        with pytest.raises(FileNotFoundError):
            fs.info(path)
    assert fs.isdir(f"{run}/step-1")
    assert fs.isfile(f"{run}/step-1/rank-0.safetensors")
    with pytest.raises(ValueError, match="only read"):
        fs.open(f"{run}/step-1/rank-0.safetensors", "wb")
    with pytest.raises(IsADirectoryError):
        fs.open(f"{run}/step-1")
