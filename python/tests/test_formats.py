"""Shards as other people's tools see them, and `tierkeep.load`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from same import fingerprint, raw
from test_processes import ended, python
from torch import nn

import tierkeep


def state() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).bfloat16()
    return {
        "model": model,
        "a/b": {"x.y": torch.randn(3, 4).t(), "8": torch.arange(5), 8: torch.zeros(0, 2)},
        "array": numpy.arange(6.0).reshape(2, 3),
        "step": 7,
        "list": [torch.ones(1), {"deep": torch.tensor(2)}],
    }


NAMES = {
    "model/0.weight", "model/0.bias", "model/1.weight", "model/1.bias", "model/1.running_mean",
    "model/1.running_var", "model/1.num_batches_tracked", "a~1b/x.y", "a~1b/~s8", "a~1b/8",
    "array", "list/0", "list/1/deep",
}  # fmt: skip


@pytest.fixture
def saved(run: Path) -> dict[str, Any]:
    made = state()
    ckpt = tierkeep.Checkpointer(run)
    ckpt.restore(made)
    ckpt.save(1, made).wait("disk", 30)
    return {"ckpt": ckpt, "state": made}


def shard(place: Path) -> Path:
    (found,) = place.rglob("rank-000000-*.safetensors")
    return found


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_safetensors_opens_a_shard_as_it_lies(
    saved: dict[str, Any], run: Path, ram: Path, tier: str
) -> None:
    path = shard(ram if tier == "ram" else run)
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == NAMES
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == NAMES
        assert file.metadata()["format"] == "pt"
        for name in NAMES:
            assert raw(file.get_tensor(name)) == raw(tensors[name])
    made = saved["state"]
    assert raw(tensors["model/0.weight"]) == raw(made["model"][0].weight)
    assert raw(tensors["a~1b/x.y"]) == raw(made["a/b"]["x.y"])
    assert tensors["model/0.weight"].dtype is torch.bfloat16


NASTY = st.text(st.sampled_from("ab/~#.0-_\0🦀é"), max_size=4) | st.sampled_from(
    ["__metadata__", "17", "-1", "007", "~r", "a#0", ".", ".."]
)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.one_of(NASTY, st.integers(-3, 99), st.tuples(NASTY)), max_size=8))
def test_names_of_any_kind_come_back(keys: set[Any]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as ram, tempfile.TemporaryDirectory() as disk:
        state = {key: torch.tensor(i) for i, key in enumerate(keys)}
        with tierkeep.Checkpointer(f"{disk}/run", ram_dir=ram) as ckpt:
            ckpt.restore(state)
            ckpt.save(1, state)
            live = {key: torch.tensor(-1) for key in keys}
            ckpt.restore(live, read_only=True)
        assert live == state
        (path,) = Path(disk).rglob("rank-*.safetensors")
        stored = safetensors.torch.load_file(path)
        assert {name: int(t) for name, t in stored.items()} == {
            tierkeep._tierkeep.join_path((key,)): int(t) for key, t in state.items()
        }


def test_load_gives_everything_back(saved: dict[str, Any], run: Path) -> None:
    loaded = tierkeep.load(run)
    made = saved["state"]
    made["model"] = made["model"].state_dict()
    assert fingerprint(loaded) == fingerprint(made)
    assert list(loaded) == list(made)
    assert type(loaded["array"]) is numpy.ndarray
    assert type(loaded["model"]["0.weight"]) is torch.Tensor


def test_load_reads_only_what_is_asked_for(saved: dict[str, Any], run: Path) -> None:
    loaded = tierkeep.load(run, include=["model/0.*", "list/1", "step"])
    assert set(loaded) == {"model", "list", "step"}
    assert set(loaded["model"]) == {"0.weight", "0.bias"}
    assert loaded["list"][0] is None
    assert loaded["list"][1]["deep"].item() == 2
    with pytest.raises(tierkeep.InvalidError, match="matches nothing/here"):
        tierkeep.load(run, include=["nothing/here"])
    with pytest.raises(tierkeep.CheckpointNotFoundError):
        tierkeep.load(run, 99)
    with pytest.raises(tierkeep.CheckpointNotFoundError):
        tierkeep.load(run.parent / "other")
    with pytest.raises(tierkeep.TierkeepError):
        tierkeep.load(run, rank=5)


def test_load_without_torch_gives_numpy_arrays(saved: dict[str, Any], run: Path) -> None:
    script = """
        import importlib.util, sys
        find, without = importlib.util.find_spec, ("torch", "ml_dtypes")
        importlib.util.find_spec = lambda name, *a: None if name in without else find(name, *a)
        sys.modules.pop("torch", None)
        import tierkeep
        loaded = tierkeep.load(sys.argv[1], include=["a~1b", "array"])
        assert "torch" not in sys.modules
        print(type(loaded["a/b"]["x.y"]).__module__, loaded["a/b"]["x.y"].shape)
        try:
            tierkeep.load(sys.argv[1])
        except tierkeep.UnavailableError as error:
            print(error)
    """
    code, out, err = ended(python(script, run))
    assert code == 0, err
    first, second = out.splitlines()
    assert first == "numpy (4, 3)"
    assert second.startswith("model/0.weight: numpy has no BF16")


def test_parameters_of_a_plain_dict_come_back_as_parameters(run: Path) -> None:
    made = {"p": nn.Parameter(torch.ones(2)), "f": nn.Parameter(torch.ones(1), requires_grad=False)}
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(made)
        ckpt.save(1, made)
    loaded = tierkeep.load(run)
    assert isinstance(loaded["p"], nn.Parameter)
    assert loaded["p"].requires_grad


def test_a_damaged_shard_in_ram_is_passed_over_and_repaired(
    saved: dict[str, Any], ram: Path
) -> None:
    path = shard(ram)
    with path.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff\xfe\xfd")
    live = state()
    ckpt = saved["ckpt"]
    assert fingerprint(live) != fingerprint(saved["state"])
    found = ckpt.restore(live, step=1)
    assert found is not None
    assert fingerprint(live) == fingerprint(saved["state"])
    assert len(found.damaged) == 1
    assert "chunk" in found.damaged[0]
    assert found.damaged[0].count(str(path.name)) == 1
