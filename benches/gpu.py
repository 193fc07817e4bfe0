"""What saving and restoring CUDA tensors costs, without an agent and with one.

`python benches/gpu.py [--gib N] [--rounds N]`

The reference is DMA of the same tensors into one pinned buffer of torch's own, or out of it: what
the link to the device gives. Figures are medians of interleaved rounds, printed with the machine as
a table for benches/CUDA.md. Needs a CUDA device; `make bench` runs where there is none.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from agent import serving
from state import tensors
from torch import nn

import tierkeep

DEVICE = "cuda"


def seconds(work: Callable[[], object], *, on_device: bool = True) -> float:
    begun = time.perf_counter()
    work()
    if on_device:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def build(gib: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Transformer blocks in bfloat16 with an AdamW that has taken a step: 2 + 2 + 2 bytes each."""
    width = 2048
    block = 12 * width * width * 6
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ModuleDict(
            {
                "qkv": nn.Linear(width, 3 * width, bias=False),
                "proj": nn.Linear(width, width, bias=False),
                "up": nn.Linear(width, 4 * width, bias=False),
                "down": nn.Linear(4 * width, width, bias=False),
                "norm_1": nn.LayerNorm(width),
                "norm_2": nn.LayerNorm(width),
            }
        )
        for _ in range(max(1, round(gib * 2**30 / block)))
    )
    model.to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return model, optimizer


class Dma:
    """The same tensors into one pinned buffer, and back."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.bytes = sum(t.nbytes for t in tensors)
        buffer = torch.empty(self.bytes + 64 * len(tensors), dtype=torch.uint8, pin_memory=True)
        self.pairs, at = [], 0
        for tensor in tensors:
            there = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self.pairs.append((there, tensor))
            at += -(-tensor.nbytes // 64) * 64
        self.out()
        torch.cuda.synchronize()

    def out(self) -> None:
        for there, here in self.pairs:
            there.copy_(here, non_blocking=True)

    def back(self) -> None:
        with torch.no_grad():
            for there, here in self.pairs:
                here.copy_(there, non_blocking=True)


def row(what: str, measured: str) -> None:
    print(f"| {what} | {measured} |", flush=True)


def now(arguments: dict[str, object], gib: float, rounds: int) -> None:
    model, optimizer = build(gib)
    state = {"model": model, "optim": optimizer}
    reference = Dma(tensors(model, optimizer))
    gigabytes = reference.bytes / 1e9
    ready = time.perf_counter()
    with tierkeep.Checkpointer(**arguments, disk_every=rounds + 2) as ckpt:  # type: ignore[arg-type]
        ckpt.restore(state)
        ckpt.prepare(state)
        first = seconds(partial(ckpt.save, 1, state))
        ready = time.perf_counter() - ready
        pairs, back = [], []
        for step in range(2, rounds + 2):
            pairs.append((seconds(partial(ckpt.save, step, state)), seconds(reference.out)))
        last = rounds + 2
        ckpt.save(last, state).wait("disk", timeout_s=600)
        for _ in range(rounds):
            again = partial(ckpt.restore, state, step=last, rollback=True)
            back.append((seconds(again), seconds(reference.back)))
    stall, dma = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    row(
        f"reference: DMA to the host, {gigabytes:.2f} GB in {len(reference.pairs)} tensors",
        f"{dma * 1e3:.1f} ms, {gigabytes / dma:.1f} GB/s",
    )
    row("save, now, checksum included / DMA", f"{ratio:.2f} ({stall * 1e3:.1f} ms)")
    row("open, make and pin 2 slots, first save", f"{ready:.2f} s; the save {first:.2f} s")
    ratio = statistics.median(a / b for a, b in back)
    took = statistics.median(a for a, _ in back)
    row("restore from RAM into live tensors, checked / DMA", f"{ratio:.2f} ({took * 1e3:.1f} ms)")


def saves(arguments: dict[str, object], gib: float, rounds: int) -> None:
    now(arguments, gib, rounds)
    fresh(arguments, gib)


def fresh(arguments: dict[str, object], gib: float) -> None:
    """The next start: from the nearest tier, into a fresh optimizer."""
    model, _ = build(gib)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    torch.cuda.synchronize()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = memory("VmRSS")
    with tierkeep.Checkpointer(**arguments) as ckpt:  # type: ignore[arg-type]
        state = {"model": model, "optim": optimizer}
        begun = time.perf_counter()
        found = ckpt.restore(state)
        torch.cuda.synchronize()
        took = time.perf_counter() - begun
        assert found is not None
        more = memory("VmHWM") - memory("RssShmem") - before
    row(
        f"restore from {found.tier}, fresh optimizer",
        f"{took * 1e3:.0f} ms, peak host memory beside slots {more:+.0f} MiB",
    )


def memory(what: str) -> float:
    """A line of this process's status, in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what + ":"))


def overlap(arguments: dict[str, object], gib: float, rounds: int) -> None:
    """A save every step beside matrix products, whose number makes a step of some 0.3 s."""
    model, optimizer = build(gib)
    state = {"model": model, "optim": optimizer}
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)

    def compute() -> None:
        for _ in range(150):
            a @ a

    def step() -> None:
        compute()
        optimizer.step()

    plain, saving, returns = [], [], []
    with tierkeep.Checkpointer(  # type: ignore[arg-type]
        **arguments, capture="overlap", disk_every=10**9, slots=3
    ) as ckpt:
        ckpt.restore(state)
        ckpt.guard(optimizer)
        ckpt.prepare(state)
        number = 0

        def with_save() -> None:
            nonlocal number
            number += 1
            call = partial(ckpt.save, number, state)
            returns.append(seconds(call, on_device=False))
            step()

        for _ in range(4):
            seconds(with_save)
        returns.clear()
        for _ in range(rounds):
            plain.append(seconds(lambda: [step() for _ in range(3)]) / 3)
            saving.append(seconds(lambda: [with_save() for _ in range(3)]) / 3)
    lost = statistics.median(b / a for a, b in zip(plain, saving, strict=True)) - 1
    row("overlap: save returns after", f"{statistics.median(returns) * 1e3:.2f} ms")
    row(
        f"overlap: throughput lost, a save every step of {statistics.median(plain):.2f} s",
        f"{lost * 100:.1f} %",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    print(
        f"On {torch.cuda.get_device_name()}, {platform.processor() or platform.machine()}, "
        f"Linux {platform.release()}, torch {torch.__version__}; medians of {options.rounds}."
    )
    for owner in ("embedded", "with an agent"):
        print(f"\n| {owner} | measured |\n|---|---|")
        for part in (saves, overlap):
            with tempfile.TemporaryDirectory() as base, serving(pathlib.Path(base)) as places:
                agent, disk, ram = places
                alone: dict[str, object] = {"agent": False, "ram_dir": ram}
                who = {"agent": str(agent.socket)} if owner == "with an agent" else alone
                arguments = {"destination": disk / "run", **who}
                part(arguments, options.gib, options.rounds)


if __name__ == "__main__":
    main()
