"""Several ranks: found, agreed, killed together and resumed together."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_processes import ended, python

import tierkeep
from tierkeep import _ranks

JOB = """
    import json, os, signal, sys
    import torch
    import tierkeep

    run, stop, group = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "group"
    if group:
        import torch.distributed as dist
        dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer, "rng": tierkeep.Rng()}
    with tierkeep.Checkpointer(run, every=2) as ckpt:
        found = ckpt.restore(state)
        begin = found.step if found else 0
        for step in range(begin, 8):
            loss = model(torch.randn(2, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            save = ckpt.step(step + 1, state)
            if save is not None:
                save.wait("ram", 60)
            if step + 1 == stop:
                os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"begin": begin, "repr": repr(ckpt), "attempt": ckpt.settings["attempt_id"],
                      "model": [p.tolist() for p in model.parameters()]}))
"""


def start(world: int, script: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """One process a rank, with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        python(
            script, *arguments,
            RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(world)
    ]  # fmt: skip


def job(run: Path, stop: int, group: bool) -> list[dict[str, object]]:
    ranks = start(2, JOB, run, stop, "group" if group else "alone")
    results = [ended(rank) for rank in ranks]
    if stop:
        assert [code for code, *_ in results] == [-signal.SIGKILL] * 2, results
        return []
    assert [code for code, *_ in results] == [0, 0], results
    return [json.loads(out) for _, out, _ in results]


@pytest.mark.parametrize("group", [True, False], ids=["process group", "environment only"])
def test_two_ranks_are_killed_and_resumed_together(run: Path, tmp_path: Path, group: bool) -> None:
    whole = job(tmp_path / "whole", 0, group)
    job(run, 5, group)
    last = job(run, 0, group)
    assert [r["begin"] for r in last] == [4, 4]
    assert [r["model"] for r in last] == [r["model"] for r in whole]
    source = "torch.distributed" if group else "torchrun"
    assert f"rank 1 of 2 ({source})" in str(last[1]["repr"])
    if group:
        assert last[0]["attempt"] == last[1]["attempt"] != whole[0]["attempt"]
    with pytest.raises(tierkeep.InvalidError, match="saved by 2 ranks"):
        tierkeep.load(run)
    loaded: dict[str, Any] = tierkeep.load(run, rank=1)
    assert loaded["model"]["weight"].tolist() == whole[1]["model"][0]


STOPPED = """
    import json, sys
    import torch
    import torch.distributed as dist
    import tierkeep

    run, every = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    state = {"x": torch.zeros(1000), "n": 0}
    with tierkeep.Checkpointer(run, every=every, disk_every=10**6, keep_last=1) as ckpt:
        found = ckpt.restore(state)
        begin = found.step if found else 0
        assert not ckpt.stop_requested()
        dist.barrier()
        print("training", flush=True)
        for step in range(begin, begin + 100_000):
            dist.all_reduce(state["x"])
            state["n"] = step + 1
            ckpt.step(step + 1, state)
            if ckpt.stop_requested():
                last = ckpt.save(step + 1, state)
                break
    print(json.dumps({"begin": begin, "end": step + 1, "disk": last.progress().disk}))
"""


def stopped(run: Path, every: int, asked: list[int], delays: list[float]) -> tuple[int, int]:
    """A job of three ranks, some of which get SIGTERM; the steps where it begins and ends."""
    ranks = start(3, STOPPED, run, every)
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "training\n", ended(rank)
    for rank_number, delay in zip(asked, delays, strict=True):
        time.sleep(delay)
        ranks[rank_number].send_signal(signal.SIGTERM)
    results = [ended(rank) for rank in ranks]
    assert [code for code, *_ in results] == [0] * 3, results
    ends = [json.loads(out) for _, out, _ in results]
    assert ends == [ends[0]] * 3
    assert ends[0]["disk"]
    return ends[0]["begin"], ends[0]["end"]


def test_ranks_that_are_asked_to_stop_end_at_the_same_saved_step(run: Path) -> None:
    seed = random.randrange(1_000_000)
    chance = random.Random(seed)
    every = chance.randint(1, 7)
    # One rank gets the signal; then, as from torchrun and Slurm, all do, each a little later.
    one = stopped(run, every, [chance.randrange(3)], [chance.uniform(0, 0.3)])
    every_rank = chance.sample(range(3), 3)
    delays = [chance.uniform(0, 0.3), chance.uniform(0, 0.01), chance.uniform(0, 0.01)]
    all_of_them = stopped(run, every, every_rank, delays)
    assert one[0] == 0 < one[1] == all_of_them[0] < all_of_them[1], seed
    assert one[1] % every == all_of_them[1] % every == 0, seed
    for rank in range(3):
        # Of the last step, and whole on disk.
        assert tierkeep.load(run, rank=rank)["n"] == all_of_them[1], seed


ENVIRONMENTS = {
    "nothing": ({}, (0, 1, "alone")),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, "torchrun")),
    "half of torchrun": ({"RANK": "3"}, (0, 1, "alone")),
    "srun": (
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},
        (2, 4, "srun"),
    ),
    "sbatch alone": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, "alone")),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_rank_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("SLURM_") or variable in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(variable)
    environment, expected = ENVIRONMENTS[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = _ranks.detect(None, None)
    assert (found.rank, found.world_size, found.source) == expected
    assert _ranks.detect(5, 6) == _ranks.Ranks(5, 6, "arguments")


def test_a_rank_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tierkeep.InvalidError, match="RANK = 'zero'"):
        _ranks.detect(None, None)


def test_torch_is_not_imported_to_find_the_rank() -> None:
    code, out, err = ended(
        python("import sys, tierkeep; print([m for m in ('torch', 'numpy') if m in sys.modules])")
    )
    assert (code, out) == (0, "[]\n"), err
    assert sys.version_info >= (3, 11)
