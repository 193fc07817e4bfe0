"""What training loses while its saves go to a bucket at a limited rate.

    python benches/uploading.py [--mib 256] [--limit-mb 50] [--seconds 20] [--rounds 7]

One rank trains the same steps in three ways, in turns: without saves; with saves that stay in RAM;
and with saves that go to a server that speaks S3, by no disk, at no more than the limit, a new one
as soon as the one before is there. Those in RAM come as often.

The server is on the same cores, and its part of them is told. On a real host a device computes: so
each step waits here `--device-ms` as for one, after `--threads` have computed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from between import begin, cpu_seconds, machine, say, turn

import tierkeep

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

import servers

MODES = ("none", "ram", "object")
MIB = 1 << 20


class Trainer:
    """One rank, and where it saves to."""

    def __init__(self, work: Path, ram: Path, options: dict[str, str], wishes: Any) -> None:
        self.wishes = wishes
        torch.set_num_threads(wishes.threads)
        self.state = {"w": torch.arange(wishes.mib * MIB // 4, dtype=torch.float32)}
        self.block = torch.randn(512, 512)
        more: dict[str, Any] = {"agent": False, "ram_dir": ram, "slots": 3}
        self.checkpointers = {
            "ram": tierkeep.Checkpointer(work / "run", disk_every=10**9, **more),
            "object": tierkeep.Checkpointer(
                f"s3://{servers.BUCKET}/uploading/run",
                storage_options=options,
                object_bytes_per_second_max=int(wishes.limit_mb * 1e6),
                **more,
            ),
        }
        for ckpt in self.checkpointers.values():
            ckpt.restore(self.state)
        self.step = 0

    def train(self) -> None:
        """One step."""
        for _ in range(self.wishes.matmuls):
            self.block @ self.block
        time.sleep(self.wishes.device_ms / 1e3)
        self.state["w"][:MIB] += 1
        self.step += 1

    def phase(self, mode: str, seconds: float, every_s: float) -> dict[str, Any]:
        """Trains for so long."""
        ckpt = self.checkpointers.get(mode)
        began, cpu, first = time.monotonic(), time.process_time(), self.step
        stalls: list[float] = []
        times: list[float] = []
        save: tierkeep.Save | None = None
        while (now := time.monotonic()) - began < seconds:
            self.train()
            if ckpt is None:
                continue
            if save is not None and mode == "object":
                ready = save.progress().object
            else:
                ready = save is None or now - times[-1] >= every_s
            if ready:
                times.append(time.monotonic())
                save = ckpt.save(self.step, self.state)
                stalls.append(time.monotonic() - times[-1])
        took = time.monotonic() - began
        cpu = time.process_time() - cpu
        if save is not None:
            save.wait(mode, 300)
        return {
            "seconds": took,
            "steps": self.step - first,
            "saves": len(stalls),
            "stall_s": sum(stalls),
            "cores": cpu / took,
            "every_s": (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        }


def measure(trainer: Trainer, server: int, wishes: Any) -> dict[str, Any]:
    """Phases of all modes, in turns; medians, and of the losses of neighbours."""
    alone = wishes.mib * MIB / (wishes.limit_mb * 1e6)
    trainer.phase("ram", 3, 0.5)
    every = trainer.phase("object", max(wishes.seconds, 4 * alone), 0)["every_s"] or alone
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for round_ in range(wishes.rounds):
        for mode in turn(MODES, round_):
            began, before = time.monotonic(), cpu_seconds(server)
            said = trainer.phase(mode, wishes.seconds, every)
            said["server_cores"] = (cpu_seconds(server) - before) / (time.monotonic() - began)
            found[mode].append(said)
        say(f"{round_ + 1} of {wishes.rounds} rounds")
    median = statistics.median
    pace = {mode: [s["steps"] / s["seconds"] for s in said] for mode, said in found.items()}

    def loss(of: str, beside: str) -> float:
        both = zip(pace[of], pace[beside], strict=True)
        return round(100 * (1 - median(a / b for a, b in both)), 2)

    modes = {
        mode: {
            "steps_per_s": round(median(pace[mode]), 2),
            "save_every_s": round(median(s["every_s"] or 0 for s in said), 2),
            "saves": sum(s["saves"] for s in said),
            "stalled_percent": round(median(100 * s["stall_s"] / s["seconds"] for s in said), 3),
            "trainer_cores": round(median(s["cores"] for s in said), 3),
            "server_cores": round(median(s["server_cores"] for s in said), 3),
        }
        for mode, said in found.items()
    }
    return {
        "loss_percent": {
            "uploading, beside saves in RAM": loss("object", "ram"),
            "uploading, beside no saves": loss("object", "none"),
            "saves in RAM, beside no saves": loss("ram", "none"),
        },
        "modes": modes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float, text: str) -> None:
        kind = type(default)
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")

    add("--mib", 256, "state")
    add("--limit-mb", 50.0, "MB/s that go to the bucket at most")
    add("--seconds", 20.0, "of each phase")
    add("--rounds", 7, "of three phases each")
    add("--threads", 1, "that compute")
    add("--matmuls", 2, "of 512 x 512 in each step")
    add("--device-ms", 20.0, "each step waits as for a device")
    wishes = parser.parse_args()
    begin()
    work = Path(tempfile.mkdtemp(prefix="tierkeep-bench-"))
    ram = Path(tempfile.mkdtemp(prefix="tierkeep-bench-", dir="/dev/shm"))
    try:
        with servers.s3(work / "s3", volumes=30) as options:
            trainer = Trainer(work, ram, options, wishes)
            figures = measure(trainer, options.pid, wishes)
            for ckpt in trainer.checkpointers.values():
                ckpt.close()
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(ram, ignore_errors=True)
    print(json.dumps({"machine": machine(), "parameters": vars(wishes), **figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
