"""Which attempt and which step torch's distributed checkpoints belong to."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_processes import ended
from test_ranks import start
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import tierkeep
from tierkeep._tierkeep import Reader
from tierkeep.torch import StorageReader, StorageWriter, _runs

logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # It tells each call.

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def anew() -> None:
    """As a new process is."""
    _runs.close_all()
    _runs._seen.clear()


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    anew()


def save(run: Path, step: int) -> None:
    state = {"w": torch.full((3,), float(step))}
    dcp.save(state, storage_writer=StorageWriter(run / f"step-{step}", keep_last=9), no_dist=True)


def lineage(run: Path) -> list[int]:
    return [row["step"] for row in Reader(os.fspath(run)).steps() if row["in_lineage"]]


def test_ranks_that_chose_two_checkpoints_read_neither(run: Path) -> None:
    plans = []
    for step in (1, 2):
        save(run, step)
        reader = StorageReader(run)
        reader.read_metadata()
        plans.append(reader.prepare_local_plan(LoadPlan([])))
    with pytest.raises(ValueError, match=r"step 1 of attempt 1 and step 2 of attempt 1"):
        reader.prepare_global_plan(plans)
    assert reader.prepare_global_plan(plans[:1] * 2) == plans[:1] * 2
    assert dataclasses.asdict(plans[0])["storage_data"] == (1, 1)


REOPENED = """
    import sys
    import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
    from tierkeep.torch import StorageWriter, _runs

    run = sys.argv[1]
    dist.init_process_group("gloo")
    for step, closes in ((1, None), (2, 1), (3, 0), (4, None)):
        if closes == dist.get_rank():
            _runs.close_all()
        state = {"w": torch.full((3,), float(step))}
        writer = StorageWriter(f"{run}/step-{step}", timeout_s=30, keep_last=9)
        dcp.save(state, storage_writer=writer)
    _runs.close_all()
    dist.destroy_process_group()
"""


def test_a_rank_that_opens_the_run_anew_saves_with_the_others(run: Path) -> None:
    results = [ended(rank) for rank in start(2, REOPENED, run)]
    assert all(code == 0 for code, *_ in results), results
    for step in range(1, 5):
        assert tierkeep.load(run, step, rank=0)["w"].tolist() == [float(step)] * 3
    assert lineage(run) == [1, 2, 3, 4]


def test_a_process_of_its_own_goes_on_from_what_the_training_loaded(run: Path) -> None:
    for step in (1, 2, 3):
        save(run, step)
    anew()
    state: dict[str, Any] = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=StorageReader(run / "step-2"), no_dist=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        dcp.async_save(
            state,
            storage_writer=StorageWriter(run / "step-4", keep_last=9),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ).result()
    finally:
        dist.destroy_process_group()
    assert lineage(run) == [1, 2, 4]


def test_a_save_before_all_there_is_abandons_nothing_but_where_it_was_asked_to(run: Path) -> None:
    for step in (5, 6):
        save(run, step)
    anew()
    with pytest.raises(BaseException, match=r"before all that .* has \(the newest is 6\)"):
        save(run, 4)
    assert lineage(run) == [5, 6]
    anew()
    state = {"w": torch.full((3,), 4.0)}
    dcp.save(state, storage_writer=StorageWriter(run / "step-4", fresh=True), no_dist=True)
    assert lineage(run) == [4]


def test_a_save_between_goes_on_from_the_step_before_it(run: Path) -> None:
    for step in (5, 6, 8):
        save(run, step)
    anew()
    save(run, 7)
    assert lineage(run) == [5, 6, 7]


def test_a_look_at_an_older_step_leaves_the_newer_ones(run: Path) -> None:
    for step in (1, 2):
        save(run, step)
    anew()
    state = {"w": torch.zeros(3)}
    for step in (2, 1):
        dcp.load(state, storage_reader=StorageReader(run / f"step-{step}"), no_dist=True)
    save(run, 3)
    assert lineage(run) == [1, 2, 3]


def test_what_this_process_saved_itself_is_gone_on_from_where_a_run_is_opened_anew(
    run: Path,
) -> None:
    for step in (1, 2):
        save(run, step)
    anew()
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=StorageReader(run / "step-1"), no_dist=True)
    save(run, 2)
    save(run, 3)
    _runs.close_all()
    save(run, 4)
    assert lineage(run) == [1, 2, 3, 4]
    assert tierkeep.load(run, 4)["w"].tolist() == [4.0] * 3


def test_a_plan_that_torch_kept_says_nothing_of_what_a_run_goes_on_from(run: Path) -> None:
    for step in (1, 2):
        save(run, step)
    anew()
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=StorageReader(run / "step-1"), no_dist=True)
    for step in (5, 6, 7, 8):
        if step == 8:
            _runs.close_all()
        planner = DefaultSavePlanner(enable_plan_caching=True)
        writer = StorageWriter(run / f"step-{step}", keep_last=9)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    assert lineage(run) == [1, 5, 6, 7, 8]
