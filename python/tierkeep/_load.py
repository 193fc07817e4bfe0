"""`tierkeep.load`: a checkpoint as new values on the CPU, without a Checkpointer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from tierkeep import _saved
from tierkeep._address import anywhere
from tierkeep._build import Builder, Include, Keys
from tierkeep._tierkeep import Reader
from tierkeep._types import MISSING
from tierkeep.errors import InvalidError


def load(
    destination: str | os.PathLike[str],
    step: int | None = None,
    *,
    attempt: int | None = None,
    include: Iterable[str] | None = None,
    rank: int | None = None,
    ram_dir: str | os.PathLike[str] | None = None,
    allow_pickle: Iterable[str] = (),
    threads: int | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> Any:
    """Reads one rank's state of a checkpoint into new memory on the CPU.

    Takes no lock and writes nothing; the job may be running. Objects come back as the dicts that
    their `state_dict()` gave. Tensors come back as what they were, torch's or numpy's; without
    torch, as numpy arrays where numpy has the dtype.

    Args:
        destination: the run, `<root>/<run>`: a directory, or a place in a bucket, as in
            `s3://bucket/root/run` (`gs://`, `az://`; `file://` for a shared directory).
        step: completed training steps; default: the newest complete checkpoint.
        attempt: the attempt that saved it, where two attempts saved the step.
        include: glob patterns over paths, as in `["model/*"]`; only what matches is read. Items of
            lists and tuples that do not match are None.
        rank: whose state, where several ranks saved.
        ram_dir: as in `Checkpointer`.
        allow_pickle: `module:Name` of what may be unpickled.
        threads: of the copy; default: as many as help.
        storage_options: for the bucket, under the names that Rust's `object_store` uses, as in
            `{"aws_endpoint": "http://host:9000"}`; beside what AWS_*, GOOGLE_* or AZURE_* say.

    Raises:
        CheckpointNotFoundError: there is no such run or step.
        UnavailableError: the bucket does not answer.
        CorruptError: no tier has a good copy.
        InvalidError: several ranks saved and `rank` is not given; a pattern matches nothing.
    """
    reader = Reader(
        anywhere(destination, storage_options),
        None if ram_dir is None else os.fspath(ram_dir),
        dict(storage_options or {}),
    )
    ranks = None if rank is None else [rank]
    shards, _ = reader.choose(step, attempt, ranks)
    if len(shards) != 1:
        saved_by = ", ".join(str(r) for r, _ in shards[:8])
        raise InvalidError(
            f"step {shards[0][1].step} was saved by {len(shards)} ranks ({saved_by}"
            f"{', ...' if len(shards) > 8 else ''}): say rank="
        )
    found = shards[0][1]
    builder = Builder(found, frozenset(allow_pickle))
    wanted = Include(include)
    tree = found.tree
    if wanted.patterns is not None:
        tree = _prune(tree, (), wanted, builder)
        wanted.check()
    make = builder.make(tree, ())
    if builder.targets:
        builder.read(threads)
    return make()


def _prune(saved: Any, keys: Keys, wanted: Include, builder: Builder) -> Any:
    """The parts that are wanted; MISSING where none is."""
    if wanted(keys):
        return saved
    if isinstance(saved, _saved.Object):
        return _prune(saved.tree, keys, wanted, builder)
    if isinstance(saved, _saved.Mapping):
        rows = [
            (key, _prune(value, (*keys, key), wanted, builder))
            for key, value in builder.entries(saved, keys)
        ]
        rows = [row for row in rows if row[1] is not MISSING]
        return _saved.Mapping(saved.kind, rows, saved.factory) if rows or not keys else MISSING
    if isinstance(saved, _saved.NamedTuple | _saved.Dataclass):
        fields = {n: _prune(v, (*keys, n), wanted, builder) for n, v in saved.fields.items()}
        if all(v is MISSING for v in fields.values()):
            return MISSING
        fields = {n: None if v is MISSING else v for n, v in fields.items()}
        return type(saved)(saved.type_name, fields)
    if type(saved) in (list, tuple, _saved.Deque):
        items = saved.items if isinstance(saved, _saved.Deque) else saved
        pruned = [_prune(v, (*keys, i), wanted, builder) for i, v in enumerate(items)]
        if all(v is MISSING for v in pruned):
            return MISSING
        pruned = [None if v is MISSING else v for v in pruned]
        if isinstance(saved, _saved.Deque):
            return _saved.Deque(saved.maxlen, pruned)
        return type(saved)(pruned)
    return MISSING
