"""The command `tierkeep`."""

from __future__ import annotations

import signal
import sys

from tierkeep import _tierkeep


def main() -> int:
    """Runs the command with the arguments of this process; returns its exit code."""
    # Python would only note a Ctrl-C and act on it when the command is over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _tierkeep.command(["tierkeep", *sys.argv[1:]])
