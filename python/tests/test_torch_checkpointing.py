"""Meta's `torch_checkpointing` through tierkeep's storage and barrier."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import ended
from test_ranks import start
from torch_checkpointing import CheckpointManager
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import SyncCheckpointSaverConfig

import tierkeep
from tierkeep.torch import _runs
from tierkeep.torch_checkpointing import StorageConfig, configured, newest


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    _runs.close_all()
    _runs._seen.clear()


def state(at: float) -> dict[str, Any]:
    return {"model": {"w": torch.arange(6.0) + at, "b": torch.ones(2)}, "step": int(at)}


@pytest.mark.parametrize("kind", ["with_sync_save", "with_async_save"])
def test_a_manager_saves_to_a_run_and_loads_from_it(run: Path, kind: str) -> None:
    assert newest(run) is None
    manager = CheckpointManager(configured(getattr(CheckpointManager.Config, kind)()))
    for step in (3, 4):
        future = manager.save(str(run / f"step_{step}"), state(step))
        if future is not None:
            future.result()
    for step in (3, 4):
        got = manager.load(str(run / f"step_{step}"), into=state(0))
        assert torch.equal(got["model"]["w"], state(step)["model"]["w"])
        assert got["step"] == step
    with pytest.raises(FileNotFoundError):
        manager.load(str(run / "step_5"), into=state(0))
    manager.close()
    assert newest(run) == f"{run}/step-4"
    assert sorted(tierkeep.load(run, 4)["files"]) == ["model_0.pt", "step_0.pt"]


RANKS = """
    import os, sys
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch_checkpointing import CheckpointManager, ItemSpec
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.metadata_manager import DefaultMetadataManager
    import tierkeep.torch_checkpointing

    def gathered(self, data, process_group=None):
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, data)
        return dict(enumerate(ranks))

    DefaultMetadataManager._all_gather_pickled_data = gathered  # 0.1.1 does it on CUDA alone.
    run, kind, what = sys.argv[1:]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(35.0).reshape(7, 5)
    config = getattr(CheckpointManager.Config, kind)()
    config.items = {"model": ItemSpec(resharder=DefaultResharder())}
    manager = CheckpointManager(tierkeep.torch_checkpointing.configured(config))
    if what == "save":
        future = manager.save(f"{run}/step_2", {"model": {"w": distribute_tensor(whole, mesh)}})
        if future is not None:
            future.result()
    else:
        into = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])
        manager.load(f"{run}/step_2", into={"model": {"w": into}})
        assert torch.equal(into.full_tensor(), whole), into.full_tensor()
    manager.close()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["with_sync_save", "with_async_save"])
def test_ranks_commit_one_checkpoint_that_others_reshard(run: Path, kind: str) -> None:
    for world, what in ((2, "save"), (3, "load")):
        results = [ended(rank) for rank in start(world, RANKS, run, kind, what)]
        assert all(code == 0 for code, *_ in results), results


def test_a_writer_without_the_barrier_commits_nothing_and_is_told(run: Path) -> None:
    storage = StorageConfig()
    config = CheckpointManager.Config(save=SyncCheckpointSaverConfig(), storage_config=storage)
    manager = CheckpointManager(config)
    with pytest.raises(ValueError, match="barrier_config=tierkeep"):
        manager.save(str(run / "step_1"), state(1))
    with pytest.raises(FileNotFoundError):
        tierkeep.load(run)
    direct = CheckpointWriterConfig(barrier_config=None, write_to_temp_dir=False)
    config = dataclasses.replace(config, save=SyncCheckpointSaverConfig(writer_config=direct))
    manager = CheckpointManager(config)
    manager.save(str(run / "step_1"), state(1))  # Nobody tells a storage that this was the end.
    with pytest.raises(ValueError, match="never committed"):
        manager.save(str(run / "step_2"), state(2))


def test_a_save_that_failed_costs_itself_alone(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = CheckpointManager(configured(CheckpointManager.Config.with_sync_save()))
    manager.save(str(run / "step_1"), state(1))
    with pytest.raises(Exception, match="pickle"):
        manager.save(str(run / "step_2"), {**state(2), "what": lambda: None})
    manager.save(str(run / "step_3"), state(3))
    assert "step 2 of" in caplog.text and "was given up" in caplog.text
    with pytest.raises(ValueError, match="rank 0 wrote no item"):
        manager.save(str(run / "step_4"), {})
    assert newest(run) == f"{run}/step-3"
    manager.close()


def test_a_training_that_loaded_an_older_step_goes_on_from_there(run: Path) -> None:
    manager = CheckpointManager(configured(CheckpointManager.Config.with_sync_save(), keep_last=9))
    for step in (10, 20, 30):
        manager.save(str(run / f"step_{step}"), state(step))
    _runs.close_all()
    _runs._seen.clear()
    manager.load(str(run / "step_10"), into=state(0))
    manager.save(str(run / "step_40"), state(40))
    _runs.close_all()
    with tierkeep.Checkpointer(run) as ckpt:
        assert [info.step for info in ckpt.steps() if info.in_lineage] == [10, 40]


def test_files_are_those_of_a_storage(run: Path) -> None:
    config = StorageConfig()
    storage = config.create_storage()
    with storage.stream_write(run / "tmp_step_7" / "a" / "one.bin") as stream:
        stream.write(b"0123456789")
    with pytest.raises(KeyError), storage.stream_write(run / "step_7" / "broken") as stream:
        stream.write(b"half")
        raise KeyError
    storage.stream_write(run / "step_7" / "left").write(b"half")
    storage.write(run / "step_7" / "empty", b"")
    storage.write(run / "step_7" / "draft", b"x")
    storage.rename(run / "step_7" / "draft", run / "step_7" / "two")
    storage.write(run / "step_7" / "gone", b"x")
    storage.delete(run / "step_7" / "gone")
    assert storage.exists(run / "step_7") and storage.exists(run / "tmp_step_7" / "two")
    assert not storage.exists(run / "step_7" / "left")
    assert not config.create_storage().exists(run / "step_7")
    storage.publish((0, 1), 60)
    assert storage.ls(run) == ["step-7"]
    assert storage.ls(run / "step_7") == ["a", "empty", "two"]
    assert storage.ls(run / "step_7" / "a") == ["one.bin"]
    assert storage.isdir(run) and storage.isdir(run / "step_7" / "a")
    assert not storage.isdir(run / "step_7" / "two") and storage.exists(run / "step_7" / "two")
    assert not storage.exists(run / "step_7" / "draft") and not storage.exists(run / "step_8")
    assert storage.getsize(run / "step_7" / "a" / "one.bin") == 10
    assert storage.read(run / "step_7" / "empty") == b""
    with storage.stream_read(run / "step_7" / "a" / "one.bin") as stream:
        assert stream.seek(-3, io.SEEK_END) == 7
        assert stream.read() == b"789"
        stream.seek(2)
        assert stream.read(4) == b"2345"
    # A committed step is not changed, and goes by the run's retention alone.
    storage.rmdir(run / "step_7")
    assert storage.exists(run / "step_7")
    storage.write(run / "step_7" / "late", b"x")
    with pytest.raises(ValueError, match="saved before"):
        storage.publish((0, 1), 60)
    with pytest.raises(ValueError, match="no file of a step"):
        storage.write(run / "file", b"x")
