"""What it costs to say what a checkpoint has: 5,000 tensors on 8 ranks, through torch's planner and
its files, through torch's planner and tierkeep, and through a `Checkpointer`, which plans nothing.

    python benches/metadata.py [--ranks 8] [--tensors 5000] [--rounds 5]

Medians over the rounds, which take turns; of each save the slowest rank counts. The tensors are
small, so that planning, metadata and commit are all there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rank_of(wish: dict[str, Any], rank: int) -> None:
    """One rank: a line of JSON for each save."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    import tierkeep
    import tierkeep.torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", wish["port"], wish["ranks"], is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=wish["ranks"])
    mesh = init_device_mesh("cpu", (wish["ranks"],))
    state = {
        f"layers.{i}.weight": DTensor.from_local(torch.randn(32), mesh, [Shard(0)], run_check=False)
        for i in range(wish["tensors"])
    }
    root = Path(wish["root"])
    planned: list[float] = []
    wrapper = state_dict_saver._DistWrapper
    was = wrapper.reduce_scatter

    def timed(self: Any, step: str, *rest: Any) -> Any:
        begun = time.perf_counter()
        result = was(self, step, *rest)
        planned.append(time.perf_counter() - begun)
        return result

    wrapper.reduce_scatter = timed  # type: ignore[method-assign]
    ckpt = tierkeep.Checkpointer(root / "checkpointer", slots=3)
    ckpt.restore(state)

    def torchs(step: int) -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(root / "torch" / f"step-{step}"))

    def ours(step: int) -> None:
        dcp.save(state, storage_writer=tierkeep.torch.StorageWriter(root / "dcp" / f"step-{step}"))

    def alone(step: int) -> None:
        ckpt.save(step, state).wait("disk", 120)

    ways: dict[str, Callable[[int], None]] = {"torch": torchs, "dcp": ours, "checkpointer": alone}
    for step in range(1, wish["rounds"] + 2):
        for name, save in ways.items():
            planned.clear()
            dist.barrier()
            begun = time.perf_counter()
            save(step)
            took = time.perf_counter() - begun
            if step > 1:  # The first opens and makes.
                line = {"way": name, "step": step, "rank": rank, "seconds": took}
                print(json.dumps({**line, "planning": sum(planned)}), flush=True)
    ckpt.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tensors", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    wish = vars(parser.parse_args())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        wish["port"] = probe.getsockname()[1]
    wish["root"] = tempfile.mkdtemp(prefix="tierkeep-bench-")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(rank), json.dumps(wish)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(wish["ranks"])
    ]  # fmt: skip
    lines = [json.loads(line) for rank in ranks for line in rank.communicate()[0].splitlines()]
    shutil.rmtree(wish["root"], ignore_errors=True)
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed")

    def median(way: str, what: str) -> float:
        steps = {line["step"] for line in lines}
        of = [line for line in lines if line["way"] == way]
        slowest = [max(line[what] for line in of if line["step"] == step) for step in steps]
        return statistics.median(slowest)

    ways = ("torch", "dcp", "checkpointer")
    result = {way: {"save_s": round(median(way, "seconds"), 4)} for way in ways}
    result["torch"]["of_it_planning_s"] = round(median("torch", "planning"), 4)
    result["dcp"]["of_it_planning_s"] = round(median("dcp", "planning"), 4)
    print(json.dumps({"ranks": wish["ranks"], "tensors": wish["tensors"], **result}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_of(json.loads(sys.argv[3]), int(sys.argv[2]))
    else:
        main()
