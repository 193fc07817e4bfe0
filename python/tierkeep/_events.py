"""What happens behind, told to `logging` and to callbacks by a thread of Python's.

Rust never calls Python: this thread pulls. It holds neither the handle nor the Checkpointer, so
that both can end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tierkeep._tierkeep import Events

logger = logging.getLogger("tierkeep")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# How long the thread sits in one wait. An event ends it at once.
_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        severity: `"info"`, `"warning"` or `"error"`.
        kind: a fixed word: `"restored"`, `"repaired"`, `"save_failed"`, `"skipped"`, ...
        text: one sentence.
        step: completed training steps that it is about.
        rank: the rank that it happened to.
    """

    severity: Literal["info", "warning", "error"]
    kind: str
    text: str
    step: int | None
    rank: int


Callback = Callable[[Event], object]


class Teller:
    """The thread of one handle."""

    def __init__(self, events: Events, rank: int, world_size: int) -> None:
        self.callbacks: list[Callback] = []
        arguments = (events, self.callbacks, rank, f"rank {rank}: " if world_size > 1 else "")
        self._thread = threading.Thread(
            target=_tell_all, args=arguments, name="tierkeep-events", daemon=True
        )
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits until all events of a closed handle are told."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)


def _tell_all(events: Events, callbacks: list[Callback], rank: int, prefix: str) -> None:
    while True:
        try:
            row = events.next(_SECONDS)
        except StopIteration:
            return
        if row is not None:
            severity, kind, text, step = row
            logger.log(_LEVELS[severity], "%s%s", prefix, text, extra={"kind": kind, "step": step})
            _call(callbacks, Event(severity, kind, text, step, rank))


def _call(callbacks: list[Callback], event: Event) -> None:
    for callback in list(callbacks):
        try:
            callback(event)
        except Exception:
            logger.exception("a callback of on_event failed")
