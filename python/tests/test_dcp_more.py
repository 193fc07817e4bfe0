"""What torch's own tests of distributed checkpoints ask for (`torch_own.py` runs those)."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_processes import ended
from test_ranks import start
from torch import nn
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from tierkeep.torch import StorageReader, StorageWriter, _items, _runs

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # It tells each call.

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    _runs.close_all()
    _runs._seen.clear()


def save(path: Path, state: dict[str, Any]) -> None:
    dcp.save(state, storage_writer=StorageWriter(path))


def load(path: Path, state: dict[str, Any], planner: Any = None) -> dict[str, Any]:
    dcp.load(state, storage_reader=StorageReader(path), planner=planner)
    return state


@pytest.mark.parametrize("kind", [StorageReader, StorageWriter])
def test_a_storage_is_asked_by_the_name_of_a_checkpoint(kind: Any, run: Path) -> None:
    for ours in (run, str(run / "step-3"), "tierkeep://ckpt/run", "s3://bucket/run", "gs://b/r"):
        assert kind.validate_checkpoint_id(ours), ours
    for other in ("abc://abc.abc", "hf://model", "", "/"):
        assert not kind.validate_checkpoint_id(other), other


def test_who_reads_a_save_knows_it_by_the_name_that_its_writer_has(run: Path) -> None:
    writer, names = StorageWriter(run), []
    for _ in range(2):
        told = dcp.save({"w": torch.ones(3)}, storage_writer=writer)
        assert told is not None
        assert told.storage_meta is not None
        reader = StorageReader(run)
        found = reader.read_metadata()
        assert found.storage_meta is not None
        assert found.storage_meta.checkpoint_id == run
        assert found.storage_meta.load_id == reader.load_id
        assert found.storage_meta.save_id == writer.save_id == told.storage_meta.save_id
        assert found.version == told.version == _items.VERSION is not None
        names.append(writer.save_id)
    assert None not in names
    assert names[0] != names[1]


def test_a_part_is_loaded_where_the_planner_allows_it(run: Path) -> None:
    saved = nn.Linear(2, 2)
    save(run, {"module": saved})
    found = nn.Linear(2, 2)
    found.more = nn.Parameter(torch.full((2,), 5.0))
    with pytest.raises(BaseException, match="Missing key in checkpoint"):
        load(run, {"module": found})
    load(run, {"module": found}, DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(found.weight, saved.weight)
    assert found.more.tolist() == [5.0, 5.0]
    with pytest.raises(BaseException, match="Size mismatch"):
        load(run, {"module": nn.Linear(3, 2)})


class Losses:
    """A value with a state of its own, of bytes in a stream."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.calls = losses, 0

    def state_dict(self) -> dict[str, Any]:
        stream = io.BytesIO()
        torch.save(self.losses, stream)
        return {"losses": stream, "step": torch.tensor(len(self.losses)), "blob": b"as it is"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["blob"] == b"as it is"
        self.losses = torch.load(io.BytesIO(state["losses"].getvalue()))
        self.calls += 1
        assert int(state["step"]) == len(self.losses)


def test_values_with_a_state_of_their_own_are_loaded_in_place(run: Path) -> None:
    save(run, {"losses": Losses([0.5, 0.25]), "plain": {"a": [1, 2]}, "empty": {}})
    found = {"losses": Losses([]), "plain": {"a": [0]}, "empty": {}}
    kept = found["losses"]
    load(run, found)
    assert found["losses"] is kept
    assert isinstance(kept, Losses)
    assert (kept.losses, kept.calls) == ([0.5, 0.25], 1)
    assert found["plain"] == {"a": [1, 2]}


def test_what_users_of_torchs_storages_pass_is_taken(run: Path) -> None:
    state = {"w": torch.ones(3)}
    # Its cache is pinned memory: not where there is no device.
    writer = StorageWriter(run, cache_staged_state_dict=True)
    for step in (1, 2):
        state["w"].fill_(step)
        future = dcp.async_save(state, storage_writer=writer)
        assert not isinstance(future, AsyncSaveResponse)
        future.result()
        found = {"w": torch.zeros(3)}
        # It would name what transformed the files of torch's.
        dcp.load(found, storage_reader=StorageReader(run, ExtensionRegistry()))
        assert found["w"].tolist() == [step] * 3


def test_a_state_of_nothing_is_a_checkpoint(run: Path) -> None:
    save(run, {})
    assert load(run, {}) == {}
    assert StorageReader(run).read_metadata().state_dict_metadata == {}


def test_all_of_it_is_loaded_without_a_state_to_load_into(run: Path) -> None:
    """As torch's tool that makes one file of a checkpoint does."""
    saved = {"model": dict(nn.Linear(3, 2).state_dict()), "groups": [{"lr": 0.1}], "step": 3}
    save(run, saved)
    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(found, storage_reader=StorageReader(run), planner=planner, no_dist=True)
    assert torch.equal(found["model"]["weight"], saved["model"]["weight"])
    assert (found["groups"], found["step"]) == ([{"lr": 0.1}], 3)


RESHARDED = """
    import itertools, sys
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import (
        ChunkShardingSpec, EnumerableShardingSpec, ShardMetadata,
    )
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
    from tierkeep.torch import StorageReader, StorageWriter

    run = sys.argv[1]
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def through(saved, found):
        dcp.save({"w": saved}, storage_writer=StorageWriter(run))
        state = {"w": found}
        dcp.load(state, storage_reader=StorageReader(run))
        return state["w"]

    # Shards of torch's older kind, one or several a rank, in any order, and whole tensors.
    def rows(*sizes_and_ranks):
        shards, offset = [], 0
        for size, owner in sizes_and_ranks:
            shards.append(ShardMetadata([offset, 0], [size, 6], placement=f"rank:{owner}"))
            offset += size
        return EnumerableShardingSpec(shards)

    def gathered(tensor):
        out = torch.zeros(tensor.size()) if rank == 0 else None
        tensor.gather(out=out)
        return out

    specs = [
        ChunkShardingSpec(0, ["rank:0", "rank:1"]),
        ChunkShardingSpec(1, ["rank:0", "rank:1", "rank:1", "rank:0"]),
        rows((2, 0), (1, 1), (3, 0), (3, 1), (1, 0)),
        rows((8, 1), (2, 0)),
    ]
    for a, b in itertools.permutations(specs, 2):
        saved, found = sharded_tensor.rand(a, 10, 6), sharded_tensor.zeros(b, 10, 6)
        through(saved, found)
        if rank == 0:
            assert torch.equal(gathered(saved), gathered(found)), (a, b)
        else:
            gathered(saved), gathered(found)
    torch.manual_seed(0)
    whole = torch.rand(10, 6)
    for spec in specs:
        found = gathered(through(whole, sharded_tensor.zeros(spec, 10, 6)))
        assert rank or torch.equal(found, whole)
        saved = sharded_tensor.rand(spec, 10, 6)
        found, expected = through(saved, torch.zeros(10, 6)), gathered(saved)
        assert rank or torch.equal(found, expected)

    # DTensors: on both ranks, on one of them, with nothing on one of them.
    mesh = init_device_mesh("cpu", (2,))
    for places in itertools.product([Shard(0), Shard(1), Replicate()], repeat=2):
        saved = distribute_tensor(whole, mesh, places[:1])
        found = through(saved, zeros(10, 6, device_mesh=mesh, placements=places[1:]))
        assert torch.equal(found.full_tensor(), whole), places
    first = DeviceMesh("cpu", [0])
    alone = zeros(6, device_mesh=first, placements=[Shard(0)])
    if rank == 0:
        alone.to_local().fill_(3)
    found = through(alone, zeros(6, device_mesh=first, placements=[Replicate()])).to_local()
    assert found.tolist() == ([3.0] * 6 if rank == 0 else [])
    one = distribute_tensor(torch.full((1,), 7.0), mesh, [Shard(0)])
    assert through(one, torch.zeros(1)).tolist() == [7.0]

    # Cuts that are uneven, and that no placement says.
    def cut(start, length):
        local = torch.arange(start, start + length, dtype=torch.float).view(length, 1)
        local = LocalShardsWrapper([local], [(start, 0)])
        size, stride = torch.Size([16, 1]), (1, 1)
        return local, DTensor.from_local(local, mesh, [Shard(0)], shape=size, stride=stride)

    _, saved = cut(*[(0, 5), (5, 11)][rank])
    expected, _ = cut(*[(0, 12), (12, 4)][rank])
    local, found = cut(*[(0, 12), (12, 4)][rank])
    local.local_shards()[0].zero_()
    through(saved, found)
    assert torch.equal(local.local_shards()[0], expected.local_shards()[0])
    dist.destroy_process_group()
"""


def test_tensors_come_back_in_other_cuts_of_every_kind(run: Path) -> None:
    results = [ended(rank) for rank in start(2, RESHARDED, run)]
    assert all(code == 0 for code, *_ in results), results
