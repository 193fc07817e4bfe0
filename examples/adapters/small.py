"""What the examples beside this file share: a small model, data that is the same at every start,
and the kill. Nothing in here is about tierkeep.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from collections.abc import Iterable

import torch
from torch import nn

WIDTH, CLASSES, ROWS, BATCH = 16, 4, 192, 8
#: Steps of the whole training: the data, once.
STEPS = ROWS // BATCH


def arguments() -> argparse.Namespace:
    """`run`, and the step after which the process kills itself, if it is to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("--kill-at", type=int, default=0, help="SIGKILL after so many steps")
    return parser.parse_args()


def kill_if_due(step: int, at: int) -> None:
    """The end that nobody can catch."""
    if step == at:
        os.kill(os.getpid(), signal.SIGKILL)


def model() -> nn.Sequential:
    """Dropout makes every step depend on the random numbers, too."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES))


def data() -> torch.utils.data.TensorDataset:
    """Rows of which the class can be learned."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(ROWS, WIDTH, generator=generator)
    return torch.utils.data.TensorDataset(rows, rows[:, :CLASSES].argmax(dim=1))


def report(parameters: Iterable[torch.Tensor]) -> None:
    """The line by which two trainings are compared, bit for bit."""
    digest = hashlib.sha256()
    for tensor in parameters:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    print("weights", digest.hexdigest())
