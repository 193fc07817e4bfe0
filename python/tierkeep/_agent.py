"""Which agent a Checkpointer is to have."""

from __future__ import annotations

import os
from typing import Literal

from tierkeep.errors import InvalidError

Wish = str | os.PathLike[str] | Literal[False] | None

_OFF = ("off", "0", "none")


def wish(
    agent: Wish,
    ram_dir: str | os.PathLike[str] | None,
    ram_bytes_max: int | None,
) -> str | None:
    """What is said about the agent: a socket, "off", or None where it is to be looked for.

    Whoever gives a place or a size for the ram tier means one of its own.
    """
    named = os.environ.get("TIERKEEP_AGENT") or None if agent is None else agent
    if named is False or (isinstance(named, str) and named in _OFF):
        return "off"
    own = "ram_dir" if ram_dir is not None else "ram_bytes_max" if ram_bytes_max else None
    if own is None:
        return None if named is None else os.fspath(named)
    if named is None:
        return "off"
    raise InvalidError(
        f"{own}: with an agent ({os.fspath(named)}) this is the agent's to say; leave it out, "
        "or say agent=False"
    )
