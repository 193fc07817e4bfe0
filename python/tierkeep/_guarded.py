"""The optimizers that wait for a copy that is taken behind."""

from __future__ import annotations

import os
import weakref
from typing import Any

from tierkeep._cuda import Stager
from tierkeep._tierkeep import Handle
from tierkeep.errors import DeadlineError, InvalidError

# A copy that takes longer has met something that will not end.
FENCE_SECONDS = 600.0


class Guarded:
    """Their hooks outlive the Checkpointer: then they do nothing."""

    def __init__(self, handle: Handle, stager: Stager) -> None:
        self._handle, self._stager = handle, stager
        self._optimizers: list[weakref.ref[Any]] = []
        self._pid = os.getpid()

    def live(self) -> list[Any]:
        """Those that are still there."""
        return [optimizer for one in self._optimizers if (optimizer := one()) is not None]

    def add(self, optimizer: Any) -> None:
        """Hooks into an optimizer, once.

        Raises:
            InvalidError: it has no hook.
        """
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise InvalidError(f"{type(optimizer)} has no register_step_pre_hook to wait in")
        if any(optimizer is one for one in self.live()):
            return
        weak = weakref.ref(self)

        def wait(*_: object) -> None:
            guarded = weak()
            if guarded is not None:
                guarded.wait()

        optimizer.register_step_pre_hook(wait)
        if hasattr(optimizer, "register_load_state_dict_pre_hook"):
            optimizer.register_load_state_dict_pre_hook(wait)
        self._optimizers.append(weakref.ref(optimizer))

    def wait(self) -> None:
        """Nothing that the caller does to late tensors from here on reaches the copy.

        For those on a device the caller's stream waits, for those on the host the caller does.

        Raises:
            DeadlineError: the copy does not end.
        """
        if os.getpid() != self._pid:
            return
        self._stager.order()
        if not self._handle.fence_host(FENCE_SECONDS):
            raise DeadlineError(f"the copy of the state did not end within {FENCE_SECONDS} s")
