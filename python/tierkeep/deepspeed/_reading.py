"""A checkpoint of DeepSpeed's files, read from a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tierkeep import _saved
from tierkeep._address import anywhere
from tierkeep._build import Builder
from tierkeep._checks import names
from tierkeep._tierkeep import Found, Reader
from tierkeep.deepspeed import _files, _values
from tierkeep.errors import CheckpointNotFoundError, TierkeepError

#: The key of what a rank has of its own, beside the names of files.
OWN = "own"


class Reading:
    """A checkpoint that is read: this rank's shard, and others as they are asked for."""

    def __init__(self, run: str, found: Found, reader: Reader) -> None:
        self.run = run
        self.found = found
        self._reader = reader
        self._files: dict[int, dict[str, tuple[Found, Any]]] = {}

    def load(self, name: str, hint: int | None, allow_pickle: set[str], threads: int | None) -> Any:
        """The dict that some rank saved under `name`, perhaps the one of the hint."""
        shard, saved = self._find(name, hint)
        builder = Builder(shard, allow_pickle)
        make = builder.make(saved, (name,))
        if builder.targets:
            builder.read(threads)
        return _values.given(make())

    def names(self) -> dict[str, int]:
        """Every rank's files, and the rank."""
        shards = [self.found, *self.found.others()]
        return {name: shard.rank for shard in shards for name in self._of(shard)}

    def _find(self, name: str, hint: int | None) -> tuple[Found, Any]:
        if name in (own := self._of(self.found)):
            return own[name]
        step, attempt, others = self.found.step, self.found.attempt, self.found.other_ranks
        if hint in others and hint not in self._files:
            # One manifest in place of all; they are asked where it is on another node alone.
            with contextlib.suppress(TierkeepError):
                for _, shard in self._reader.choose(step, attempt, [hint])[0]:
                    self._of(shard)
        for files in self._files.values():
            if name in files:
                return files[name]
        for shard in self.found.others():
            if name in (files := self._of(shard)):
                return files[name]
        raise CheckpointNotFoundError(
            f"{name}: no rank has saved it at step {step} of {self.run} "
            f"({len(others) + 1} ranks saved {tag_of(self.found)})"
        )

    def _of(self, shard: Found) -> dict[str, tuple[Found, Any]]:
        if shard.rank not in self._files:
            tree = shard.tree
            entries = tree.entries if isinstance(tree, _saved.Mapping) else []
            rows = {key: value for key, value in entries if isinstance(key, str) and key != OWN}
            self._files[shard.rank] = {key: (shard, value) for key, value in rows.items()}
        return self._files[shard.rank]


def export(
    destination: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    ram_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, str] | None = None,
    allow_pickle: Iterable[str] = (),
) -> str:
    """Writes a checkpoint into `directory` as DeepSpeed itself would have, in files of torch's, one
    after the other. `zero_to_fp32.py` and `ds_to_universal.py` read these. Takes no lock; needs no
    job, and memory for one file.

    Args:
        destination: the run.
        directory: where `latest` and the tag's directory are written.
        step: default: the newest that is complete.
        ram_dir, storage_options, allow_pickle: as for `tierkeep.load`.

    Returns:
        The tag.

    Raises:
        CheckpointNotFoundError: there is no such run or step.
        CorruptError: no tier has a good copy.
    """
    run, allowed = os.fspath(destination), names(allow_pickle)
    ram = None if ram_dir is None else os.fspath(ram_dir)
    reader = Reader(anywhere(run, storage_options), ram, dict(storage_options or {}))
    reading = Reading(run, reader.choose_for(0, step), reader)
    tag = tag_of(reading.found)
    into = os.path.join(directory, tag)
    os.makedirs(into, exist_ok=True)
    for name, rank in reading.names().items():
        path = os.path.join(into, name)
        torch.save(reading.load(name, rank, allowed, None), f"{path}.part")
        os.replace(f"{path}.part", path)
    _files.name_latest(os.fspath(directory), tag)
    return tag


def tag_of(found: Found) -> str:
    tags = found.meta["tags"]
    return str(tags[0]) if tags else f"global_step{found.step}"
