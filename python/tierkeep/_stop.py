"""SIGTERM as a question that the training loop answers.

The handler is installed when the loop asks for the first time, not before: in a script that never
asks, SIGTERM ends the process as it always did. On which step several ranks stop is decided in
Rust; here is only the signal of this process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# A launcher may pass on a signal that was sent to its whole group: both are one request.
_ONE_REQUEST_SECONDS = 1.0


class _Stop:
    def __init__(self) -> None:
        self.requested = False
        self.installed = False
        self._before: Any = None
        self._pid = 0
        self._first = 0.0

    def install(self) -> None:
        # Only the main thread may, and elsewhere a handler of the script's own stays.
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        self._before = signal.signal(signal.SIGTERM, self._handle)
        self.installed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if callable(self._before):
            self._before(number, frame)
        if os.getpid() != self._pid:
            # A forked child has inherited the handler, not the loop that asks.
            if self._before == signal.SIG_DFL:
                _end()
            return
        now = time.monotonic()
        if not self.requested:
            self.requested = True
            self._first = now
        elif now - self._first > _ONE_REQUEST_SECONDS:
            # The second one means it.
            _end()


def _end() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


_stop = _Stop()


def requested() -> bool:
    """Whether this process was asked to stop, by SIGTERM."""
    _stop.install()
    return _stop.requested
