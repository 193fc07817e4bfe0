"""A bar for a save that is on its way to disk."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from tierkeep._tierkeep import Progress, Save

_WIDTH = 30
_SECONDS = 0.1


def bar(
    save: Save,
    *,
    file: TextIO | None = None,
    disable: bool | None = None,
    timeout_s: float = 3600.0,
) -> Save:
    """Draws a bar until `save` has reached every tier that it is due for, or has failed.

    Draws on a terminal only, and only on rank 0; elsewhere it waits without a word. An environment
    variable `TIERKEEP_PROGRESS` of 1 or 0 wins over both. A failure is not raised here: `save.wait`
    raises it.

    Args:
        save: what `Checkpointer.save` returned.
        file: where to draw; default: standard error.
        disable: True: never draw. False: draw, terminal or not.
        timeout_s: seconds after which it returns in any case.
    """
    out = sys.stderr if file is None else file
    now = save.progress()
    draws = _draws(out, disable, now.rank)
    end = time.monotonic() + timeout_s
    while not now.done and time.monotonic() < end:
        if draws:
            out.write(f"\r{line(now)}")
            out.flush()
        time.sleep(_SECONDS)
        now = save.progress()
    if draws:
        out.write(f"\r{line(now)}\n")
        out.flush()
    return save


def _draws(out: TextIO, disable: bool | None, rank: int) -> bool:
    wish = os.environ.get("TIERKEEP_PROGRESS", "")
    if wish in ("0", "1"):
        return wish == "1"
    if disable is not None:
        return not disable
    return rank == 0 and out.isatty()


def line(now: Progress) -> str:
    """The bar as it stands."""
    share = now.disk_bytes / now.bytes if now.bytes else 0.0
    if now.disk:
        share = 1.0
    filled = round(_WIDTH * share)
    mib = 1 << 20
    level = "disk" if now.disk else "ram" if now.ram else "copying"
    end = (
        f" failed: {now.error}" if now.error else f" skipped: {now.skipped}" if now.skipped else ""
    )
    return (
        f"step {now.step} [{'#' * filled}{'.' * (_WIDTH - filled)}] "
        f"{now.disk_bytes / mib:.1f}/{now.bytes / mib:.1f} MiB {level}{end}"
    )
