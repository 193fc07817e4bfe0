"""One rank of a small training job: the program that the demo starts, kills and starts again.

Nothing in here knows that it will be killed. What tierkeep asks of a training script is in
`main`: the state, the `with`, `restore` and `step`. The rest is an ordinary PyTorch job, and a
diary from which the demo draws its table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import Gpt, Text
from torch import nn

import tierkeep

WARMUP_STEPS = 20


class Trainer:
    """The model, what trains it, and one step of training."""

    def __init__(self, seed: int, rank: int, world: int) -> None:
        self.seed, self.rank, self.world = seed, rank, world
        self.text = Text()
        torch.manual_seed(seed)
        self.model = Gpt(self.text.alphabet_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
        )
        # The ranks start with the same weights, and from here on drop different neurons.
        torch.manual_seed(seed + 1 + rank)

    def train(self, step: int) -> float:
        """Does the step after `step` completed ones; returns this rank's loss."""
        inputs, targets = self.text.batch(self.seed, step, self.rank)
        self.optimizer.zero_grad()
        loss = self.model(inputs, targets)
        loss.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def _average_gradients(self) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def fingerprint(self) -> str:
        """A hash of every weight and every moment: what the losses do not show, this does."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            moments = self.optimizer.state[parameter]
            for tensor in (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"]):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Diary:
    """What happened, one JSON line each, written at once: the process may be killed after any."""

    def __init__(self, path: Path, rank: int) -> None:
        self.file = path.open("a", buffering=1)
        self.rank = rank

    def note(self, kind: str, **facts: object) -> None:
        self.file.write(json.dumps({"kind": kind, **facts}) + "\n")

    def tell(self, line: str) -> None:
        """Says something to whoever started this process. One rank is enough."""
        if self.rank == 0:
            print(line, flush=True)


def main() -> None:
    options = arguments()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))

    trainer = Trainer(options.seed, rank, world)
    model, optimizer, scheduler = trainer.model, trainer.optimizer, trainer.scheduler
    diary = Diary(options.diary / f"rank-{rank}.jsonl", rank)

    state = {"model": model, "optim": optimizer, "sched": scheduler, "rng": tierkeep.Rng()}
    with tierkeep.Checkpointer(options.dest, every=options.every) as ckpt:
        began = time.perf_counter()
        found = ckpt.restore(state)
        note_restore(diary, found, time.perf_counter() - began)
        for step in range(found.step if found else 0, options.steps):
            loss = trainer.train(step)
            diary.note("loss", step=step + 1, loss=loss.hex())
            due = (step + 1) % options.every == 0
            diary.tell(f"{'due' if due else 'step'} {step + 1} {loss:.4f}")
            began = time.perf_counter()
            ckpt.step(step + 1, state)
            if due:
                diary.note("save", step=step + 1, stall_ms=1e3 * (time.perf_counter() - began))

    diary.note("end", fingerprint=trainer.fingerprint())
    dist.destroy_process_group()


def note_restore(diary: Diary, found: tierkeep.Restored | None, seconds: float) -> None:
    step, tier = (found.step, found.tier) if found else (0, None)
    diary.note("start", step=step, tier=tier, seconds=seconds)
    diary.tell(f"start {step} {tier}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dest", help="where checkpoints go: a directory, named as the run")
    parser.add_argument("--diary", type=Path, required=True, help="a directory for the diary")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="save each so many steps")
    parser.add_argument("--seed", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
