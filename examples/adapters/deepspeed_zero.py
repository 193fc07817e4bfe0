"""DeepSpeed with ZeRO 2 on two processes. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import os
import signal
import socket
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.multiprocessing as mp
from small import STEPS, arguments, data, kill_if_due, model, report
from torch import nn

import tierkeep  # +
import tierkeep.deepspeed  # +

WORLD = 2
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    # An optimizer of torch's: those of DeepSpeed's are compiled when they are first used.
    "zero_allow_untested_optimizer": True,
}


def train(rank: int, port: int) -> None:
    args = arguments()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deepspeed.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # It would be compiled, too.
    deepspeed.init_distributed("gloo")
    net = model()
    torch.manual_seed(rank)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(net.parameters(), lr=1e-2), config=CONFIG
    )
    tierkeep.deepspeed.attach(engine, args.run, own={"rng": tierkeep.Rng()})  # +
    tierkeep.deepspeed.resume(engine, args.run)  # +
    start = engine.global_steps
    if rank == 0:
        print("starts at step", start, flush=True)
    rows, classes = data()[:]
    for step in range(start + 1, STEPS + 1):
        mine = slice(8 * step - 8 + 4 * rank, 8 * step - 4 + 4 * rank)
        loss = nn.functional.cross_entropy(engine(rows[mine]), classes[mine])
        engine.backward(loss)
        engine.step()
        if step % 3 == 0:
            engine.save_checkpoint(args.run)
        kill_if_due(step, args.kill_at)
    if rank == 0:
        print(f"loss {loss.item():.4f}")
        report(net.parameters())
    deepspeed.comm.destroy_process_group()


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        # Without a GPU processes may be forked: imports are the longest part of this.
        mp.start_processes(train, (port,), WORLD, start_method="fork")
    except mp.ProcessExitedException as ended:
        if ended.signal_name != "SIGKILL":
            raise
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
