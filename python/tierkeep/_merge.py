"""What a rank looks for and did not save itself: places in the trees of other ranks.

A pipeline's stages have other parts of one state, and a job of other ranks cuts it elsewhere. A
rank's own tree comes first; where it has no such place, the other ranks' do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tierkeep import _rename, _saved
from tierkeep._tierkeep import Found


class Gap(NamedTuple):
    """An item of a list that only other ranks have saved."""


def is_gap(saved: Any) -> bool:
    """Whether it is the mark of one."""
    return isinstance(saved, _saved.NamedTuple) and saved.type_name == _GAP


_GAP = f"{Gap.__module__}:{Gap.__qualname__}"

#: Names to (dtype as in safetensors, shape).
Table = Mapping[str, tuple[str, tuple[int, ...]]]


def merged(found: Found) -> tuple[Any, dict[int, Table]]:
    """The rank's tree with the places that only others have, and the tables of their tensors."""
    tree = found.tree
    tables: dict[int, Table] = {}
    for other in found.others():
        tables[other.rank] = other.tensors
        elsewhere = other.elsewhere
        theirs = other.tree
        for _, tensor in _rename.tensors(theirs):
            # What is cut lies with all ranks.
            if not tensor.name.endswith("#"):
                tensor.rank = elsewhere.get(tensor.name, other.rank)
        _add(tree, theirs)
    return tree, tables


def _add(ours: Any, theirs: Any) -> None:
    """Adds to `ours` what only `theirs` has."""
    ours, theirs = _bare(ours), _bare(theirs)
    if is_gap(theirs):
        return
    if isinstance(ours, _saved.Foreign):
        ours.others.append(theirs)
        _add(ours.tree, theirs)
    elif isinstance(ours, _saved.Mapping) and isinstance(theirs, _saved.Mapping):
        there = {key: value for key, value in ours.entries if isinstance(key, str | int)}
        for key, value in theirs.entries:
            if key in there:
                _add(there[key], value)
            elif isinstance(key, str | int):
                ours.entries.append((key, _foreign(value, inner=False)))
    elif isinstance(ours, _saved.NamedTuple | _saved.Dataclass) and type(ours) is type(theirs):
        for name, value in theirs.fields.items():
            if name in ours.fields:
                _add(ours.fields[name], value)
    elif type(ours) is list and type(theirs) is list:
        for index, other in enumerate(theirs):
            if index == len(ours):
                ours.append(other if is_gap(other) else _foreign(other, inner=False))
            elif not is_gap(ours[index]):
                _add(ours[index], other)
            elif not is_gap(other):
                ours[index] = _foreign(other, inner=True)
    elif type(ours) is tuple and type(theirs) is tuple:
        for mine, other in zip(ours, theirs, strict=False):
            _add(mine, other)


def _foreign(tree: Any, *, inner: bool) -> Any:
    """Marks a place and all that are below it: each may differ among those that have it."""
    below = _bare(tree)
    if is_gap(below):
        return below
    if isinstance(below, _saved.Mapping):
        below.entries = [(key, _foreign(value, inner=True)) for key, value in below.entries]
    elif isinstance(below, _saved.NamedTuple | _saved.Dataclass):
        below.fields = {name: _foreign(v, inner=True) for name, v in below.fields.items()}
    elif type(below) in (list, tuple):
        marked = type(below)(_foreign(value, inner=True) for value in below)
        if below is tree:
            tree = marked
        else:
            tree.tree = marked
    return _saved.Foreign(tree, [], inner)


def _bare(tree: Any) -> Any:
    return tree.tree if isinstance(tree, _saved.Object) else tree
