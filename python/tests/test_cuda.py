"""Tensors on a CUDA device: out by DMA behind the training, and back; alone and with an agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

import pytest
import torch
from agents import Agent
from same import fingerprint

import tierkeep

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="NOT TESTED: CUDA tensors through pinned slots; this machine has no GPU",
)

Capture = Literal["now", "overlap"]
captures = pytest.mark.parametrize("capture", ["now", "overlap"])


@pytest.fixture(params=["embedded", "agent"], autouse=True)
def owner(request: pytest.FixtureRequest) -> str:
    """Who has the slots: with an agent they are mapped, and pinned, from descriptors it passes."""
    if request.param == "agent":
        request.getfixturevalue("agent")
    return str(request.param)


def make(width: int = 512) -> dict[str, Any]:
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    return {"model": model, "optim": optimizer, "rng": tierkeep.Rng(), "host": torch.zeros(4096)}


def train(state: dict[str, Any]) -> None:
    model, optimizer = state["model"], state["optim"]
    optimizer.zero_grad()
    width = model[0].in_features
    model(torch.randn(64, width, device="cuda")).square().mean().backward()
    optimizer.step()
    state["host"] += 1


@captures
def test_cuda_tensors_are_saved_as_they_were(run: Path, capture: Capture) -> None:
    state = make()
    expected = None
    with tierkeep.Checkpointer(run, capture=capture) as ckpt:
        ckpt.restore(state)
        ckpt.guard(state["optim"])
        for step in range(4):
            train(state)
            torch.cuda.synchronize()
            expected = fingerprint(state)
            ckpt.save(step + 1, state)
            train(state)
    live = make()
    train(live)
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(live)
        assert found is not None
        assert found.step == 4
        assert fingerprint(live) == expected


@captures
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_fresh_process_goes_on_with_the_same_bits(run: Path, capture: Capture, tier: str) -> None:
    state = make()
    # A run whose end is on disk gives its memory back.
    every = 1 if tier == "disk" else 100
    with tierkeep.Checkpointer(run, capture=capture, disk_every=every) as ckpt:
        ckpt.restore(state)
        ckpt.guard(state["optim"])
        for step in range(3):
            train(state)
            ckpt.save(step + 1, state)
    fresh = make()  # No moments yet.
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(fresh)
        assert found is not None
        assert found.tier == tier
    moments = [v for s in fresh["optim"].state.values() for k, v in s.items() if k != "step"]
    assert len(moments) == 12
    assert all(m.is_cuda for m in moments)
    assert all(not s["step"].is_cuda for s in fresh["optim"].state.values())
    for one in (state, fresh):
        torch.manual_seed(5)
        for _ in range(3):
            train(one)
    assert fingerprint(fresh) == fingerprint(state)


@captures
def test_what_changes_at_once_after_a_save_does_not_reach_it(run: Path, capture: Capture) -> None:
    # 256 MiB of parameters: the DMA is under way long after `save` has returned.
    big = torch.nn.Parameter(torch.ones(64 << 20, device="cuda"))
    buffer = torch.zeros(8 << 20, device="cuda")
    optimizer = torch.optim.SGD([big], lr=1.0)
    state = {"big": big, "buffer": buffer, "optim": optimizer}
    big.grad = torch.ones_like(big)
    with tierkeep.Checkpointer(run, capture=capture, slots=3, keep_last=9) as ckpt:
        ckpt.restore(state)
        ckpt.guard(optimizer)
        for step in range(1, 7):
            ckpt.save(step, state)
            buffer += 1  # Nobody's: it was copied first, and this stream waits for that.
            optimizer.step()  # Its stream waits for the rest.
            ckpt.wait_all("disk")
    for step in range(1, 7):
        saved = tierkeep.load(run, step)
        assert bool((saved["big"] == 2 - step).all()), step
        assert bool((saved["buffer"] == step - 1).all()), step


def test_the_copy_follows_the_stream_that_is_current(run: Path) -> None:
    tensor = torch.zeros(32 << 20, device="cuda")
    side = torch.cuda.Stream()
    with tierkeep.Checkpointer(run) as ckpt, torch.cuda.stream(side):
        ckpt.restore({"x": tensor})
        for step in range(1, 4):
            for _ in range(200):
                tensor += 1
            ckpt.save(step, {"x": tensor})
    assert bool((tierkeep.load(run)["x"] == 600).all())


@captures
def test_every_form_of_tensor_comes_back(run: Path, capture: Capture) -> None:
    base = torch.randn(64, 48, device="cuda")
    owner = torch.nn.Parameter(torch.randn(1000, device="cuda").half())
    state: dict[str, Any] = {
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "tied": base.t(),
        "scalar": torch.tensor(3.5, device="cuda"),
        "empty": torch.empty(0, 4, device="cuda"),
        "bf16": base.bfloat16(),
        "fp8": base.to(torch.float8_e4m3fn),
        "bool": base > 0,
        "complex": torch.view_as_complex(base.reshape(-1, 24, 2)),
        "int64": torch.arange(7, device="cuda"),
        "host": torch.randn(5000),
        "owner": owner,
    }
    optimizer = torch.optim.SGD([owner], lr=0.1)
    with tierkeep.Checkpointer(run, capture=capture) as ckpt:
        ckpt.restore(state)
        ckpt.guard(optimizer)
        ckpt.save(1, state)
        expected = fingerprint(state)
    live = {k: torch.zeros_like(v, memory_format=torch.preserve_format) for k, v in state.items()}
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(live)
    assert fingerprint(live) == expected
    assert all(live[name].device == state[name].device for name in state)


def test_slots_are_pinned_and_a_state_that_grows_gets_new_ones(run: Path) -> None:
    with tierkeep.Checkpointer(run, keep_last=9) as ckpt:
        ckpt.restore({"x": torch.zeros(1 << 20, device="cuda")})
        for step, size in enumerate([1 << 20, 1 << 20, 1 << 22, 1 << 22, 10, 10], 1):
            tensor = torch.full((size,), float(step), device="cuda")
            ckpt.save(step, {"x": tensor}).wait("disk")
            views = [view for _, views in ckpt._stager._views.values() for view in views]
            assert views
            assert all(view.is_pinned() for view in views)
    for step, size in enumerate([1 << 20, 1 << 20, 1 << 22, 1 << 22, 10, 10], 1):
        saved = tierkeep.load(run, step)["x"]
        assert saved.shape == (size,)
        assert bool((saved == step).all())


def test_memory_that_cannot_be_pinned_is_told_and_changes_nothing(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt = tierkeep.Checkpointer(run)
    # No memory is there: what the driver says in a container that forbids to pin.
    stager = ckpt._stager
    pin = stager.pin
    stager.pin = lambda device, address, nbytes: pin(device, 4096, nbytes)  # type: ignore[method-assign]
    tensor = torch.randn(1 << 20, device="cuda")
    with ckpt:
        ckpt.restore({"x": tensor})
        ckpt.save(1, {"x": tensor}).wait("disk")
        torch.cuda.synchronize()
        tensor + 1  # The refusal is not a later call's error.
    assert "could not be pinned" in caplog.text
    assert torch.equal(tierkeep.load(run)["x"], tensor.cpu())


def test_a_live_tensor_of_another_device_takes_the_bytes(run: Path) -> None:
    state = make(64)
    train(state)
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 64)
    )
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore({"model": model}, include=["model"], read_only=True, strict=False)
    assert found is not None
    assert fingerprint(model) == fingerprint(state["model"])


KILLED = """
    import sys, torch, tierkeep
    path, capture = sys.argv[1:]
    big = torch.nn.Parameter(torch.zeros(16 << 20, device="cuda"))
    optimizer = torch.optim.SGD([big], lr=1.0, maximize=True)
    big.grad = torch.ones_like(big)
    state = {"big": big, "optim": optimizer}
    ckpt = tierkeep.Checkpointer(path, capture=capture)
    found = ckpt.restore(state)
    ckpt.guard(optimizer)
    step = found.step if found else 0
    values = torch.unique(big).tolist()
    assert values == [step], (values, step)
    print(step, flush=True)
    while True:
        optimizer.step()
        step += 1
        ckpt.save(step, state)
"""


@captures
def test_killed_at_any_moment_the_newest_whole_checkpoint_comes_back(
    run: Path, capture: Capture
) -> None:
    reached = []
    for delay in (0.05, 0.11, 0.23, 0.0):
        process = subprocess.Popen(
            [sys.executable, "-c", dedent(KILLED), str(run), capture],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.strip().isdigit(), process.stderr.read()
        reached.append(int(line))
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    assert reached[0] == 0
    assert reached == sorted(reached)
    assert reached[-1] > 0


@captures
@pytest.mark.parametrize("owner", ["agent"], indirect=True)
def test_an_agent_that_is_upgraded_costs_no_checkpoint_and_no_pinned_slot(
    run: Path, agent: Agent, capture: Capture
) -> None:
    big = torch.nn.Parameter(torch.zeros(16 << 20, device="cuda"))
    optimizer = torch.optim.SGD([big], lr=1.0, maximize=True)
    big.grad = torch.ones_like(big)
    with tierkeep.Checkpointer(run, capture=capture, keep_last=9) as ckpt:
        ckpt.restore({"big": big, "optim": optimizer})
        ckpt.guard(optimizer)
        pinned = None
        for step in range(1, 7):
            optimizer.step()
            ckpt.save(step, {"big": big, "optim": optimizer})
            if step in (2, 4):
                agent.stop(signal.SIGTERM if step == 2 else signal.SIGKILL)
                agent.start()
            views = [view for _, views in ckpt._stager._views.values() for view in views]
            assert views
            assert all(view.is_pinned() for view in views)
            if step == 3:
                pinned = {view.data_ptr() for view in views}
        assert pinned == {view.data_ptr() for view in views}
        ckpt.wait_all("disk")
        steps = [info.step for info in ckpt.steps()]
    assert steps[-1] == 6
    for step in steps:
        assert bool((tierkeep.load(run, step)["big"] == step).all()), step
