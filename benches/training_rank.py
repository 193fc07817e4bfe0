"""One rank of `training.py`: it trains for as long as it is told, and says how far it came.

A step is some work on the CPU, a sum over all ranks through the nodes' network, and a wait as for a
device. The wish is JSON, the first argument; what to train with is a line of JSON on the input.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tierkeep

MIB = 1 << 20

# Where a rank's own wishes go in what is summed: that it is time to end, that it could save.
END, READY = 0, 1


def sent_bytes() -> int:
    """What this node has sent so far."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[8])


class Trainer:
    """What a rank trains, and where it saves to."""

    def __init__(self, wish: dict[str, Any]) -> None:
        self.wish = wish
        self.world = wish["world"]
        self.leads = wish["rank"] == 0
        self.state = {"w": torch.arange(wish["mib"] * MIB // 4, dtype=torch.float32)}
        self.bucket = torch.zeros(max(2, int(wish["reduce_mib"] * MIB) // 4))
        self.block = torch.randn(512, 512)
        # As many copies as the name says; both keep nothing on disk.
        self.checkpointers = {
            mode: tierkeep.Checkpointer(
                f"{wish['destination']}-{mode}",
                agent=wish["agent"],
                replicas=replicas,
                slots=3,
                disk_every=10**9,
            )
            for mode, replicas in (("ram", 0), ("peer", 1))
        }
        for ckpt in self.checkpointers.values():
            ckpt.restore(self.state)
        self.step = 0

    def train(self, ends: bool, ready: bool) -> tuple[bool, bool]:
        """One step; whether all end now, and whether all can save."""
        for _ in range(self.wish["matmuls"]):
            self.block @ self.block
        self.bucket.zero_()
        self.bucket[END], self.bucket[READY] = float(ends), float(ready)
        dist.all_reduce(self.bucket)
        if self.wish["device_ms"]:
            time.sleep(self.wish["device_ms"] / 1e3)
        self.state["w"][: len(self.bucket)] += self.bucket
        self.step += 1
        return bool(self.bucket[END] > 0), bool(self.bucket[READY] >= self.world)

    def phase(self, mode: str, seconds: float, every_s: float) -> dict[str, Any]:
        """Trains for so long. `peer`: a save begins once the one before is on the other node;
        `ram`: every so many seconds; `none`: never.
        """
        ckpt = self.checkpointers.get(mode)
        dist.barrier()
        began, sent, first = time.monotonic(), sent_bytes(), self.step
        stalls: list[float] = []
        times: list[float] = []
        failed = 0
        save: tierkeep.Save | None = None
        over = False
        while not over:
            now = time.monotonic()
            ready = ckpt is not None
            if save is not None and mode == "peer":
                seen = save.progress()
                ready = seen.peer or seen.done
            elif save is not None:
                ready = now - times[-1] >= every_s
            over, all_ready = self.train(self.leads and now - began >= seconds, ready)
            if ckpt is not None and all_ready and not over:
                failed += save is not None and save.progress().error is not None
                times.append(time.monotonic())
                save = ckpt.save(self.step, self.state)
                stalls.append(time.monotonic() - times[-1])
        took = time.monotonic() - began
        sent = sent_bytes() - sent
        if save is not None:
            save.wait("peer" if mode == "peer" else "ram", 300)
        dist.barrier()
        return {
            "mode": mode,
            "seconds": took,
            "steps": self.step - first,
            "saves": len(stalls),
            "failed": failed,
            "stall_s": sum(stalls),
            "every_s": (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            "sent_bytes": sent,
        }

    def close(self) -> None:
        for ckpt in self.checkpointers.values():
            ckpt.close()


def main() -> None:
    wish = json.loads(sys.argv[1])
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    torch.set_num_threads(wish["threads"])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{wish['master']}",
        rank=wish["rank"],
        world_size=wish["world"],
        timeout=datetime.timedelta(seconds=300),
    )
    trainer = Trainer(wish)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.phase(**json.loads(line))), flush=True)
    trainer.close()


if __name__ == "__main__":
    main()
