"""SIGTERM as a question that the training loop answers.

The handler is installed when the loop asks for the first time, not before: in a script that never
asks, SIGTERM ends the process as it always did.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class _Stop:
    def __init__(self) -> None:
        self.requested = False
        self.installed = False
        self._before: Any = None

    def install(self) -> None:
        # Only the main thread may, and elsewhere a handler of the script's own stays.
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        self._before = signal.signal(signal.SIGTERM, self._handle)
        self.installed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if callable(self._before):
            self._before(number, frame)
        if self.requested:
            # The second one means it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.requested = True


_stop = _Stop()


def requested() -> bool:
    """Whether this process was asked to stop, by SIGTERM."""
    _stop.install()
    return _stop.requested
