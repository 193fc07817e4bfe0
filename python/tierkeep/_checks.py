"""Arguments that are not what they must be, told with what would be right."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable

from tierkeep.errors import InvalidError


def setting(name: str, given: int | str | None, default: int | str) -> int | str:
    """What was given, else the variable `TIERKEEP_<NAME>`, else the default."""
    if given is not None:
        return given
    return os.environ.get(f"TIERKEEP_{name.upper()}") or default


def at_least_one(name: str, value: int | str) -> int:
    try:
        number = operator.index(int(value) if isinstance(value, str) else value)
    except ValueError:
        raise InvalidError(f"{name} = {value!r}: a whole number") from None
    if number < 1:
        raise InvalidError(f"{name} = {number}: at least 1")
    return number


def one_of(name: str, value: int | str, allowed: tuple[str, ...]) -> str:
    for choice in allowed:
        if value == choice:
            return choice
    raise InvalidError(f"{name} = {value!r}: it is one of {', '.join(map(repr, allowed))}")


def words(name: str, words: Iterable[str]) -> list[str]:
    if isinstance(words, str):
        raise InvalidError(f"{name} = {words!r}: several words, as in [{words!r}]")
    return list(words)


def names(allow_pickle: Iterable[str]) -> set[str]:
    names = set(words("allow_pickle", allow_pickle))
    for name in names:
        if ":" not in name:
            raise InvalidError(f'allow_pickle has {name!r}: it is "module:Name"')
    return names
