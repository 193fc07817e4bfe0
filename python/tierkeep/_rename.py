"""Parts of a saved tree under new names, before it meets the live state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tierkeep import _saved
from tierkeep._tierkeep import join_path, split_path
from tierkeep.errors import InvalidError

Rename = Mapping[str, str] | Callable[[str], str]


def rename(tree: Any, how: Rename) -> Any:
    """`how` maps saved paths to live ones: a mapping of the paths of any parts, or a function that
    is asked for each tensor.
    """
    moves = {path: how(path) for path, _ in tensors(tree)} if callable(how) else dict(how)
    moves = {old: new for old, new in moves.items() if old != new}
    # All are taken out before one is put in: two may change places.
    taken = [(new, _take(tree, old)) for old, new in moves.items()]
    for new, part in taken:
        _put(tree, new, part)
    return tree


def renamed(tree: Any, how: Rename | None) -> Any:
    """`rename`, where there is anything to rename."""
    return tree if how is None else rename(tree, how)


def rename_paths(paths: Iterable[str], how: Rename | None) -> dict[str, str]:
    """Paths of tensors by their new names."""
    paths = list(paths)
    if how is None:
        return {path: path for path in paths}
    if callable(how):
        moves = [(how(path), path) for path in paths]
    else:
        for old in how:
            if not any(_is_below(path, old) for path in paths):
                raise InvalidError(f"rename: there is no {old}")
        moves = [(_moved(path, how), path) for path in paths]
    renamed: dict[str, str] = {}
    for new, path in moves:
        if renamed.setdefault(new, path) != path:
            raise InvalidError(f"rename: {renamed[new]} and {path} would both be {new}")
    return renamed


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _moved(path: str, moves: Mapping[str, str]) -> str:
    old = max((old for old in moves if _is_below(path, old)), key=len, default=None)
    return path if old is None else moves[old] + path[len(old) :]


def tensors(saved: Any, path: str = "") -> Iterator[tuple[str, _saved.Tensor]]:
    """Every tensor of a tree by its path; tied ones by each of theirs."""
    if isinstance(saved, _saved.Object | _saved.Foreign):
        yield from tensors(saved.tree, path)
    elif isinstance(saved, _saved.Tensor):
        yield path, saved
    else:
        for key, value in _rows(saved):
            yield from tensors(value, f"{path}/{key}" if path else key)


def _rows(saved: Any) -> list[tuple[str, Any]]:
    """Children by the component of their path."""
    if isinstance(saved, _saved.Mapping):
        return [(_component(key), value) for key, value in saved.entries]
    if isinstance(saved, _saved.NamedTuple | _saved.Dataclass):
        return [(_component(name), value) for name, value in saved.fields.items()]
    items = saved.items if isinstance(saved, _saved.Deque) else saved
    if isinstance(items, list | tuple):
        return [(_component(index), value) for index, value in enumerate(items)]
    return []


def _component(key: Any) -> str:
    # Keys that are marks (an enum, a tuple of them) cannot be renamed.
    return join_path((key,)) if isinstance(key, str | int) else ""


def _parent(tree: Any, path: str) -> tuple[Any, str]:
    """The container of a place, and the last component of its path."""
    *way, last = path.split("/")
    for component in way:
        rows = dict(_rows(_bare(tree)))
        if component not in rows:
            raise InvalidError(f"rename: the checkpoint has no place for {path}")
        tree = rows[component]
    return _bare(tree), last


def _bare(tree: Any) -> Any:
    while isinstance(tree, _saved.Object | _saved.Foreign):
        tree = tree.tree
    return tree


def _take(tree: Any, path: str) -> Any:
    parent, last = _parent(tree, path)
    if isinstance(parent, _saved.Mapping):
        for index, (key, value) in enumerate(parent.entries):
            if _component(key) == last:
                del parent.entries[index]
                return value
    raise InvalidError(f"rename: the checkpoint has no {path} in a dict")


def _put(tree: Any, path: str, part: Any) -> None:
    parent, last = _parent(tree, path)
    keys = split_path(last)
    if not isinstance(parent, _saved.Mapping) or len(keys) != 1 or isinstance(keys[0], tuple):
        raise InvalidError(f"rename: {path} is not a place in a dict")
    if any(_component(key) == last for key, _ in parent.entries):
        raise InvalidError(f"rename: {path} is taken")
    parent.entries.append((keys[0], part))
