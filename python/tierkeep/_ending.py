"""Handles that are open when the interpreter ends."""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol


class _Open(Protocol):
    def at_exit(self) -> None: ...


_open: weakref.WeakSet[_Open] = weakref.WeakSet()


def remember(handle: _Open) -> None:
    """Closes `handle` at the end of the process, unless somebody has by then."""
    _open.add(handle)


@atexit.register
def _close_all() -> None:
    for handle in list(_open):
        handle.at_exit()
