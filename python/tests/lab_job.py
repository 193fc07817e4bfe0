"""Ranks of a real torch.distributed (gloo) job, on one node of a lab.

One process a node imports torch once and forks a rank whenever a line of JSON on its input asks
for one: a job that is started hundreds of times would else spend its time on imports. What a rank
has to say is a line of JSON on the output.

The training is exact: integers are summed over the ranks, so that the state after each step is a
function of the step, the rank and the world, whoever computes it (`expected`).
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import zlib
from typing import Any

import numpy as np

# Numbers of a rank's largest tensor: more than one chunk of 4 MiB.
NUMBERS = 700_000


class State:
    """What a rank trains."""

    def __init__(self, rank: int, numbers: int = NUMBERS) -> None:
        self.weights = np.arange(numbers, dtype=np.int64) * (rank + 1)
        self.momentum = np.zeros(numbers // 10, dtype=np.int64)

    def own(self) -> int:
        """What this rank adds to the sum."""
        return int(self.weights[:64].sum() & 0xFFFF)

    def train(self, step: int, total: int) -> None:
        """One step, in place."""
        self.momentum += total + step
        self.weights *= 3
        self.weights += self.momentum[0] ^ step

    def crc(self) -> int:
        return zlib.crc32(self.momentum.tobytes(), zlib.crc32(self.weights.tobytes()))


def expected(world: int, steps: int, numbers: int = NUMBERS) -> list[list[int]]:
    """The checksum of every rank's state after 0, 1, ... steps."""
    ranks = [State(rank, numbers) for rank in range(world)]
    found = [[state.crc() for state in ranks]]
    for step in range(1, steps + 1):
        total = sum(state.own() for state in ranks)
        for state in ranks:
            state.train(step, total)
        found.append([state.crc() for state in ranks])
    return found


def say(**words: Any) -> None:
    os.write(1, (json.dumps(words) + "\n").encode())


def opened(wish: dict[str, Any]) -> Any:
    """The process group, and the handle."""
    import torch
    import torch.distributed as dist

    import tierkeep

    rank, world = wish["rank"], wish["world"]
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{wish['master']}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=300),
    )
    return tierkeep.Checkpointer(
        wish["destination"],
        agent=wish["agent"],
        replicas=wish["replicas"],
        **wish.get("bucket", {}),
        disk_every=wish.get("disk_every", 5) if wish.get("has_disk", True) else None,
        timeouts_s={"attempt_wait_s": 60, "peer_wait_s": wish.get("peer_wait_s", 60)},
    )


def train(wish: dict[str, Any]) -> None:
    """A rank's life."""
    import torch
    import torch.distributed as dist

    ckpt, rank = opened(wish), wish["rank"]
    state = State(rank, wish.get("numbers", NUMBERS))
    tensors = {
        "weights": torch.from_numpy(state.weights),
        "momentum": torch.from_numpy(state.momentum),
    }
    found = ckpt.restore(tensors)
    step = found.step if found else 0
    say(event="resumed", rank=rank, step=step, crc=state.crc(), tier=found and found.tier)
    waiting: list[Any] = []
    while step < wish["steps"]:
        total = torch.tensor([state.own()], dtype=torch.int64)
        dist.all_reduce(total)
        step += 1
        state.train(step, int(total.item()))
        waiting.append(ckpt.save(step, tensors))
        if wish.get("wait"):
            waiting[-1].wait("peer", 60)
        for save in waiting:
            if save.progress().peer:
                say(event="peer", rank=rank, step=save.step)
            if save.progress().object:
                say(event="object", rank=rank, step=save.step)
        waiting = [save for save in waiting if not save.progress().done]
    ckpt.wait_all("peer", 60)
    say(event="end", rank=rank, step=step, crc=state.crc())
    ckpt.close()


def train_cut(wish: dict[str, Any]) -> None:
    """The life of a rank whose one tensor is cut over all ranks: its numbers are a function of the
    step. `crc` is 1 where all of them are what they should be, on all ranks together.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    ckpt = opened(wish)
    mesh = init_device_mesh("cpu", (wish["world"],))

    def whole(step: int) -> torch.Tensor:
        return torch.arange(wish["numbers"], dtype=torch.int64) * 31 + step

    def made(step: int) -> DTensor:
        return distribute_tensor(whole(step), mesh, [Shard(0)], src_data_rank=None)

    live = made(0)
    found = ckpt.restore({"whole": live})
    step, rank = found.step if found else 0, wish["rank"]
    same = torch.equal(live.full_tensor(), whole(step))
    say(event="resumed", rank=rank, step=step, crc=int(same), tier=found and found.tier)
    while step < wish["steps"]:
        step += 1
        ckpt.save(step, {"whole": made(step)}).wait("peer", 60)
        say(event="peer", rank=rank, step=step)
    say(event="end", rank=rank, step=step, crc=1)
    ckpt.close()


def main() -> None:
    import torch  # noqa: F401  (imported once, for all ranks that are forked)

    import tierkeep  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody asks how a rank ended.
    say(event="ready")
    for line in sys.stdin:
        wish = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            try:
                (train_cut if wish.get("cut") else train)(wish)
            except BaseException as e:
                say(event="failed", rank=wish["rank"], why=f"{type(e).__name__}: {e}")
                os._exit(1)
            os._exit(0)
        say(event="started", rank=wish["rank"], pid=pid)


if __name__ == "__main__":
    main()
