"""DeepSpeed through tierkeep's checkpoint engine."""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.tensor_fragment import fragment_address
from same import same
from test_processes import ended
from test_ranks import start

import tierkeep
from tierkeep.deepspeed import CheckpointEngine, _values, attach, export

deepspeed_logger.setLevel(logging.WARNING)

MODEL, OPTIM = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"

Open = Callable[..., CheckpointEngine]


@pytest.fixture
def opened(run: Path) -> Iterator[Open]:
    """Engines on the run, each with the one before closed."""
    engines: list[CheckpointEngine] = []

    def open_next(**options: Any) -> CheckpointEngine:
        for engine in engines:
            engine.cleanup()
        engines.append(CheckpointEngine(run, **options))
        return engines[-1]

    yield open_next
    for engine in engines:
        engine.cleanup()


def save(engine: CheckpointEngine, run: Path, tag: str, **files: Any) -> None:
    """As `save_checkpoint` goes about it."""
    engine.makedirs(str(run), exist_ok=True)
    info = CheckpointCommitInfo(tag=tag, save_dir=str(run), save_latest=True)
    engine.create(info)
    engine.makedirs(os.path.join(run, tag), exist_ok=True)
    for name, state in (files or {MODEL: {"w": torch.ones(3)}}).items():
        engine.save(state_dict=state, path=os.path.join(run, tag, name))
    engine.commit(info)
    (run / "latest").write_text(tag)


def w_of(engine: CheckpointEngine, run: Path, tag: str) -> list[float]:
    values: list[float] = engine.load(os.path.join(run, tag, MODEL))["w"].tolist()
    return values


def filled(value: float) -> dict[str, Any]:
    return {MODEL: {"w": torch.full((2,), value)}}


# -- values ----------------------------------------------------------------------------------


def test_what_deepspeed_puts_into_its_dicts_comes_back(run: Path, opened: Open) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    dynamic = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    dynamic.cur_scale = 4096.0
    flat = torch.arange(12, dtype=torch.bfloat16)
    model = {
        "module": net.state_dict(),
        "param_shapes": [collections.OrderedDict(w=torch.Size([2, 3]))],
        "args": argparse.Namespace(lr=0.1, dtype=torch.float16),
        "dp_world_size": 1,
        "lr_scheduler": None,
    }
    optim = {
        "optimizer_state_dict": {
            "loss_scaler": LossScaler(8.0),
            "dynamic": [dynamic],
            "zero_stage": ZeroStageEnum.gradients,
            "single_partition_of_fp32_groups": [flat[:5], flat[5:]],
            "param_slice_mappings": [collections.OrderedDict(w=fragment_address(6, 0))],
            "betas": (0.9, 0.999),
        },
        "ds_version": "0.19",
    }
    save(opened(), run, "global_step3", **{MODEL: model, OPTIM: optim})
    engine = opened()
    found = engine.load(str(run / "global_step3" / MODEL), map_location=lambda storage, _: storage)
    assert vars(found["args"]) == vars(model["args"])
    assert type(found.pop("args")) is type(model.pop("args"))
    assert found["module"]._metadata == net.state_dict()._metadata
    assert same(found, model)
    found = engine.load(str(run / "global_step3" / OPTIM), map_location="cpu")
    loaded, states = found["optimizer_state_dict"], optim["optimizer_state_dict"]
    assert type(loaded["loss_scaler"]) is LossScaler
    assert loaded.pop("loss_scaler").loss_scale == states.pop("loss_scaler").loss_scale
    [scaler], _ = loaded.pop("dynamic"), states.pop("dynamic")
    assert type(scaler) is DynamicLossScaler
    assert vars(scaler) == vars(dynamic)
    assert same(found, optim)


def test_no_other_object_is_saved_or_made(run: Path, opened: Open) -> None:
    engine = opened()
    with pytest.raises(tierkeep.InvalidError, match="allow_pickle"):
        save(engine, run, "global_step1", **{MODEL: {"client": types.SimpleNamespace(a=1)}})
    lie = _values.Instance("subprocess:Popen", {"args": "true"})
    save(engine, run, "global_step2", **{MODEL: {"loss_scaler": lie}})
    with pytest.raises(tierkeep.InvalidError, match="subprocess:Popen"):
        engine.load(str(run / "global_step2" / MODEL))


def test_a_damaged_byte_is_no_checkpoint(run: Path, opened: Open) -> None:
    save(opened(), run, "global_step1", **{MODEL: {"w": torch.ones(4096)}})
    opened()
    payload = next(run.glob("0*/*/*.safetensors"))
    data = bytearray(payload.read_bytes())
    data[-100] ^= 1
    payload.write_bytes(data)
    shutil.rmtree(os.environ["TIERKEEP_RAM_DIR"])
    with pytest.raises(tierkeep.TierkeepError, match="damaged"):
        w_of(opened(), run, "global_step1")


# -- which checkpoint ------------------------------------------------------------------------


def test_a_directory_that_says_too_much_or_nothing_is_not_believed(
    run: Path, tmp_path: Path, opened: Open
) -> None:
    engine = opened()
    for step in (3, 6):
        save(engine, run, f"global_step{step}", **filled(step))
    # DeepSpeed wrote of a step that did not outlive the power cut.
    shutil.copytree(run / "global_step6", run / "global_step9")
    about = run / "global_step9" / "tierkeep.json"
    about.write_text(about.read_text().replace("6", "9"))
    (run / "latest").write_text("global_step9")
    engine = opened()
    with pytest.raises(tierkeep.CheckpointNotFoundError, match=r"no complete step 9.*resume"):
        w_of(engine, run, "global_step9")
    assert engine.begin(str(run)) == "global_step6"
    assert (run / "latest").read_text() == "global_step6"
    assert w_of(engine, run, "global_step6") == [6.0, 6.0]
    # A node that was lost, or another directory.
    elsewhere = tmp_path / "elsewhere"
    assert opened().begin(str(elsewhere)) == "global_step6"
    assert (elsewhere / "latest").read_text() == "global_step6"
    assert w_of(opened(), elsewhere, "global_step6") == [6.0, 6.0]
    with pytest.raises(tierkeep.CheckpointNotFoundError, match=r"no tierkeep.json: .*resume"):
        w_of(opened(), elsewhere, "global_step3")


def test_a_run_that_is_moved_with_its_directories_is_read_where_it_is(
    run: Path, tmp_path: Path, opened: Open
) -> None:
    save(opened(), run, "global_step3", **filled(3))
    opened().cleanup()
    moved = tmp_path / "moved"
    run.rename(moved)
    assert w_of(opened(), moved, "global_step3") == [3.0, 3.0]


def test_a_checkpoint_that_is_deleted_while_tags_are_listed_is_none_of_them(
    run: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    save(engine, run, "global_step3", **filled(3))
    gone = SimpleNamespace(step=2, attempt=1, complete=True, in_lineage=True)
    listed = [gone, *engine.ckpt.steps()]
    monkeypatch.setattr(engine.ckpt, "steps", lambda: listed)
    assert engine.tags() == {"global_step3": 3}


def test_what_was_loaded_is_where_it_goes_on_from(
    run: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened()
    for step in (3, 6, 9):
        save(engine, run, f"global_step{step}", **filled(step))
    # In the same process, after the loss went up.
    assert w_of(engine, run, "global_step6") == [6.0, 6.0]
    save(engine, run, "global_step9", **filled(-9))
    assert "goes on from global_step6: newer ones are abandoned" in caplog.text
    assert w_of(engine, run, "global_step9") == [-9.0, -9.0]
    # In the next one, of the newest, which is saved again at once.
    engine = opened()
    assert w_of(engine, run, "global_step9") == [-9.0, -9.0]
    save(engine, run, "global_step9", **filled(99))
    save(engine, run, "global_step12", **filled(12))
    assert list(engine.tags().items())[-2:] == [("global_step9", 9), ("global_step12", 12)]
    # By its tag.
    engine = opened()
    assert engine.begin(str(run), "global_step9") == "global_step9"
    assert "global_step12" not in engine.tags()
    assert w_of(engine, run, "global_step9") == [-9.0, -9.0]
    save(engine, run, "global_step10", **filled(10))
    assert opened().begin(str(run)) == "global_step10"
    with pytest.raises(tierkeep.CheckpointNotFoundError, match=r"no complete best \(complete: "):
        opened().begin(str(run), "best")


def test_a_step_has_one_tag(run: Path, opened: Open) -> None:
    steps = iter([3, 3, 3, 2, 4])
    engine = opened(step=lambda: next(steps))
    save(engine, run, "first", **filled(1))
    save(engine, run, "first", **filled(2))
    for tag in ("best", "older"):
        with pytest.raises(tierkeep.InvalidError, match="each step has one tag"):
            save(engine, run, tag, **filled(3))
    save(engine, run, "best", **filled(4))
    assert engine.tags() == {"first": 3, "best": 4}
    assert w_of(engine, run, "first") == [1.0, 1.0]
    engine = opened()
    with pytest.raises(tierkeep.InvalidError, match="'final' has no number"):
        save(engine, run, "final")


def test_a_save_that_failed_is_not_taken_for_one(run: Path, opened: Open) -> None:
    engine = opened()
    save(engine, run, "global_step3", **filled(3))
    with pytest.raises(tierkeep.InvalidError):
        save(engine, run, "global_step6", **{MODEL: {"w": object()}})
    assert (run / "latest").read_text() == "global_step3"
    save(engine, run, "global_step6", **filled(6))
    assert w_of(engine, run, "global_step6") == [6.0, 6.0]


# -- files of torch's ------------------------------------------------------------------------


def test_files_for_others_are_files_of_torchs(run: Path, tmp_path: Path, opened: Open) -> None:
    engine, w = opened(), {"w": torch.arange(3.0)}
    # As `save_16bit_model` goes about it, and on a rank that has nothing to do there.
    for path in (tmp_path / "pytorch_model.bin", None):
        info = CheckpointCommitInfo(tag="global_step1", save_dir=str(tmp_path), save_latest=False)
        engine.create(info)
        if path is not None:
            engine.makedirs(str(tmp_path), exist_ok=True)
            engine.save(w, str(path))
        engine.commit(info)
    assert same(torch.load(tmp_path / "pytorch_model.bin"), w)
    assert engine.tags() == {}
    states = {MODEL: {**w, "scaler": LossScaler(2)}, OPTIM: {"m": torch.ones(2)}}
    save(engine, run, "global_step2", **states)
    assert export(run, tmp_path / "torch") == "global_step2"
    theirs = TorchCheckpointEngine()
    assert (tmp_path / "torch" / "latest").read_text() == "global_step2"
    for name, state in states.items():
        found = theirs.load(str(tmp_path / "torch" / "global_step2" / name))
        if name == MODEL:
            assert vars(found.pop("scaler")) == vars(state.pop("scaler"))
        assert same(found, state)
    with pytest.raises(tierkeep.CheckpointNotFoundError, match=r"before tierkeep.deepspeed.attach"):
        engine.load(str(tmp_path / "torch" / "global_step2" / MODEL))


def test_what_goes_past_the_engine_is_refused(run: Path, opened: Open) -> None:
    class Fast(TorchCheckpointEngine):
        """A writer of DeepSpeed's."""

    def host(engine: Any, nvme: bool) -> Any:
        return types.SimpleNamespace(
            checkpoint_engine=engine, zero_nvme_offload_optimizer=lambda: nvme, global_steps=7
        )

    with pytest.raises(tierkeep.InvalidError, match="leave its `checkpoint` writer out"):
        attach(host(Fast(), False), run)
    with pytest.raises(tierkeep.InvalidError, match="nvme"):
        attach(host(TorchCheckpointEngine(), True), run)
    with pytest.raises(tierkeep.InvalidError, match="busy"):
        opened(busy="skip")
    engine = host(TorchCheckpointEngine(), False)
    first = attach(engine, run)
    save(engine.checkpoint_engine, run, "best")
    assert first.tags() == {"best": 7}
    attach(engine, run).cleanup()


# -- two ranks -------------------------------------------------------------------------------

JOB = """
    import json, os, shutil, sys
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": os.environ["RANK"]}
    import deepspeed
    import torch
    import torch.distributed as dist
    import tierkeep
    import tierkeep.deepspeed

    root = sys.argv[1]
    deepspeed.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # It would be compiled.
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()

    called = []
    def counted(name, was):
        return lambda *a, **k: (called.append(name), was(*a, **k))[1]
    for name in ("barrier", "broadcast", "all_reduce", "all_gather", "all_gather_object", "gather",
                 "broadcast_object_list", "scatter", "send", "recv"):
        setattr(dist, name, counted(name, getattr(dist, name)))

    def begin(seed, stage, **config):
        torch.manual_seed(seed)
        norm = torch.nn.Identity() if config else torch.nn.BatchNorm1d(32)  # Which wants floats.
        net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Dropout(0.2), norm, torch.nn.Linear(32, 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        config |= {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
                   "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer, lr_scheduler=scheduler, config=config)
        torch.manual_seed(seed + 1 + rank)
        return engine

    def train(engine, steps):
        losses = []
        for _ in range(steps):
            x = torch.randn(4, 8)
            half = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
            loss = engine(x.to(half)).float().square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            params = [p.detach().double().sum().item() for p in engine.module.parameters()]
        return [losses, params, [b.double().sum().item() for b in engine.module.buffers()]]

    def attach(engine, run):
        # DeepSpeed saves the buffers of rank 0 alone, but with ZeRO 3.
        own = {"rng": tierkeep.Rng(), "norm": dict(engine.module.named_buffers())}
        return tierkeep.deepspeed.attach(engine, run, own=own)

    for stage, config in ((0, {}), (1, {}), (2, {"bf16": {"enabled": True}}), (3, {})):
        run, names = f"{root}/run{stage}", f"{root}/names{stage}"
        engine = begin(0, stage, **config)
        ours = attach(engine, run)
        fresh = tierkeep.deepspeed.resume(engine, names)
        assert fresh == (None, None), fresh
        train(engine, 2)
        commit = ours.commit
        def watched(info):
            called.clear()
            done = commit(info)
            assert called == [], called
            return done
        ours.commit = watched
        engine.save_checkpoint(names, client_state={"note": [stage, "here"]})
        expected = train(engine, 2)
        ours.cleanup()
        engine.destroy()
        dist.barrier()
        if rank == 0 and stage != 1:
            shutil.rmtree(names)
        dist.barrier()
        engine = begin(100, stage, **config)
        ours = attach(engine, run)
        if stage == 1:
            path, client = engine.load_checkpoint(names)
            ours.restore_own()
        else:
            path, client = tierkeep.deepspeed.resume(engine, names)
        assert engine.global_steps == 2, engine.global_steps
        assert client["note"] == [stage, "here"], client
        assert path.startswith(names + "/global_step2"), path
        found = train(engine, 2)
        engine.save_checkpoint(names)
        tags = ours.tags()
        ours.cleanup()
        engine.destroy()
        files = sorted(os.listdir(names + "/global_step4"))
        print(json.dumps([stage, found == expected, tags, files, expected[0]]))
    dist.destroy_process_group()
"""


def test_two_ranks_go_on_bit_for_bit_at_every_stage_of_zero(run: Path, opened: Open) -> None:
    results = [ended(rank) for rank in start(2, JOB, run)]
    assert all(code == 0 for code, *_ in results), results
    told = [
        [json.loads(line) for line in out.splitlines() if line[:1] == "["] for _, out, _ in results
    ]
    for rank in told:
        assert [line[0] for line in rank] == [0, 1, 2, 3]
        assert [line[1] for line in rank] == [True] * 4
        assert [line[2] for line in rank] == [{"global_step2": 2, "global_step4": 4}] * 4
        assert MODEL in rank[0][3]
        assert [sum(n.endswith("optim_states.pt") for n in line[3]) for line in rank] == [
            0,
            2,
            2,
            2,
        ]
    # Dropout and data are each rank's own.
    assert told[0][0][4] != told[1][0][4]
    # A job of one rank reads what either of two has saved.
    with tierkeep.Checkpointer(run / "run3") as ckpt:
        assert ckpt.latest_step() == 4
    engine = opened()
    for rank in (0, 1):
        path = run / "names3" / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        [flat] = engine.load(str(path))["optimizer_state_dict"]["fp32_flat_groups"]
        assert flat.any()
