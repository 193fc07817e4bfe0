"""Several ranks: found, agreed, killed together and resumed together."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import ended, python

import tierkeep

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
    source = "torch.distributed" if group else "RANK and WORLD_SIZE"
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


def test_torch_is_not_imported_to_find_the_rank() -> None:
    code, out, err = ended(
        python("import sys, tierkeep; print([m for m in ('torch', 'numpy') if m in sys.modules])")
    )
    assert (code, out) == (0, "[]\n"), err
    assert sys.version_info >= (3, 11)


# -- ranks that do not save ------------------------------------------------------------------

REPLICATED = """
    import json, os, signal, sys
    import torch
    import torch.distributed as dist
    import tierkeep

    run, stop, savers = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    # As DDP would: one model on all ranks, each with data of its own.
    model = torch.nn.Linear(3, 3)
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer}
    with tierkeep.Checkpointer(run, every=2, ranks=savers) as ckpt:
        found = ckpt.restore(state)
        begin = found.step if found else 0
        for step in range(begin, 8):
            torch.manual_seed(1000 * step + rank)
            loss = model(torch.randn(2, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
            optimizer.step()
            save = ckpt.step(step + 1, state)
            if save is not None:
                save.staged().wait("ram", 60).wait("ram", 60, scope="shard")
                if not (stop and step + 1 >= stop):
                    save.wait("disk", 60)
            if stop and step + 1 == stop:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
        counters = ckpt.counters()
        saved = {"saves": counters["saves"], "bytes": counters["captured_bytes"]}
    print(json.dumps({"begin": begin, "model": [p.tolist() for p in model.parameters()],
                      "moments": [s["exp_avg"].tolist() for s in optimizer.state.values()],
                      **saved}))
"""


@pytest.mark.parametrize("savers", [[0], [1]])
def test_all_ranks_restore_what_one_of_them_saved(
    run: Path, ram: Path, tmp_path: Path, savers: list[int]
) -> None:
    def job(where: Path, stop: int) -> list[dict[str, Any]]:
        results = [ended(rank) for rank in start(3, REPLICATED, where, stop, json.dumps(savers))]
        # Who is killed first may break another's barrier before that is killed too.
        ended_well = [code == 0 for code, *_ in results]
        assert ended_well == [not stop] * 3, results
        return [] if stop else [json.loads(out) for _, out, _ in results]

    whole = job(tmp_path / "whole", 0)
    job(run, 6)
    last = job(run, 0)
    assert [r["begin"] for r in last] == [6] * 3
    for key in ("model", "moments"):
        assert [r[key] for r in last] == [whole[0][key]] * 3
    assert [r["saves"] for r in last] == [int(rank in savers) for rank in range(3)]
    assert [r["bytes"] > 0 for r in last] == [rank in savers for rank in range(3)]
    shards = {path.name[:11] for place in (run, ram) for path in place.rglob("rank-*.safetensors")}
    assert shards == {f"rank-{savers[0]:06}"}
    loaded: dict[str, Any] = tierkeep.load(run)
    assert loaded["model"]["weight"].tolist() == whole[2]["model"][0]


def test_a_wait_on_a_rank_that_does_not_save_names_those_that_should(run: Path) -> None:
    state = {"x": torch.ones(3)}
    made = [
        tierkeep.Checkpointer(run, rank=rank, world_size=3, ranks=[0, 1], disk_every=2)
        for rank in range(3)
    ]
    lead, second, other = made
    for ckpt in made:
        assert ckpt.restore(state) is None
    other.prepare(state)
    save = other.save(1, {"anything": object()})
    assert save.staged() is save
    lead.save(1, state)
    with pytest.raises(tierkeep.DeadlineError, match=r"step 1 in the ram tier.*missing rank 1"):
        save.wait("ram", 2)
    assert not save.progress().done
    second.save(1, state)
    save.wait("ram", 30).wait("ram", 30, "shard")
    assert (save.progress().bytes, save.progress().done) == (0, True)
    with pytest.raises(tierkeep.InvalidError, match="does not go to disk"):
        save.wait("disk")
    saves = [ckpt.save(2, state) for ckpt in made]
    assert saves[2].is_due_for_disk
    assert saves[2].wait("disk", 30).progress().disk
    for ckpt in made:
        ckpt.close(30)
    assert [info.step for info in made[2].steps() if info.sealed] == [2]


def test_a_rank_that_does_not_save_only_reads(run: Path) -> None:
    def open_all() -> list[tierkeep.Checkpointer]:
        return [tierkeep.Checkpointer(run, rank=r, world_size=4, ranks=[2, 1]) for r in range(4)]

    made = open_all()
    for rank in (1, 0, 2, 3):
        assert made[rank].restore({"x": torch.zeros(1)}) is None
    assert made[3].settings["savers"] == [1, 2]
    for rank, ckpt in enumerate(made):
        ckpt.save(1, {"x": torch.tensor([float(rank)])})
    for ckpt in made:
        ckpt.close()
    made = open_all()
    for how in ({"read_only": True}, {}):
        for rank in (1, 0, 2, 3):
            live = {"x": torch.zeros(1)}
            found = made[rank].restore(live, **how)  # type: ignore[arg-type]
            assert found is not None
            assert (found.step, live["x"].item()) == (1, [1.0, 1.0, 2.0, 2.0][rank])
    for ckpt in made:
        ckpt.close()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([], r"ranks = \[\]: at least one"),
        ([0, 2], r"ranks = \[0, 2\]: there is no rank 2, world_size is 2"),
        ([-1], r"ranks = \[-1\]: there is no rank -1"),
        ([1, 0, 1], r"ranks = \[0, 1, 1\]: rank 1 is there twice"),
        (0, r"ranks = 0: several ranks, as in \[0\]"),
    ],
)
def test_ranks_that_cannot_be_are_named(run: Path, ranks: Any, message: str) -> None:
    with pytest.raises(tierkeep.InvalidError, match=message):
        tierkeep.Checkpointer(run, rank=0, world_size=2, ranks=ranks)


def test_ranks_that_were_told_different_lists_are_refused_with_both(run: Path) -> None:
    lead = tierkeep.Checkpointer(run, rank=0, world_size=3, ranks=[0])
    assert lead.restore({}) is None
    other = tierkeep.Checkpointer(run, rank=2, world_size=3, ranks=[0, 1])
    with pytest.raises(tierkeep.InvalidError, match=r"ranks \[0\] save, rank 2 says \[0, 1\]"):
        other.restore({})
    lead.close()
    other.close()
