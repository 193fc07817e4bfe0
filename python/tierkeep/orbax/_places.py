"""Which run and step a directory of Orbax's means, and the file in it that says so."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from etils import epath

from tierkeep._address import is_url
from tierkeep.errors import InvalidError

_FILE = "tierkeep.json"
_FORMAT = 1

# What Orbax adds to the name of a directory until it is committed.
_TEMPORARY = ".orbax-checkpoint-tmp"
# `100`, and `step_00100` or whatever the step's prefix is.
_STEP = re.compile(r"(?:.*[-_.=])?([0-9]{1,18})")


class Place(NamedTuple):
    """What a directory is, that a handler is given."""

    #: That of all steps.
    root: epath.Path
    #: The name of the step's directory, once it is committed.
    name: str
    step: int
    #: The item in it; `default` where the step has one without a name.
    item: str
    #: How many directories `root` is above it.
    depth: int

    @property
    def run(self) -> str:
        """Where the arrays go, where nothing else was said."""
        return str(self.root / "tierkeep" / self.item)

    @property
    def pins(self) -> epath.Path:
        """A file for each step that was pinned for Orbax, under the name of its directory."""
        return self.root / "tierkeep" / f"{self.item}.pins"


def place(directory: epath.Path) -> Place:
    """`<root>/<step>/<item>` or `<root>/<step>`, committed or not."""
    name, parent = final(directory.name), final(directory.parent.name)
    if (step := number(parent)) is not None:
        return Place(directory.parent.parent, parent, step, name, 2)
    if (step := number(name)) is not None:
        return Place(directory.parent, name, step, "default", 1)
    raise InvalidError(
        f"{directory.parent / name} names no step: "
        "save to a path that ends in its number, as in /ckpt/gpt/100"
    )


def final(name: str) -> str:
    """The name of a directory once it is committed."""
    return name.split(_TEMPORARY)[0]


def number(name: str) -> int | None:
    """The step in the name of its directory."""
    found = _STEP.fullmatch(name)
    return None if found is None else int(found[1])


class Reference(NamedTuple):
    """What a directory of Orbax's says of the arrays."""

    run: str
    step: int
    attempt: int
    #: Paths of typed random keys, which are stored as their data, to their kind.
    keys: dict[str, str]


def write(directory: epath.Path, at: Place, reference: Reference) -> None:
    """A run below the directory of all steps is named from here: all of it can be moved."""
    run, root = reference.run, f"{at.root}/"
    if run.startswith(root):
        run = "../" * at.depth + run.removeprefix(root)
    said = {"format": _FORMAT, **reference._replace(run=run)._asdict()}
    (directory / _FILE).write_text(json.dumps(said, indent=1) + "\n")


def read(directory: epath.Path) -> Reference | None:
    """`None`: Orbax itself, or another handler, wrote what is there."""
    path = directory / _FILE
    if not path.exists():
        return None
    try:
        said: dict[str, Any] = json.loads(path.read_text())
        newer = said.pop("format") != _FORMAT
        reference = None if newer else Reference(**said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidError(f"{path} cannot be read: {error}") from error
    if reference is None:
        raise InvalidError(f"{path} was written by a newer tierkeep")
    return reference._replace(run=_resolved(directory, reference.run))


def _resolved(directory: epath.Path, run: str) -> str:
    if is_url(run) or run.startswith("/"):
        return run
    while run.startswith("../"):
        directory, run = directory.parent, run.removeprefix("../")
    return str(directory / run)
