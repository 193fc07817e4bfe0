"""What a destination may be."""

from __future__ import annotations

import os
import re

from tierkeep.errors import InvalidError


def directory(destination: str | os.PathLike[str]) -> str:
    """The directory `<root>/<run>` that `destination` names."""
    path = os.fsdecode(destination)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise InvalidError(
            f"{path}: the object tier comes with a later version; the destination is a directory, "
            "<root>/<run>"
        )
    return path
