"""What can go wrong. Each error is a `TierkeepError` and a built-in exception that fits, so that
`except FileNotFoundError` works. All of them pickle: errors travel between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BugError",
    "CheckpointNotFoundError",
    "CorruptError",
    "DeadlineError",
    "FencedError",
    "InvalidError",
    "MismatchError",
    "TierkeepError",
    "UnavailableError",
]


class TierkeepError(Exception):
    """Everything that tierkeep raises on purpose."""


class CheckpointNotFoundError(TierkeepError, FileNotFoundError):
    """There is no such run, step or tensor."""


class CorruptError(TierkeepError, OSError):
    """Bytes came back different from how they went in, in every tier that has them."""


class FencedError(TierkeepError, PermissionError):
    """A newer attempt, or another live process, owns this run. Stop: it has taken over."""


class InvalidError(TierkeepError, ValueError):
    """Something cannot be done as asked. The message says what would be right."""


class MismatchError(InvalidError):
    """The checkpoint does not fit the live state. Nothing has been changed.

    `differences` has one sentence for each name, shape or dtype that differs.
    """

    def __init__(self, message: str = "", differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences: list[str] = list(differences)

    def __reduce__(self) -> tuple[type[MismatchError], tuple[str, list[str]]]:
        return type(self), (str(self), self.differences)


class UnavailableError(TierkeepError, OSError):
    """A tier did not answer, or a save was not carried out. The same call may work later."""


class DeadlineError(UnavailableError, TimeoutError):
    """Something did not happen in time. The message names who was missing."""


class BugError(TierkeepError, RuntimeError):
    """An invariant of tierkeep does not hold. Please report it."""
