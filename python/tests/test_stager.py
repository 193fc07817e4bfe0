"""The way of CUDA tensors on a machine without a GPU: tensors that say that they lie on one, and
streams and events that are under way for as long as a test says. What only CUDA can show is in
test_cuda.py.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from same import raw

import tierkeep
from tierkeep import _cuda


class Pretended(torch.Tensor):
    """A tensor of the CPU that says that it lies on cuda:0."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda:0"))  # type: ignore[assignment]

    def record_stream(self, stream: object) -> None:
        assert isinstance(stream, Stream)


def pretended(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(Pretended)


class Cuda:
    """What happened, and what is to happen."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.ever = 0
        self.refuses = 0
        self.under_way = threading.Event()
        self.under_way.set()  # Nothing is.
        #: What the main thread's next looks raise.
        self.waits: list[BaseException] = []
        self.capturing = False
        self.log: list[str] = []


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        assert event.recorded is not None
        self.cuda.log.append(f"{self.name} waits for a copy")


class Event:
    cuda: Cuda

    def __init__(self, blocking: bool = False) -> None:
        assert blocking
        self.recorded: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = stream

    def query(self) -> bool:
        assert self.recorded is not None
        assert threading.current_thread() is threading.main_thread()
        if self.cuda.waits:
            raise self.cuda.waits.pop(0)
        return self.cuda.under_way.is_set()

    def synchronize(self) -> None:
        assert self.recorded is not None
        assert self.cuda.under_way.wait(20)


class Runtime:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        assert address not in self.cuda.registered
        if self.cuda.refuses:
            return self.cuda.refuses
        self.cuda.registered[address] = nbytes
        self.cuda.ever += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert any(low <= address < high for low, high in maps())
        if self.cuda.refuses:
            return self.cuda.refuses
        return 713 if self.cuda.registered.pop(address, None) is None else 0

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"


def maps() -> list[tuple[int, int]]:
    rows = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return [(int(low, 16), int(high, 16)) for low, high in rows]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    made = Cuda()
    runtime, current = Runtime(made), Stream(made, "current")
    empty, ones = torch.empty, torch.ones

    def on_cpu(*args: Any, **more: Any) -> torch.Tensor:
        pinned = more.pop("pin_memory", False)
        assert not pinned or str(more["device"]) == "cpu"
        return empty(*args, **more)

    @contextlib.contextmanager
    def stream(one: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(_cuda, "_STAGE_BYTES", 4 << 20)
    monkeypatch.setattr(_cuda, "_GROUP_BYTES", 2 << 20)
    monkeypatch.setattr(Event, "cuda", made, raising=False)
    monkeypatch.setattr(torch, "empty", on_cpu)
    monkeypatch.setattr(torch, "ones", lambda n, device="cpu": ones(n))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(made, "side"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    yield made
    made.under_way.set()


def state_at(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {
        # Two stages of a save, several groups of a restore.
        "big": pretended(torch.randn(4 << 20)),
        "wide": pretended(torch.randn(3, 1 << 20).t()),
        "small": pretended(torch.randn(7).bfloat16()),
        "none": pretended(torch.empty(0, 3)),
        "host": torch.randn(5000),
        "step": step,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    plain = lambda x: raw(x.as_subclass(torch.Tensor)) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return {k: plain(v) for k, v in a.items()} == {k: plain(v) for k, v in b.items()}


def test_out_and_back(run: Path, cuda: Cuda) -> None:
    with tierkeep.Checkpointer(run, disk_every=100) as ckpt:
        ckpt.restore(state_at(0))
        for step in range(1, 4):
            ckpt.save(step, state_at(step))
        assert cuda.log[0] == "side waits for current"
        assert cuda.log[1] == "current waits for a copy"
    assert cuda.ever >= 2
    live = state_at(9)
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(live)
        assert found is not None
        assert (found.step, found.tier, found.damaged) == (3, "ram", ())
    assert same(live, state_at(3))
    del ckpt
    gc.collect()
    assert not cuda.registered


def test_the_optimizers_stream_waits_and_the_cpu_does_not(run: Path, cuda: Cuda) -> None:
    class Owner:
        """As much of an optimizer as is guarded."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.param_groups: list[Any] = [{"params": [tensor]}]
            self.state: dict[Any, Any] = {}

        def register_step_pre_hook(self, hook: Any) -> None:
            self.step = lambda: hook(self, (), {})

    owner = Owner(pretended(torch.ones(1 << 20)))
    state = {"x": pretended(torch.zeros(1 << 20)), "host": torch.zeros(9000)}
    with tierkeep.Checkpointer(run, capture="overlap") as ckpt:
        ckpt.restore(state)
        ckpt.guard(owner)
        # The type of torch's own tensors is what makes one late: this one is pretended.
        save = ckpt.save(1, state)
        cuda.log.clear()
        owner.step()
        assert cuda.log == ["current waits for a copy"]
        ckpt.fence()
        save.wait("ram")
        cuda.capturing = True
        owner.step()  # Nothing is under way: a graph may be captured.
        ckpt.save(2, state)
        with pytest.raises(tierkeep.InvalidError, match="before the capture"):
            owner.step()
        cuda.capturing = False


def test_ctrl_c_during_the_copy_reaches_the_script_and_the_slot_is_kept(
    run: Path, cuda: Cuda
) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.save(1, state_at(1)).wait("disk")
        cuda.under_way.clear()
        cuda.waits = [KeyboardInterrupt()]
        before = set(cuda.registered)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(2, state_at(2))
        # Its copy is still under way: whatever is done, that slot is not let go.
        assert set(cuda.registered) == before
        cuda.under_way.set()
        ckpt.save(2, state_at(2)).wait("disk")
        live = state_at(9)
        ckpt.restore(live, read_only=True)
    assert same(live, state_at(2))


def test_a_copy_that_fails_to_begin_or_to_end_costs_one_save(
    run: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy, calls = torch._foreach_copy_, 0

    def second(*args: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no room for a contiguous copy")
        copy(*args, **more)

    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.save(1, state_at(1)).wait("disk")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", second)
            save = ckpt.save(2, state_at(2))
        with pytest.raises(tierkeep.UnavailableError, match="no room for a contiguous copy"):
            save.wait("ram")
        cuda.waits = [RuntimeError("an illegal memory access")]
        with pytest.raises(tierkeep.UnavailableError, match="an illegal memory access"):
            ckpt.save(3, state_at(3)).wait("ram")
        ckpt.save(4, state_at(4)).wait("disk")
        live = state_at(9)
        ckpt.restore(live, read_only=True)
    assert same(live, state_at(4))
    assert "step 2 was not saved" in caplog.text
    assert "step 3 was not saved" in caplog.text


def test_a_save_within_inference_mode_is_one_like_others(run: Path, cuda: Cuda) -> None:
    state = {"x": pretended(torch.ones(1 << 20))}
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        with torch.inference_mode():
            ckpt.save(1, state)
            ckpt.save(2, state)
        for step in (3, 4, 5):
            ckpt.save(step, state).wait("disk")
        assert ckpt.last_error is None


def test_slots_that_cannot_be_pinned_are_told_once_and_used(
    run: Path, cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    cuda.refuses = 1
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore({"x": pretended(torch.zeros(4))})
        for step in range(1, 5):
            ckpt.save(step, {"x": pretended(torch.full((4,), float(step)))}).wait("disk")
    assert caplog.text.count("could not be pinned (error 1)") == 1
    assert tierkeep.load(run)["x"].tolist() == [4.0] * 4


def test_memory_that_cuda_does_not_give_back_is_not_used_for_anything_else(
    run: Path, cuda: Cuda
) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore({"x": pretended(torch.zeros(1 << 20))})
        ckpt.save(1, {"x": pretended(torch.zeros(1 << 20))}).wait("disk")
        kept = dict(cuda.registered)
        assert kept
        cuda.refuses = 999
    del ckpt
    gc.collect()
    there = maps()
    for address in kept:
        assert any(low <= address < high for low, high in there)


def test_a_new_run_begins_with_the_weights_of_another(
    run: Path, tmp_path: Path, cuda: Cuda
) -> None:
    with tierkeep.Checkpointer(tmp_path / "other") as ckpt:
        ckpt.restore({})
        ckpt.save(7, {"x": torch.arange(1 << 20).float()})
    live = {"x": pretended(torch.zeros(1 << 20))}
    with tierkeep.Checkpointer(run, init_from=tmp_path / "other") as ckpt:
        assert ckpt.restore(live) is None
    assert same(live, {"x": torch.arange(1 << 20).float()})
