"""The saves of one Checkpointer that are not over yet, and the failures among those that are."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from dataclasses import dataclass

from tierkeep._events import Callback, Event
from tierkeep._tierkeep import Save
from tierkeep.errors import DeadlineError, TierkeepError, UnavailableError


@dataclass(slots=True)
class _Open:
    save: Save
    #: It has been counted as one that got to RAM.
    in_ram: bool = False


class Saves:
    """Remembers each save until its outcome is known."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._lock = threading.Lock()
        self._in_ram = 0
        self._on_disk = 0
        self.newest: Save | None = None
        self.last_error: TierkeepError | None = None

    @property
    def failures(self) -> int:
        """Failures in a row: of saves that did not get to RAM, or of steps that did not get to
        disk.
        """
        return max(self._in_ram, self._on_disk)

    def add(self, save: Save) -> None:
        with self._lock:
            self._open.append(_Open(save))
            self.newest = save

    def settle(self) -> None:
        """Looks which saves are over."""
        with self._lock:
            self._open = [one for one in self._open if not self._is_over(one)]

    def _is_over(self, one: _Open) -> bool:
        now = one.save.progress()
        if now.error is not None and not now.ram:
            self._in_ram += 1
            self.last_error = failure(one.save, "ram")
            return True
        if now.ram and not one.in_ram:
            one.in_ram = True
            self._in_ram = 0
        if now.disk:
            self._on_disk = 0
        return now.done

    def disk_failed(self, step: int | None, text: str) -> None:
        """The disk tier gave a step up. It is told by an event: nobody may be waiting."""
        found = [one.save for one in self._open if one.save.step == step]
        error = failure(found[-1], "disk") if found else None
        self.last_error = error or UnavailableError(text)
        self._on_disk += 1

    def wait_all(self, level: str, timeout_s: float) -> None:
        """Waits until the newest save has `level`, and no older one is on its way any more."""
        end = time.monotonic() + timeout_s
        newest = self.newest
        for save in [one.save for one in self._open]:
            if save is not newest:
                # What became of older ones was told; the newest is what counts now.
                with contextlib.suppress(UnavailableError):
                    _wait(save, level, end)
        if newest is not None and not newest.progress().skipped:
            _wait(newest, level, end)


def _wait(save: Save, level: str, end: float) -> None:
    if level == "object" and not save.is_due_for_object:
        level = "disk"
    if level == "disk" and not save.is_due_for_disk:
        level = "ram"
    save.wait(level, max(0.0, end - time.monotonic()))


def most_durable(save: Save) -> str:
    """The level that the save is to reach in the end."""
    return "object" if save.is_due_for_object else "disk" if save.is_due_for_disk else "ram"


def not_there(newest: Save | None, timeout_s: float) -> str:
    """What to say of a close that took too long."""
    if newest is None:
        return f"the disk tier did not end within {timeout_s} s"
    now = newest.progress()
    tier = "object" if now.disk or not newest.is_due_for_disk else "disk"
    has = "on disk" if now.disk else "in RAM"
    return f"the {tier} tier did not end within {timeout_s} s: step {newest.step} is {has} only"


def failure(save: Save, level: str) -> TierkeepError | None:
    """The error that `save.wait(level)` raises by now."""
    try:
        save.wait(level, 0.0)
    except DeadlineError:
        return None
    except TierkeepError as error:
        return error
    return None


def disk_failures(saves: weakref.ref[Saves]) -> Callback:
    """Hears of saves that fail behind, for as long as there are `saves`."""

    def hear(event: Event) -> None:
        kept = saves()
        if kept is not None and event.kind in ("disk_failed", "incomplete"):
            kept.disk_failed(event.step, event.text)

    return hear
