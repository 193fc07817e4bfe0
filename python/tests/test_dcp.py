"""`torch.distributed.checkpoint` through tierkeep's writer and reader."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from same import same
from test_processes import ended
from test_ranks import start
from test_sharded import JOB, JOBS
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import tierkeep
from tierkeep.torch import StorageReader, StorageWriter, _runs

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # It tells each call.

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    _runs.close_all()
    _runs._seen.clear()


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": dict(nn.Linear(3, 2).state_dict()),
        "optim": {"param_groups": [{"lr": 0.1, "params": ["w"]}], "step": 7},
        "list": [torch.arange(3), torch.ones(2, dtype=torch.bfloat16)],
        "half": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
        "nothing": None,
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(5),
    }


def empty(like: Any) -> Any:
    if isinstance(like, torch.Tensor):
        return torch.zeros_like(like)
    if isinstance(like, dict):
        return {key: empty(value) for key, value in like.items()}
    if isinstance(like, list):
        return [empty(value) for value in like]
    return type(like)() if like is not None else None


def loaded(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    found = empty(like)
    dcp.load(found, storage_reader=StorageReader(path))
    return found


def test_what_was_saved_is_loaded(run: Path) -> None:
    saved = state()
    dcp.save(saved, storage_writer=StorageWriter(run / "step-3"))
    assert same(loaded(run / "step-3", saved), saved)
    # Without a number: the newest.
    assert same(loaded(run, saved), saved)
    names = [path.name for path in run.glob("0*")]
    assert names == [f"{3:020}"]
    with pytest.raises(tierkeep.CheckpointNotFoundError):
        StorageReader(run / "step-4").read_metadata()


def test_one_writer_and_a_checkpoint_id_for_each_save(run: Path) -> None:
    saved, writer = state(), StorageWriter(run)
    for step in (10, 20):
        saved["scalar"] = torch.tensor(step)
        dcp.save(saved, storage_writer=writer, checkpoint_id=run / f"checkpoint-{step}")
    for step in (10, 20):
        found = loaded(run / f"checkpoint-{step}", saved)
        assert int(found["scalar"]) == step
    with pytest.raises(BaseException, match=r"step 20 of .* was saved before"):
        dcp.save(saved, storage_writer=writer, checkpoint_id=run / "checkpoint-20")


def test_what_file_system_writers_users_pass_keeps_working(run: Path) -> None:
    writer = StorageWriter(
        run, single_file_per_rank=False, sync_files=False, thread_count=2, overwrite=False,
        per_thread_copy_ahead=1, cache_staged_state_dict=True, serialization_format=None,
    )  # fmt: skip
    for step in (1, 2):
        dcp.save(state(), storage_writer=writer)
        assert StorageReader(run).read_metadata().storage_meta is not None
        assert step in [info.step for info in _runs.opened(str(run)).ckpt.steps()]
    with pytest.raises(tierkeep.InvalidError, match="_extensions"):
        StorageWriter(run, _extensions=[object()])


@pytest.mark.parametrize("how", ["thread", "process"])
def test_async_saves_are_those_of_their_moment(run: Path, how: str) -> None:
    kind = AsyncCheckpointerType.PROCESS if how == "process" else AsyncCheckpointerType.THREAD
    if how == "process":
        dist.init_process_group(
            "gloo", store=dist.TCPStore("127.0.0.1", 0, is_master=True), rank=0, world_size=1
        )
    try:
        saved = state()
        for step in (1, 2):
            saved["scalar"] += 1
            expected = saved["scalar"].clone()
            future = dcp.async_save(
                saved,
                storage_writer=StorageWriter(run / f"step-{step}"),
                async_checkpointer_type=kind,
            )
            saved["scalar"].zero_()
            assert isinstance(future, dcp.state_dict_saver.Future)
            future.result()
            assert same(loaded(run / f"step-{step}", saved)["scalar"], expected)
            saved["scalar"].copy_(expected)
    finally:
        if how == "process":
            dist.destroy_process_group()


def test_a_state_of_the_same_form_is_staged_into_its_slot(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    was = BlockingAsyncStager.stage

    def counted(self: Any, state_dict: Any) -> Any:
        copies.append(1)
        return was(self, state_dict)

    monkeypatch.setattr(BlockingAsyncStager, "stage", counted)
    saved = state()

    def save(planner: Any = None) -> None:
        """And at once another step of the training, in place."""
        saved["scalar"] += 1
        saved["optim"]["step"] += 1
        expected = int(saved["scalar"])
        path = run / f"step-{expected}"
        future = dcp.async_save(saved, storage_writer=StorageWriter(path), planner=planner)
        saved["scalar"] += 100
        saved["optim"]["step"] += 100
        saved["half"].zero_()
        future.result()
        found = loaded(path, saved)
        assert int(found["scalar"]) == expected
        assert found["optim"]["step"] == expected + 2
        assert found["half"].any()
        saved["scalar"] -= 100
        saved["optim"]["step"] -= 100
        saved["half"].fill_(expected)

    for _ in range(3):
        save()
    assert len(copies) == 1, "the first one alone is copied on the way"
    saved["more"] = torch.ones(3)
    save()
    assert len(copies) == 2, "of another form"
    save()
    assert len(copies) == 2

    class Planner(DefaultSavePlanner):
        """It may do anything."""

    save(Planner())
    save(Planner())
    assert len(copies) == 3, "it was staged by torch's, then by its own"


def test_plans_that_torch_keeps_are_written_anew(run: Path) -> None:
    saved = state()
    for step in (1, 2, 3):
        saved["half"] = saved["half"] + 1
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(saved, storage_writer=StorageWriter(run), planner=planner)
        assert same(loaded(run / f"step-{step}", saved), saved)


def test_a_checkpointer_reads_what_dcp_saved_and_the_other_way_round(run: Path) -> None:
    saved = state()
    dcp.save(saved, storage_writer=StorageWriter(run / "step-1"))
    _runs.close_all()
    assert same(tierkeep.load(run, include=["model", "half"])["half"], saved["half"].contiguous())
    whole = empty(saved)
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(whole)
    assert same(whole, saved)
    assert tierkeep.load(run)["optim"] == saved["optim"]
    model = nn.Linear(3, 2)
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore({"model": model}, strict="state")
        assert found is not None
        assert same(dict(model.state_dict()), dict(saved["model"]))
        ckpt.save(2, {"model": model, "half": torch.ones(2), "values": {"lr": 0.5, "names": ["a"]}})
    found = {
        "model": empty(model.state_dict()),
        "half": torch.zeros(2),
        "values": {"lr": 0, "names": []},
    }
    dcp.load(found, storage_reader=StorageReader(run))
    assert same(dict(found["model"]), dict(model.state_dict()))
    assert found["values"] == {"lr": 0.5, "names": ["a"]}
    keys = _load_state_dict_from_keys("values", storage_reader=StorageReader(run))
    assert keys == {"values": {"lr": 0.5, "names": ["a"]}}


def test_a_state_that_does_not_fit_says_where(run: Path) -> None:
    dcp.save({"w": torch.ones(3)}, storage_writer=StorageWriter(run))
    for other in ({"v": torch.ones(3)}, {"w": torch.ones(4)}):
        with pytest.raises(BaseException, match=r"[vw]"):
            dcp.load(other, storage_reader=StorageReader(run))
    # torch's loaders cast; what is read is what was saved.
    cast = {"w": torch.zeros(3, dtype=torch.float64)}
    dcp.load(cast, storage_reader=StorageReader(run))
    assert cast["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_damaged_byte_is_no_checkpoint(run: Path) -> None:
    """torch's own format loads a flipped bit."""
    dcp.save({"w": torch.ones(4096)}, storage_writer=StorageWriter(run))
    _runs.close_all()
    payload = next(run.glob("0*/*/*.safetensors"))
    data = bytearray(payload.read_bytes())
    data[-100] ^= 1
    payload.write_bytes(data)
    found = {"w": torch.zeros(4096)}
    with pytest.raises(BaseException, match="damaged"):
        dcp.load(found, storage_reader=StorageReader(run))


def test_a_run_goes_on_from_what_was_loaded(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        dcp.save({"w": torch.full((2,), step)}, storage_writer=StorageWriter(run / f"step-{step}"))
    _runs.close_all()
    found = {"w": torch.zeros(2, dtype=torch.int64)}
    dcp.load(found, storage_reader=StorageReader(run / "step-2"))
    assert found["w"].tolist() == [2, 2]
    dcp.save({"w": torch.full((2,), 30)}, storage_writer=StorageWriter(run / "step-3"))
    assert "goes on from step 2: newer ones are abandoned" in caplog.text
    assert loaded(run, found)["w"].tolist() == [30, 30]


ALONE = """
    import json, sys
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from tierkeep.torch import StorageReader, StorageWriter

    run, mode = sys.argv[1], sys.argv[2]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    state = {"own": torch.full((3,), rank), "all": torch.ones(4), f"of{rank}": rank}
    if mode == "no_dist":
        if rank == 1:
            dcp.save(state, storage_writer=StorageWriter(run), no_dist=True)
        dist.barrier()
        found = {"own": torch.zeros(3, dtype=torch.int64)}
        dcp.load(found, storage_reader=StorageReader(run), no_dist=True)
        assert found["own"].tolist() == [1, 1, 1]
    elif mode == "no_collectives":
        calls = []
        def counted(name, was):
            return lambda *a, **k: (calls.append(name), was(*a, **k))
        for name in ("gather_object", "scatter_object_list", "all_gather_object"):
            setattr(dist, name, counted(name, getattr(dist, name)))
        for step in (1, 2):
            writer = StorageWriter(f"{run}/step-{step}")
            dcp.save(state, storage_writer=writer, use_collectives=False)
        assert calls == [], calls
    elif mode == "lists":
        # Of what all have torch gives each item to one rank: neither has all of a list.
        import tierkeep
        del state["own"]
        def said(found):
            return json.dumps(found, sort_keys=True, default=lambda tensor: tensor.tolist())
        def fresh(mine):
            if isinstance(mine, list):
                return [fresh(item) for item in mine]
            if isinstance(mine, dict):
                return {name: fresh(item) for name, item in mine.items()}
            return torch.zeros_like(mine) if isinstance(mine, torch.Tensor) else type(mine)()
        groups = [{"lr": 0.1 * i, "betas": [0.9, i], "w": torch.ones(i + 1)} for i in range(3)]
        state |= {"groups": groups, "items": [torch.arange(64), 5, "x", torch.ones(8), {"a": 1}, 7]}
        dcp.save(state, storage_writer=StorageWriter(f"{run}/step-1"))
        again = fresh(state)
        dcp.load(again, storage_reader=StorageReader(f"{run}/step-1"))
        assert said(again) == said(state), again
        again = fresh(state)
        dist.barrier()
        from tierkeep.torch import _runs
        _runs.close_all()
        with tierkeep.Checkpointer(run) as ckpt:
            ckpt.restore(again)
        assert said(again) == said(state), again
    elif mode == "raises":
        class Bad:
            def __reduce__(self):
                raise RuntimeError("this rank cannot")
        if rank == 1:
            state["bad"] = Bad()
        try:
            dcp.save(state, storage_writer=StorageWriter(run))
        except BaseException as error:
            print(json.dumps(str(error)))
        else:
            raise AssertionError("it was saved")
        state.pop("bad", None)
        dcp.save(state, storage_writer=StorageWriter(run))
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("mode", ["no_dist", "no_collectives", "lists", "raises"])
def test_two_ranks(run: Path, mode: str) -> None:
    results = [ended(rank) for rank in start(2, ALONE, run, mode)]
    assert all(code == 0 for code, *_ in results), results
    found = {"all": torch.zeros(4), "of0": 7}
    if mode != "no_dist":
        dcp.load(found, storage_reader=StorageReader(run))
        assert found["all"].tolist() == [1.0] * 4
        assert found["of0"] == 0
    if mode == "raises":
        for _, out, _ in results:
            assert "this rank cannot" in json.loads(out)


def test_it_comes_back_on_any_other_mesh(run: Path) -> None:
    jobs = [job for a, b in itertools.combinations(JOBS, 2) for job in (a, b)] + [JOBS[0]]
    results = [ended(rank) for rank in start(5, JOB, run, json.dumps(jobs), "dcp")]
    assert all(code == 0 for code, _, _ in results), results
    told = [json.loads(line) for _, out, _ in results for line in out.splitlines()]
    assert [line for line in told if line["differences"]] == []
    assert len(told) == sum(world for _, world in jobs)
    assert all(line["step"] == line["turn"] for line in told)


def test_the_import_of_tierkeep_brings_no_torch() -> None:
    code = "import sys, tierkeep; assert 'torch' not in sys.modules"
    subprocess.run([Path(__import__("sys").executable), "-c", code], check=True)
