"""tierkeep keeps the state of a training job alive: in RAM in the time of a memcpy, on disk behind
the training.

    import tierkeep

    state = {"model": model, "optim": optimizer, "sched": scheduler, "rng": tierkeep.Rng()}
    with tierkeep.Checkpointer("/ckpt/llama-7b", every=50) as ckpt:
        found = ckpt.restore(state)
        for step in range(found.step if found else 0, total):
            train(state)
            ckpt.step(step + 1, state)

Everything begins with `Checkpointer`.
"""

from tierkeep import progress
from tierkeep._checkpointer import Checkpointer
from tierkeep._events import Event
from tierkeep._facts import Restored, StepInfo
from tierkeep._load import load
from tierkeep._rng import Rng
from tierkeep._tierkeep import Progress, Save
from tierkeep.errors import (
    BugError,
    CheckpointNotFoundError,
    CorruptError,
    DeadlineError,
    FencedError,
    InvalidError,
    MismatchError,
    TierkeepError,
    UnavailableError,
)

__all__ = [
    "BugError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CorruptError",
    "DeadlineError",
    "Event",
    "FencedError",
    "InvalidError",
    "MismatchError",
    "Progress",
    "Restored",
    "Rng",
    "Save",
    "StepInfo",
    "TierkeepError",
    "UnavailableError",
    "load",
    "progress",
]
