"""`replicated=`: what several ranks hold alike is stored once and comes back on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import fingerprint
from test_processes import ended
from test_ranks import start
from torch import nn

import tierkeep
from tierkeep._replicas import rules

SAVERS = [0, 1, 2]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, []),
        (False, []),
        (True, [("*", SAVERS)]),
        ("model/*", [("model/*", SAVERS)]),
        (["model/*", "optim"], [("model/*", SAVERS), ("optim", SAVERS)]),
        ([1, 0], [("*", [0, 1])]),
        ({"rng": False, "a": True, "*": (2, 0)}, [("rng", []), ("a", SAVERS), ("*", [0, 2])]),
        ({}, []),
    ],
)
def test_what_is_said_becomes_rules(said: Any, expected: list[tuple[str, list[int]]]) -> None:
    assert rules(said, SAVERS) == expected


@pytest.mark.parametrize("said", [3, [], ["a", 1], {1: True}, {"a": 3}, {"a": "b"}, [-1, 0]])
def test_what_cannot_be_meant_is_refused(said: Any, run: Path) -> None:
    with pytest.raises(tierkeep.InvalidError, match="replicated = "):
        tierkeep.Checkpointer(run, rank=0, world_size=2, replicated=said)


def test_ranks_that_do_not_save_are_refused(run: Path) -> None:
    for said in ([0, 7], {"a": [1, 2], "*": [0, 3]}):
        with pytest.raises(tierkeep.InvalidError, match="among those that save"):
            tierkeep.Checkpointer(run, rank=0, world_size=3, replicated=said)


def test_one_mapping_for_all_ranks_and_a_pattern_without_a_tensor(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"a": [0, 1], "b": [2, 3], "modle/*": True}
    ckpts = [tierkeep.Checkpointer(run, rank=r, world_size=4, replicated=said) for r in range(4)]
    states = [{"a": np.full(3, r // 2), "b": np.full(3, r // 2)} for r in range(4)]
    for ckpt, state in zip(ckpts, states, strict=True):
        ckpt.restore(state)
    for save in [c.save(1, s) for c, s in zip(ckpts, states, strict=True)]:
        save.wait("disk", 30)
    for ckpt in ckpts:
        ckpt.close()
    assert "no tensor matches modle/*" in caplog.text
    for rank in range(4):
        loaded = tierkeep.load(run, rank=rank)
        assert loaded["a"].tolist() == loaded["b"].tolist() == [rank // 2] * 3


def test_a_module_of_another_run_is_taken_from_whoever_stores_it(run: Path) -> None:
    ckpts = both(run, replicated={"own": False, "*": True})
    model, _ = replica()
    for rank, ckpt in enumerate(ckpts):
        ckpt.restore({})
        ckpt.save(1, {"model": model["model"], "own": np.full(2, rank)}).staged()
    for ckpt in ckpts:
        ckpt.close()
    fresh, _ = replica()
    nn.init.zeros_(fresh["model"][0].weight)
    with tierkeep.Checkpointer(run.parent / "other", init_from=run) as ckpt:
        assert ckpt.restore({"model": fresh["model"]}) is None
    assert fingerprint(fresh["model"].state_dict()) == fingerprint(model["model"].state_dict())
    with (
        tierkeep.Checkpointer(run.parent / "another", init_from=run) as ckpt,
        pytest.raises(tierkeep.MismatchError, match="own: rank 0 and rank 1"),
    ):
        ckpt.restore({"own": np.zeros(2, dtype=int)})


def replica() -> tuple[dict[str, Any], Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer, "step": 0}

    def train() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 16)).square().mean().backward()
        optimizer.step()
        state["step"] += 1

    return state, train


def both(run: Path, **options: Any) -> list[tierkeep.Checkpointer]:
    return [tierkeep.Checkpointer(run, rank=rank, world_size=2, **options) for rank in (0, 1)]


@pytest.mark.parametrize("capture", ["now", "overlap"])
@pytest.mark.parametrize("closed", [False, True], ids=["ram", "disk"])
def test_replicas_come_back_bit_for_bit(run: Path, capture: Any, closed: bool) -> None:
    said = {"mine": False, "*": True}
    options: dict[str, Any] = {"replicated": said, "capture": capture}
    states = [replica() for _ in range(2)]
    ckpts = both(run, **options)
    for rank, (ckpt, (state, train)) in enumerate(zip(ckpts, states, strict=True)):
        assert ckpt.restore(state) is None
        ckpt.guard(state["optim"])
        train()
        state["mine"] = torch.full((3,), float(rank))
    for _ in range(2):
        saves = [c.save(s["step"], s) for c, (s, _) in zip(ckpts, states, strict=True)]
        for save in saves:
            save.wait("disk", 30)
        for _, train in states:
            train()
    for ckpt, (state, _) in zip(ckpts, states, strict=True):
        ckpt.save(state["step"], state)
    for ckpt in ckpts:
        ckpt.wait_all("disk", 30)
        if closed:
            ckpt.close()  # Its RAM is given back. Else the new ones take over.
    expected = [fingerprint(state) for state, _ in states]
    # The two shards together hold the state once.
    bytes_of = {t.data_ptr(): t.nbytes for t in states[0][0]["model"].state_dict().values()}
    payloads = sorted(run.glob(f"{3:020}/*/*.safetensors"))
    stored = sum(path.stat().st_size for path in payloads)
    assert len(payloads) == 2
    assert 3 * sum(bytes_of.values()) < stored < 3 * sum(bytes_of.values()) + 8000
    for rank in (0, 1):
        loaded = tierkeep.load(run, rank=rank)
        assert loaded["mine"].tolist() == [float(rank)] * 3
        assert torch.equal(loaded["model"]["0.weight"], states[0][0]["model"][0].weight)
        assert len(loaded["optim"]["state"]) == 4

    states = [replica() for _ in range(2)]
    ckpts = both(run, **options)
    for rank, (ckpt, (state, _)) in enumerate(zip(ckpts, states, strict=True)):
        state["mine"] = torch.zeros(3)
        found = ckpt.restore(state)
        assert found is not None
        assert (found.step, found.tier) == (3, "disk" if closed else "ram")
        assert fingerprint(state) == expected[rank]
    for ckpt in ckpts:
        ckpt.close()

    # A new run that begins with these weights, with as many ranks.
    fresh, _ = replica()
    nn.init.zeros_(fresh["model"][0].weight)
    with tierkeep.Checkpointer(run.parent / "next", init_from=run) as ckpt:
        assert ckpt.restore(fresh) is None
    assert fingerprint(fresh["model"].state_dict()) == fingerprint(
        states[0][0]["model"].state_dict()
    )


def test_a_difference_names_tensor_and_ranks(run: Path) -> None:
    ckpts = both(run, replicated=True)
    states = [{"w": np.arange(1000.0), "b": np.zeros(3)} for _ in range(2)]
    for ckpt, state in zip(ckpts, states, strict=True):
        ckpt.restore(state)
    states[1]["b"][2] = -0.0
    saves = [c.save(1, s) for c, s in zip(ckpts, states, strict=True)]
    for save in saves:
        with pytest.raises(tierkeep.UnavailableError, match="b has other bytes on rank 1 than"):
            save.wait("ram", 30)
    assert ckpts[0].latest_step() is None
    for ckpt in ckpts:
        with pytest.raises(tierkeep.UnavailableError, match="b has other bytes"):
            ckpt.close()
        assert "b has other bytes on rank 1 than on rank 0" in str(ckpt.last_error)


GROUP = """
    import os, sys
    import torch
    import torch.distributed as dist
    import tierkeep

    dist.init_process_group("gloo")
    pair = None
    for ranks in ([0, 1], [2, 3]):
        group = dist.new_group(ranks)
        pair = group if dist.get_rank() in ranks else pair
    value = float(dist.get_rank() // 2)
    state = {"w": torch.full((1000,), value)}
    with tierkeep.Checkpointer(sys.argv[1], replicated={"w": pair}) as ckpt:
        found = ckpt.restore(state)
        assert state["w"].tolist() == [value] * 1000
        ckpt.save(found.step + 1 if found else 1, state).wait("disk", 60)
        print(found.step if found else 0)
"""


def test_a_process_group_is_a_group_of_ranks(run: Path) -> None:
    for before in ("0", "1"):
        ranks = start(4, GROUP, run)
        results = [ended(rank) for rank in ranks]
        assert [(code, out.strip()) for code, out, _ in results] == [(0, before)] * 4, results
    sizes = [p.stat().st_size for p in run.glob(f"{2:020}/*/*.safetensors")]
    assert len([size for size in sizes if size > 4000]) == 2, sizes
