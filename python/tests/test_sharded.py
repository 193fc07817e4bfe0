"""Tensors of which each rank has a part: saved under one parallelism, restored under another."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from same import same
from test_processes import ended
from test_ranks import start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

import tierkeep

JOB = (Path(__file__).parent / "sharded_job.py").read_text()

#: What a job may be: how its model is cut, and over how many ranks.
JOBS = [("plain", 4), ("fsdp-tp", 4), ("hsdp", 4), ("fsdp", 3), ("plain", 1), ("fsdp", 5)]


def test_it_comes_back_bit_for_bit_on_any_other_mesh(run: Path) -> None:
    """Every one after every other one."""
    jobs = [job for a, b in itertools.combinations(JOBS, 2) for job in (a, b)]
    jobs.append(jobs[0])
    assert set(itertools.pairwise(jobs)) >= set(itertools.permutations(JOBS, 2))
    results = [ended(rank) for rank in start(5, JOB, run, json.dumps(jobs), "checkpointer")]
    assert all(code == 0 for code, _, _ in results), results
    told = [json.loads(line) for _, out, _ in results for line in out.splitlines()]
    assert [line for line in told if line["differences"]] == []
    assert len(told) == sum(world for _, world in jobs)
    assert all(line["step"] == line["turn"] for line in told)


SILENT = """
    import os, sys
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import ProcessGroup
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    import tierkeep
    from tierkeep.torch import training_state

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Linear(64, 64), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    calls = []

    def counted(name):
        was = getattr(ProcessGroup, name)
        def call(*a, **k):
            calls.append(name)
            return was(*a, **k)
        return call

    state = training_state(model, optimizer)
    with tierkeep.Checkpointer(sys.argv[1]) as ckpt:
        assert ckpt.restore(state) is None
        kinds = ("all", "broadcast", "gather", "reduce", "scatter", "barrier", "send", "recv",
                 "_all", "_reduce", "monitored")
        for name in dir(ProcessGroup):
            if name.startswith(kinds):
                setattr(ProcessGroup, name, counted(name))
        dist.barrier()
        assert calls, "the calls are not counted"
        calls.clear()
        for step in range(1, 6):
            ckpt.save(step, state).wait("disk", 60)
        assert ckpt.stop_requested() is False
    assert calls == [], calls
"""


def test_a_save_has_no_collective(run: Path) -> None:
    results = [ended(rank) for rank in start(4, SILENT, run)]
    assert all(code == 0 for code, *_ in results), results
    assert sorted(path.name for path in run.glob("0*"))[-1] == f"{5:020}"


def alone() -> Any:
    """A mesh of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


@pytest.fixture
def mesh() -> Iterator[Any]:
    yield alone()
    dist.destroy_process_group()


def test_what_is_no_part_of_a_value_is_refused_by_name(mesh: Any, run: Path) -> None:
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with tierkeep.Checkpointer(run) as ckpt:
        with pytest.raises(tierkeep.InvalidError, match=r"model/w: .*Partial placement"):
            ckpt.save(1, {"model": {"w": partial}})
        meta = distribute_tensor(torch.zeros(3, device="meta"), mesh, [Replicate()])
        with pytest.raises(tierkeep.InvalidError, match=r"model/w: .*meta device has no bytes"):
            ckpt.save(1, {"model": {"w": meta}})


SOME = """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    import sys, tierkeep

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    parts = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with tierkeep.Checkpointer(sys.argv[1], ranks=[0]) as ckpt:
        if dist.get_rank() == 0:
            try:
                ckpt.save(1, {"w": parts})
            except tierkeep.InvalidError as error:
                print(error)
        ckpt.save(1, {"w": whole}).wait("disk", 60)
    other = 1 - dist.get_rank()
    with tierkeep.Checkpointer(sys.argv[1] + "2", rank=other, world_size=2) as ckpt:
        try:
            ckpt.save(1, {"w": parts})
        except tierkeep.InvalidError as error:
            print(error)
"""


def test_parts_on_ranks_that_do_not_save_are_refused(run: Path) -> None:
    results = [ended(rank) for rank in start(2, SOME, run)]
    assert all(code == 0 for code, *_ in results), results
    said = results[0][1].splitlines()
    assert "w: its parts ([4] in all) lie on ranks [0, 1], of which only [0] save" in said[0]
    assert "w: it lies on ranks [0] of its job, this handle's rank is 1" in said[1]
    assert tierkeep.load(run)["w"].tolist() == [1.0] * 4


DIFFERENT = """
    import os, sys
    import torch, tierkeep

    rank = int(os.environ["RANK"])
    def stage(number):
        part = {"w": torch.full((2,), number), "deep": {"x": [torch.full((3,), number)]}}
        return {"part": part, "all": {"y": torch.ones(2)}, f"of{rank}": torch.full((4,), rank)}
    with tierkeep.Checkpointer(sys.argv[1]) as ckpt:
        state = {"first": torch.zeros(2)} if rank == 0 else stage(rank)
        ckpt.save(1, state).wait("disk", 60)
"""


def test_what_other_ranks_have_differently_is_nobodys(run: Path) -> None:
    """Also deep in what this rank does not have at all."""
    results = [ended(rank) for rank in start(3, DIFFERENT, run)]
    assert all(code == 0 for code, *_ in results), results
    state = {
        "first": torch.ones(2),
        "part": {
            "w": torch.zeros(2, dtype=torch.int64),
            "deep": {"x": [torch.zeros(3, dtype=torch.int64)]},
        },
        "all": {"y": torch.zeros(2)},
        "of2": torch.zeros(4, dtype=torch.int64),
    }
    with tierkeep.Checkpointer(run) as ckpt:
        with pytest.raises(tierkeep.MismatchError) as refused:
            ckpt.restore(state)
        for place in ("part/w", "part/deep/x/0"):
            assert f"{place}: rank 1 and rank 2 have different ones" in str(refused.value)
        assert len(refused.value.differences) == 2
        del state["part"]
        ckpt.restore(state)
    assert state["all"]["y"].tolist() == [1.0, 1.0]
    assert state["of2"].tolist() == [2, 2, 2, 2]


def test_a_laptop_reads_whole_tensors_of_what_was_cut(run: Path, tmp_path: Path) -> None:
    """With `load`, with the command, and by a plain reader of safetensors."""
    jobs = [["fsdp-tp", 4]]
    assert all(
        code == 0 for code, *_ in map(ended, start(4, JOB, run, json.dumps(jobs), "checkpointer"))
    )
    expected = torch.load(run.parent / "expected.pt", weights_only=False)
    loaded = tierkeep.load(run, rank=0)
    assert loaded["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        assert same(loaded["model"][name], tensor), name
    some = tierkeep.load(run, rank=3, include=["model/up.*"])
    assert same(some["model"]["up.weight"], expected["model"]["up.weight"])
    out = tmp_path / "whole.safetensors"
    export = ["export", str(run), "--to", str(out), "--prefix", "model"]
    assert (
        subprocess.run([Path(sys.executable).parent / "tierkeep", *export], check=False).returncode
        == 0
    )
    with safe_open(out, "pt") as file:
        for name, tensor in expected["model"].items():
            assert torch.equal(file.get_tensor(name), tensor), name
    # A shard is a file that anybody reads, too: its boxes say where they begin.
    shard = next(run.glob("0*/*/rank-000003-*.safetensors"))
    with safe_open(shard, "pt") as file:
        assert any(name.startswith("model/up.weight#") for name in list(file.keys()))


STAGES = """
    import json, os, sys
    import torch
    import tierkeep

    run, order = sys.argv[1], json.loads(sys.argv[2])
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    layers = {f"layer{i}": torch.nn.Linear(3, 3) for i in range(4)}
    mine = {name: layers[name] for name in order[rank]}
    state = {"stage": mine, "rank": rank}
    with tierkeep.Checkpointer(run) as ckpt:
        for layer in mine.values():
            torch.nn.init.zeros_(layer.weight) if os.path.exists(run + "-saved") else None
        found = ckpt.restore(state)
        sums = {name: float(layer.weight.abs().sum()) for name, layer in mine.items()}
        ckpt.save((found.step if found else 0) + 1, state).wait("disk", 60)
    print(json.dumps(sums))
"""


def test_stages_of_a_pipeline_come_back_in_other_places(run: Path) -> None:
    """Each rank finds what it has now with whichever rank had it."""

    def life(order: list[list[str]]) -> dict[str, float]:
        results = [ended(rank) for rank in start(len(order), STAGES, run, json.dumps(order))]
        assert all(code == 0 for code, *_ in results), results
        Path(f"{run}-saved").touch()
        return {name: x for _, out, _ in results for name, x in json.loads(out).items()}

    layers = [f"layer{i}" for i in range(4)]
    first = life([layers[:2], layers[2:]])
    assert len(first) == 4
    assert all(first.values())
    for order in ([layers[2:], layers[:2]], [layers], [[name] for name in reversed(layers)]):
        assert life(order) == first


def test_what_several_ranks_have_in_different_ways_is_nobodys(run: Path) -> None:
    ckpts = [tierkeep.Checkpointer(run, rank=rank, world_size=3) for rank in range(3)]
    states = [
        {"own": torch.full((2,), rank), **({"late": torch.full((3,), rank)} if rank else {})}
        for rank in range(3)
    ]
    for ckpt, state in zip(ckpts, states, strict=True):
        ckpt.restore(state)
    for save in [c.save(1, s) for c, s in zip(ckpts, states, strict=True)]:
        save.wait("disk", 30)
    for ckpt in ckpts:
        ckpt.close()
    with tierkeep.Checkpointer(run) as ckpt:
        live = {"own": torch.zeros(2, dtype=torch.int64), "late": torch.zeros(3, dtype=torch.int64)}
        with pytest.raises(tierkeep.MismatchError, match="late: rank 1 and rank 2 have different"):
            ckpt.restore(live)
        assert not live["own"].any()
        found = ckpt.restore({"own": live["own"]})
        assert found is not None
        # This rank's own, of the rank with its number.
        assert live["own"].tolist() == [0, 0]


def test_the_weights_of_a_file_and_of_another_run_fill_a_model_that_is_cut(
    mesh: Any, run: Path, tmp_path: Path
) -> None:
    plain = nn.Linear(5, 3)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    with tierkeep.Checkpointer(tmp_path / "other") as ckpt:
        ckpt.save(1, {"model": fully_shard(deepcopy(plain), mesh=mesh)})
    for origin in (tmp_path / "plain.safetensors", tmp_path / "other"):
        model = fully_shard(nn.Linear(5, 3), mesh=mesh)
        with tierkeep.Checkpointer(run / origin.stem, init_from=origin) as ckpt:
            assert ckpt.restore({"model": model}) is None
        assert same(model.weight.full_tensor().data, plain.weight.data)
        assert same(model.bias.full_tensor().data, plain.bias.data)


def test_guarded_parts_are_copied_behind(mesh: Any, run: Path) -> None:
    model = fully_shard(nn.Linear(64, 64), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    state = {"model": model, "optim": optimizer}
    with tierkeep.Checkpointer(run, capture="overlap") as ckpt:
        ckpt.guard(optimizer)
        ckpt.save(1, state)
        before = model.weight.detach().full_tensor().clone()
        optimizer.step()
    assert same(tierkeep.load(run)["model"]["weight"], before)
