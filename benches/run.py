"""Every bar of the first release, measured in one run.

`python benches/run.py [--rounds N] [--dir DIR] [--write FILE]`. Figures are medians; ratios are
medians of the ratios of neighbours in time, because machines are shared and drift.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import agent
import safetensors.torch
import torch
from state import Memcpy, gpt_state, tensors

import tierkeep

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(a / b for a, b in pairs)


@contextmanager
def place(base: pathlib.Path) -> Iterator[dict[str, object]]:
    """Arguments of a Checkpointer in directories of its own, removed afterwards."""
    disk = tempfile.mkdtemp(prefix="tierkeep-bench-", dir=base)
    ram = tempfile.mkdtemp(prefix="tierkeep-bench-", dir="/dev/shm")
    try:
        yield {"destination": f"{disk}/run", "ram_dir": ram}
    finally:
        shutil.rmtree(disk)
        shutil.rmtree(ram)


class Table:
    """Lines of (what, bar, measured, met)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, str]] = []

    def add(self, what: str, bar: str, measured: str, met: bool) -> None:
        self.lines.append((what, bar, measured, "yes" if met else "**no**"))
        print(f"{what}: {measured} (bar {bar}) {'ok' if met else 'MISSED'}", flush=True)

    def markdown(self) -> str:
        rows = ["| what | bar | measured | met |", "|---|---|---|---|"]
        return "\n".join(rows + [f"| {' | '.join(line)} |" for line in self.lines])


def open_checkpointer(arguments: dict[str, object], **more: object) -> tierkeep.Checkpointer:
    return tierkeep.Checkpointer(**{**arguments, **more})  # type: ignore[arg-type]


def save_and_restore(table: Table, base: pathlib.Path, rounds: int) -> None:
    """Stall of warm and first saves, restore from RAM, in one process."""
    model, optimizer = gpt_state()
    state = {"model": model, "optim": optimizer}
    reference = Memcpy(tensors(model, optimizer))
    warm, first, back = [], [], []
    # The disk tier would run beside the next save: it has its own lines. Only the last step goes.
    quiet = {"disk_every": rounds + 2}
    for _ in range(max(3, rounds // 3)):
        with place(base) as where, open_checkpointer(where, **quiet) as checkpointer:
            checkpointer.restore(state)
            checkpointer.prepare(state)
            time.sleep(3)
            reference.out()
            first.append((seconds(lambda: checkpointer.save(1, state)), seconds(reference.out)))
            checkpointer.save(2, state)
            for step in range(3, rounds + 3):
                stall = seconds(lambda step=step: checkpointer.save(step, state))
                warm.append((stall, seconds(reference.out)))
            last = rounds + 2
            checkpointer.save(last, state).wait("disk", timeout_s=120)
            for _ in range(rounds):
                took = seconds(partial(checkpointer.restore, state, step=last, rollback=True))
                back.append((took, seconds(reference.back)))
            checkpointer.close(timeout_s=5)
    size = f"{reference.bytes / 2**30:.2f} GiB"
    median = statistics.median
    table.add(
        f"warm save, now, {size}: stall / memcpy",
        "<= 1.05",
        f"{ratio(warm):.2f} ({median(a for a, _ in warm) * 1e3:.0f} ms)",
        ratio(warm) <= 1.05,
    )
    table.add(
        "first save once the arena is ready / memcpy",
        "<= 1.3",
        f"{ratio(first):.2f}",
        ratio(first) <= 1.3,
    )
    table.add(
        "restore from RAM into live tensors, checked / memcpy",
        "<= 1.15",
        f"{ratio(back):.2f} ({median(a for a, _ in back) * 1e3:.0f} ms)",
        ratio(back) <= 1.15,
    )


def restart(table: Table, base: pathlib.Path, rounds: int) -> None:
    """Restore in a fresh process, from RAM and from disk; no bar, for the reader."""
    script = (
        "import sys, time, os; sys.path.insert(0, sys.argv[1])\n"
        "from state import *; import tierkeep\n"
        "model, optimizer = gpt_state(); state = {'model': model, 'optim': optimizer}\n"
        # Before: after a restore slots are made ready, behind.
        "copy = Memcpy(tensors(model, optimizer)); copy.back()\n"
        "begun = time.perf_counter(); copy.back(); reference = time.perf_counter() - begun\n"
        "del copy\n"
        "ckpt = tierkeep.Checkpointer(sys.argv[2], ram_dir=sys.argv[3], disk_every=10**9)\n"
        "begun = time.perf_counter(); found = ckpt.restore(state)\n"
        "took = time.perf_counter() - begun\n"
        "if found is None: ckpt.save(1, state).wait('ram')\n"
        "print(took, reference, found and found.tier, flush=True); os._exit(0)\n"
    )
    figures = []
    with place(base) as where:
        for _ in range(rounds + 1):
            command = [sys.executable, "-c", script, str(HERE), str(where["destination"])]
            output = subprocess.run(
                [*command, str(where["ram_dir"])], capture_output=True, text=True, check=True
            ).stdout.split()
            if output[2] == "ram":
                figures.append((float(output[0]), float(output[1])))
    table.add("restore from RAM in a new process / memcpy", "none", f"{ratio(figures):.2f}", True)


def overlap(table: Table, base: pathlib.Path, rounds: int) -> None:
    """What a save costs the training when its copy runs behind forward and backward."""
    torch.set_num_threads(1)
    model, optimizer = gpt_state()
    state = {"model": model, "optim": optimizer}
    block = torch.randn(1024, 1024)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def forward_and_backward() -> None:
        for _ in range(25):
            block @ block

    def step() -> None:
        forward_and_backward()
        optimizer.step()

    plain, saving, returns = [], [], []
    with place(base) as where:  # noqa: SIM117
        with open_checkpointer(where, capture="overlap", disk_every=10**9) as checkpointer:
            checkpointer.restore(state)
            checkpointer.guard(optimizer)
            checkpointer.prepare(state)
            time.sleep(3)
            number = 0
            for _ in range(3):
                number += 1
                checkpointer.save(number, state)
                step()
            for _ in range(rounds):
                plain.append(seconds(lambda: [step() for _ in range(3)]))

                def with_saves() -> None:
                    nonlocal number
                    for _ in range(3):
                        number += 1
                        returns.append(seconds(partial(checkpointer.save, number, state)))
                        step()

                saving.append(seconds(with_saves))
            checkpointer.close(timeout_s=5)
    lost = statistics.median(b / a for a, b in zip(plain, saving, strict=True)) - 1
    quick = statistics.median(returns) * 1e3
    table.add("overlap: save returns after", "< 1 ms", f"{quick:.2f} ms", quick < 1)
    table.add(
        f"overlap: throughput lost, a save every step of {statistics.median(plain) / 3:.2f} s",
        "<= 5 %",
        f"{lost * 100:.1f} %",
        lost <= 0.05,
    )


def small_tensors(table: Table, base: pathlib.Path, rounds: int) -> None:
    state = {f"t{i}": torch.randn(256) for i in range(2000)}
    with place(base) as where, open_checkpointer(where, disk_every=10**9) as checkpointer:
        checkpointer.restore(state)
        for step in range(1, 4):
            checkpointer.save(step, state).wait("ram")
        took = [
            seconds(lambda step=step: checkpointer.save(step, state).wait("ram"))
            for step in range(4, 4 + 10 * rounds)
        ]
    median = statistics.median(took) * 1e3
    table.add("2,000 tensors of 1 KiB, whole save", "<= 5 ms", f"{median:.2f} ms", median <= 5)


def hot_disk(table: Table, base: pathlib.Path, rounds: int) -> None:
    """A shard whose pages are in the cache, against safetensors' own reader of the same file."""
    model, optimizer = gpt_state()
    state = {f"t{i}": tensor for i, tensor in enumerate(tensors(model, optimizer))}
    live, fresh = [], []
    with place(base) as where:
        with open_checkpointer(where) as checkpointer:
            checkpointer.restore(state)
            checkpointer.save(1, state).wait("disk", timeout_s=300)
        (file,) = pathlib.Path(str(where["destination"])).glob("0*/*/*.safetensors")
        with open(file, "rb") as warm:
            while warm.read(1 << 24):
                pass

        def into_live() -> None:
            loaded = safetensors.torch.load_file(file)
            for name, tensor in state.items():
                tensor.copy_(loaded[name])

        def into_fresh() -> list[torch.Tensor]:
            # It maps the file: the bytes are read when they are touched.
            return [tensor.clone() for tensor in safetensors.torch.load_file(file).values()]

        def ours_fresh() -> object:
            return tierkeep.load(str(where["destination"]), ram_dir=str(where["ram_dir"]))

        with open_checkpointer(where) as checkpointer:
            for _ in range(rounds):
                took = seconds(lambda: checkpointer.restore(state, read_only=True))
                live.append((took, seconds(into_live)))
                gc.collect()
                fresh.append((seconds(ours_fresh), seconds(into_fresh)))
    for what, pairs in (("live tensors", live), ("fresh memory", fresh)):
        table.add(
            f"from disk, hot, into {what} / safetensors.torch.load_file and a copy",
            "<= 1",
            f"{ratio(pairs):.2f} ({statistics.median(a for a, _ in pairs) * 1e3:.0f} ms)",
            ratio(pairs) <= 1,
        )


def memory(table: Table, base: pathlib.Path) -> None:
    """Peak of what a save takes beside its slots: resident memory that is not the arena's."""

    def private() -> int:
        text = pathlib.Path("/proc/self/status").read_text()
        rows = dict(line.split(":", 1) for line in text.splitlines())
        return sum(int(rows[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))

    model, optimizer = gpt_state()
    state = {"model": model, "optim": optimizer}
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, private())

    with place(base) as where, open_checkpointer(where) as checkpointer:
        checkpointer.restore(state)
        before = private()
        watcher = threading.Thread(target=watch)
        watcher.start()
        for step in range(1, 6):
            checkpointer.save(step, state).wait("disk", timeout_s=120)
        stop.set()
        watcher.join()
        slots = sum(f.stat().st_size for f in pathlib.Path(str(where["ram_dir"])).rglob("*.s*"))
    shard = Memcpy(tensors(model, optimizer)).bytes
    extra = (peak - before) / 2**20
    inside = extra <= 64 and slots <= 2 * shard + (64 << 20)
    table.add(
        "peak extra memory beside 2 slots x shard",
        "<= 64 MiB",
        f"{extra:.0f} MiB; files of the ram tier {slots / shard:.2f} x shard",
        inside,
    )


def disk(table: Table, base: pathlib.Path, rounds: int) -> None:
    binary = ROOT / "target/release/bench-disk"
    where = tempfile.mkdtemp(prefix="tierkeep-bench-", dir=base)
    output = subprocess.run(
        [binary, f"{where}/bench", str(2**30), str(rounds)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    shutil.rmtree(where)
    report = json.loads(output)
    size, lines = report["bytes"] / 1e9, report["seconds_and_cpu_seconds"]
    for what, ours, theirs in (
        ("to disk, new file / fio", "put new", "fio write new"),
        ("to disk, overwriting / fio", "put overwrite", "fio write overwrite"),
        ("from disk, cold, checked / fio's read", "restore cold", "fio read"),
    ):
        times = [(b[0], a[0]) for a, b in zip(lines[ours], lines[theirs], strict=True)]
        speed = size / statistics.median(a[0] for a in lines[ours])
        measured = f"{ratio(times):.2f} ({speed:.2f} GB/s)"
        table.add(what, ">= 0.85", measured, ratio(times) >= 0.85)
    for ours in ("put new", "put overwrite"):
        price = statistics.median(c for _, c in lines[ours]) / size
        table.add(f"CPU of {ours}", "<= 0.15 s/GB", f"{price:.3f} s/GB", price <= 0.15)


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{names[0]}, {len(names)} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def apart(name: str, arguments: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """One measurement in a process of its own: none leaves its heap to the next."""
    with tempfile.NamedTemporaryFile(suffix=".json") as lines:
        command = [sys.executable, __file__, "--only", name, "--lines", lines.name]
        command += ["--rounds", str(arguments.rounds), "--dir", str(arguments.dir)]
        subprocess.run(command, check=True)
        return [tuple(line) for line in json.loads(pathlib.Path(lines.name).read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dir", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--only", help="names of measurements, joined by commas")
    parser.add_argument("--lines", type=pathlib.Path, help="write the table's lines there, as JSON")
    parser.add_argument("--write", type=pathlib.Path, help="write the table to this file")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    table, base, rounds = Table(), arguments.dir, arguments.rounds
    torch.set_num_threads(1)
    measurements: dict[str, Callable[[], None]] = {
        "save": lambda: save_and_restore(table, base, rounds),
        "overlap": lambda: overlap(table, base, rounds),
        "small": lambda: small_tensors(table, base, rounds),
        "restart": lambda: restart(table, base, rounds),
        "hot": lambda: hot_disk(table, base, rounds),
        "memory": lambda: memory(table, base),
        "disk": lambda: disk(table, base, rounds),
        "agent": lambda: agent.measure(table, base, rounds),
    }
    if arguments.only is not None:
        for name in arguments.only.split(","):
            measurements[name]()
    else:
        for name in measurements:
            table.lines += apart(name, arguments)
    if arguments.lines is not None:
        arguments.lines.write_text(json.dumps(table.lines))
    if arguments.write is not None:
        text = (
            "# Measured\n\n"
            f"On {machine()}; medians of {rounds} or more, ratios of neighbours in one run "
            "(`make bench`).\nThe reference is memcpy of the same tensors into warm shared memory, "
            f"one thread.\n\n{table.markdown()}\n"
        )
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
