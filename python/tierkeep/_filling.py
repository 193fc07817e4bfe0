"""Which bytes of a checkpoint go into which live memory: planned before any is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from tierkeep import _cuda, _jax, _merge, _saved, _sharded, _torch, _types
from tierkeep._build import Builder, Include, Key, Keys, Make, Part, Source, empty, key_of, place
from tierkeep._tierkeep import describe
from tierkeep.errors import MismatchError


def is_tensor(live: Any) -> bool:
    torch, numpy = _types.torch_if_imported(), sys.modules.get("numpy")
    return (
        (torch is not None and isinstance(live, torch.Tensor))
        or (numpy is not None and type(live) is numpy.ndarray)
        or _jax.is_array(live)
    )


def facts_of(live: Any) -> dict[str, Any]:
    """As `describe`; of a tensor that the ranks have boxes of, `dtype` and `shape` of the whole,
    and as `sharded` what this rank has.
    """
    if _jax.is_array(live):
        return {"dtype": _jax.dtype_name(live), "shape": tuple(live.shape), "device": "cpu"}
    sharded = _sharded.look(live)
    if sharded is None:
        facts: dict[str, Any] = describe(live)
        return facts
    dtype = _torch.dtype_name(live)
    return {"dtype": dtype, "shape": sharded.shape, "device": "cpu", "sharded": sharded}


#: Whether what only one side has is an error; `"state"`: what only the state has.
Strict = bool | Literal["state"]


class Filling(Builder):
    """What is to be filled, and what stands in the way."""

    def __init__(
        self,
        found: Source,
        *,
        allow_pickle: Collection[str],
        strict: Strict,
        include: Include,
        others: Mapping[int, _merge.Table] | None = None,
    ) -> None:
        super().__init__(found, allow_pickle, others)
        #: All that is in the state must be in the checkpoint.
        self.strict = bool(strict)
        #: And all that this rank saved must be in the state; where it now has what others saved,
        #: others may have what it saved.
        self.strict_both = strict is True and others is None
        self.include = include
        self.differences: list[str] = []
        #: One of them is an error.
        self.differs = False
        #: The state has places that the tree has not.
        self.lacks = False
        #: What is put back after everything else: random numbers, of which others draw some.
        self.last: list[Callable[[], Any]] = []
        #: (live tensor, what is read): filled by a copy when the bytes are there.
        self.copies: list[tuple[Any, Key]] = []
        #: What is read: the live tensors on devices that have its bytes.
        self.on_device: dict[Key, list[Any]] = {}
        #: Places that several other ranks have, each as it may be.
        self.doubtful: dict[Keys, list[_saved.Tensor]] = {}
        self._spans: list[tuple[tuple[int, int], bool, Key]] = []

    def check(self) -> None:
        """Raises what does not fit, all of it."""
        self.include.check()
        self._separate()
        self._settle()
        if self.differs:
            all_of_it = self.differences
            lines = "".join(f"\n  {line}" for line in all_of_it)
            count = len(all_of_it)
            raise MismatchError(
                f"the checkpoint does not fit the state: {count} difference"
                f"{'' if count == 1 else 's'}{lines}",
                all_of_it,
            )

    def _differ(self, keys: Keys, what: str) -> None:
        self._add_difference(f"{place(keys)}: {what}")

    def _extra(self, keys: Keys) -> None:
        if self.strict:
            self.differences.append(f"{place(keys)}: in the checkpoint, not in the state")
            self.differs = self.differs or self.strict_both

    def _add_difference(self, what: str) -> None:
        self.differences.append(what)
        self.differs = True

    def foreign(self, saved: _saved.Foreign, keys: Keys) -> Any:
        if isinstance(saved.tree, _saved.Tensor) and not saved.tree.name.endswith("#"):
            ranks = {saved.tree.rank}
            all_of_it = [saved.tree]
            for other in saved.others:
                if isinstance(other, _saved.Tensor) and other.rank not in ranks:
                    ranks.add(other.rank)
                    all_of_it.append(other)
            if len(all_of_it) > 1:
                self.doubtful[keys] = all_of_it
        return saved.tree

    # -- planning ----------------------------------------------------------------------------

    def into(self, saved: _saved.Tensor, live: Any, keys: Keys) -> None:
        """Plans the bytes of `saved` into `live`, if they fit."""
        facts = self._fits(saved, live, keys)
        if facts is None:
            return
        sharded: _sharded.Sharded | None = facts.get("sharded")
        if sharded is None:
            self._read_into(key_of(saved, facts["shape"]), live, facts, keys)
            return
        for box in sharded.boxes:
            key = Part(saved.name, sharded.shape, box.offset, tuple(box.local.shape), saved.rank)
            self._read_into(key, box.local, describe(box.local), keys)

    def into_array(self, saved: _saved.Tensor, live: Any, keys: Keys) -> Make:
        """The same for an array of JAX, or the abstract form of one: a new one is made."""
        if _jax.is_key(live):
            self._differ(keys, "typed random keys: give their data, `jax.random.key_data(key)`")
        elif self._fits(saved, live, keys) is not None:
            boxes, make = _jax.targets(live)
            shape = tuple(live.shape)
            for offset, memory in boxes.items():
                whole = tuple(memory.shape) == shape
                key = key_of(saved, shape)
                if not whole:
                    key = Part(saved.name, shape, offset, tuple(memory.shape), saved.rank)
                self._read_into(key, memory, describe(memory), keys)
            return make
        return lambda: live

    def _read_into(self, key: Key, live: Any, facts: dict[str, Any], keys: Keys) -> None:
        """`live` is a plain tensor or array."""
        if not facts["writable"]:
            self._differ(keys, "it cannot be written to in place (read-only, or expanded)")
            return
        if facts["device"] != "cpu":
            self._to_device(key, live, facts)
            return
        if key in self.targets:
            if self.targets[key] is not live:
                self._copy_later(key, live, facts)
            return
        self.targets[key] = live
        self._spans.append((facts["span"], facts["contiguous"], key))

    def _copy_later(self, key: Key, live: Any, facts: dict[str, Any]) -> None:
        """The bytes have another place already."""
        there = describe(self.targets[key])
        if there["span"] == facts["span"] and there["device"] == facts["device"]:
            return  # Tied in the state as they were when saved.
        self.copies.append((live, key))

    def _to_device(self, key: Key, live: Any, facts: dict[str, Any]) -> None:
        lives = self.on_device.setdefault(key, [])
        there = ((d["span"], d["device"]) for d in map(describe, lives))
        if (facts["span"], facts["device"]) not in there:
            lives.append(live)

    def _cut_like(self, saved: _saved.Tensor, live: Any, keys: Keys) -> Make:
        """New memory for what this rank has of it."""
        made = _sharded.empty_like(live, live.dtype)
        self.into(saved, made, keys)
        return lambda: made

    def _fits(self, saved: _saved.Tensor, live: Any, keys: Keys) -> dict[str, Any] | None:
        """What `live` is, if it has the dtype and shape of `saved`."""
        dtype, shape = self.entry(saved, keys)
        facts = facts_of(live)
        if (facts["dtype"], facts["shape"]) == (dtype, shape):
            return facts
        self._differ(
            keys,
            f"saved as {dtype} {list(shape)}, in the state {facts['dtype']} {list(facts['shape'])}",
        )
        return None

    def _separate(self) -> None:
        """Two names of one memory: no two threads may write there."""
        end = -1
        before: tuple[tuple[int, int], bool, Key] | None = None
        for row in sorted(self._spans, key=lambda row: row[0]):
            (low, high), contiguous, name = row
            if before is not None and low < end and high > low:
                same = before[0] == (low, high) and contiguous and before[1]
                if same and self.strict:
                    both = f"{_name(name)} and {_name(before[2])}"
                    self._add_difference(f"{both}: saved apart, one memory in the state")
                # Views of one memory: through a buffer, one after the other.
                live = self.targets.pop(name)
                self.copies.append((live, name))
                self.targets[name] = _torch.like(live)
            if high > end:
                end, before = high, row

    def _settle(self) -> None:
        """What several other ranks have, and this one has not, is the same on all, or nobody's."""
        for keys, tensors in self.doubtful.items():
            first, *others = tensors
            form = self.entry(first, keys)
            for other in others:
                same = self.entry(other, keys) == form
                if not same or self._bytes(first, keys) != self._bytes(other, keys):
                    both = f"rank {first.rank} and rank {other.rank}"
                    self._differ(keys, f"{both} have different ones: whose is meant is not told")
                    break

    def _bytes(self, saved: _saved.Tensor, keys: Keys) -> bytes:
        dtype, shape = self.entry(saved, keys)
        tensor = empty(saved.lib, dtype, shape, keys)
        self.found.read([[(key_of(saved, shape), tensor)]])
        return _torch.to_bytes(tensor)

    # -- reading -----------------------------------------------------------------------------

    def fill(self, threads: int | None) -> tuple[str, list[str]]:
        """Reads the bytes. Returns the tier that most came from, and what was damaged."""
        report = self.found.read(self._turns(), threads)
        for live, name in self.copies:
            _torch.copy(live, self.targets[name])
        return report

    def _turns(self) -> Iterator[Sequence[tuple[Key, Any]]]:
        yield list(self.targets.items())
        # As they lie in the payload: neighbours share chunks.
        order = {name: index for index, name in enumerate(self.table)}
        wanted = sorted(self.on_device.items(), key=lambda row: order.get(_name(row[0]), 0))
        if wanted:
            yield from _cuda.land(dict(wanted))


def _name(key: Key) -> str:
    return key if isinstance(key, str) else key.name.removesuffix("#")
