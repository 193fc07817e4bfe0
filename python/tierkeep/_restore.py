"""A checkpoint into a live state.

`Plan.match` walks the saved tree beside the live one and changes nothing: it collects what does
not fit, and which bytes go where. If all fits, the bytes are read, straight into live memory where
there is some, and the functions that `match` returned put values back.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tierkeep import _jax, _merge, _rename, _saved, _torch, _types
from tierkeep._build import Include, Keys, Make, key_of, own, place
from tierkeep._filling import Filling, Strict, facts_of, is_tensor
from tierkeep._rng import Rng
from tierkeep._tierkeep import Found
from tierkeep._types import MISSING

_MUTABLE_DICTS = (
    dict,
    collections.OrderedDict,
    collections.defaultdict,
    collections.Counter,
)


def is_object(live: Any) -> bool:
    """It saves and loads itself."""
    return (
        not isinstance(live, type)
        and hasattr(live, "state_dict")
        and hasattr(live, "load_state_dict")
    )


class Plan(Filling):
    """What a restore is going to do."""

    # -- one place ---------------------------------------------------------------------------

    def match(self, saved: Any, live: Any, keys: Keys, included: bool = False) -> Make:
        """How the place at `keys` is put back. `live` may be MISSING."""
        included = included or self.include(keys)
        if isinstance(saved, _saved.Foreign):
            saved = self.foreign(saved, keys)
        if _merge.is_gap(saved):
            self.lacks = True
            self._missing(live, keys)
            return lambda: live
        if live is not MISSING and is_object(live):
            return self._match_object(saved, live, keys, included)
        if isinstance(saved, _saved.Object) and (rows := _node(live)) is not None:
            return self._match_node(saved.tree, live, rows, keys, included)
        if isinstance(saved, _saved.Object):
            # It was saved as an object and is now the dict that the object gave.
            return self.match(saved.tree, live, keys, included)
        if isinstance(saved, _saved.Tensor):
            return self._match_tensor(saved, live, keys) if included else lambda: live
        if is_tensor(live):
            if included:
                self._differ(keys, f"saved as {_saved.kind(saved)}, a tensor in the state")
            return lambda: live
        if isinstance(saved, _saved.Mapping):
            return self._match_mapping(saved, live, keys, included)
        if type(saved) is list or type(saved) is tuple or isinstance(saved, _saved.Deque):
            return self._match_sequence(saved, live, keys, included)
        if isinstance(saved, _saved.NamedTuple | _saved.Dataclass):
            return self._match_fields(saved, live, keys, included)
        if not included:
            return lambda: live
        self._missing(live, keys)
        return self._match_leaf(saved, live, keys)

    def _match_tensor(self, saved: _saved.Tensor, live: Any, keys: Keys) -> Make:
        if not is_tensor(live):
            if live is not MISSING:
                self._missing(live, keys)
            return self.make_tensor(saved, keys)
        if _jax.is_array(live):
            return self.into_array(saved, live, keys)
        self.into(saved, live, keys)
        return lambda: live

    def _match_leaf(self, saved: Any, live: Any, keys: Keys) -> Make:
        value = self.leaf(saved, keys, live)
        if type(value) is set and type(live) is set:

            def update() -> Any:
                live.clear()
                live.update(value)
                return live

            return update
        return lambda: value

    # -- what only one side has --------------------------------------------------------------

    def _missing(self, live: Any, keys: Keys) -> None:
        """Reports the tensors and objects below `live`, which the checkpoint has not."""
        if is_tensor(live) or (live is not MISSING and is_object(live)):
            self.lacks = True
            if self.strict:
                self._differ(keys, "not in the checkpoint")
        elif isinstance(live, dict):
            for key, value in live.items():
                self._missing(value, (*keys, key))
        elif isinstance(live, list | tuple | collections.deque):
            for index, value in enumerate(live):
                self._missing(value, (*keys, index))
        elif dataclasses.is_dataclass(live) and not isinstance(live, type):
            for field in dataclasses.fields(live):
                self._missing(getattr(live, field.name, None), (*keys, field.name))

    def _unexpected(self, saved: Any, keys: Keys) -> bool:
        """Whether `saved` is or holds tensors or objects; reports them where that is an error."""
        if isinstance(saved, _saved.Tensor | _saved.Object):
            self._extra(keys)
            return True
        rows: list[tuple[Any, Any]] = []
        if isinstance(saved, _saved.Mapping):
            rows = self.entries(saved, keys)
        elif isinstance(saved, _saved.NamedTuple | _saved.Dataclass):
            rows = list(saved.fields.items())
        elif type(saved) in (list, tuple, _saved.Deque):
            rows = list(enumerate(_items(saved)))
        found = False
        for key, value in rows:
            # Every one is reported: no short cut.
            found = self._unexpected(value, (*keys, key)) or found
        return found

    # -- containers --------------------------------------------------------------------------

    def _match_mapping(self, saved: _saved.Mapping, live: Any, keys: Keys, included: bool) -> Make:
        is_live = type(live) in _MUTABLE_DICTS
        if not is_live:
            if not included and live is not MISSING:
                return lambda: live
            self._missing(live, keys)
        current: dict[Any, Any] = live if is_live else {}
        rows = self.entries(saved, keys, current)
        makes: dict[Any, Make] = {}
        for key, value in rows:
            below = (*keys, key)
            wanted = included or self.include(below)
            if key not in current and current and wanted and self._unexpected(value, below):
                continue
            if key in current or wanted or _may_hold(value):
                makes[key] = self.match(value, current.get(key, MISSING), below, wanted)
        gone = [key for key in current if key not in {key for key, _ in rows}]
        if included:
            # What is no tensor may be left out without a word, but others may have it.
            self.lacks = self.lacks or bool(gone)
            for key in gone:
                self._missing(current[key], (*keys, key))

        def make() -> Any:
            made = ((key, make()) for key, make in makes.items())
            new = {key: value for key, value in made if value is not MISSING}
            if not is_live:
                return _types.make_mapping(saved, new, live) if new or included else live
            if not included:
                new = {**live, **new}  # Only what was asked for is put in, each in its place.
            for key in gone:
                # The checkpoint is the truth.
                if included and not self.strict and _holds(live[key]):
                    new[key] = live[key]
            if list(live) != list(new):
                live.clear()
            for key, value in new.items():
                live[key] = value
            return live

        return make

    def _match_sequence(self, saved: Any, live: Any, keys: Keys, included: bool) -> Make:
        items = _items(saved)
        is_live = type(live) in (list, tuple, collections.deque)
        if not is_live:
            if not included and live is not MISSING:
                return lambda: live
            self._missing(live, keys)
        current: Sequence[Any] = live if is_live else ()
        items = own(items, len(current))
        makes: list[Make] = []
        for index, value in enumerate(items):
            below = (*keys, index)
            there = current[index] if index < len(current) else MISSING
            wanted = included or self.include(below)
            if there is MISSING and current and wanted and self._unexpected(value, below):
                continue
            makes.append(self.match(value, there, below, wanted))
        if included:
            self.lacks = self.lacks or len(items) < len(current)
            for index in range(len(items), len(current)):
                self._missing(current[index], (*keys, index))

        def make() -> Any:
            values = [make() for make in makes]
            while not included and len(values) > len(current) and values[-1] is MISSING:
                values.pop()  # Not asked for, and the live one ends before.
            if not included and live is MISSING and not values:
                return MISSING
            new = [None if value is MISSING else value for value in values]
            if not included:
                new += current[len(new) :]
            if isinstance(saved, _saved.Deque):
                if type(live) is not collections.deque or live.maxlen != saved.maxlen:
                    return collections.deque(new, saved.maxlen)
                live.clear()
                live.extend(new)
                return live
            if type(saved) is tuple:
                same = type(live) is tuple and len(live) == len(new)
                if same and all(a is b for a, b in zip(live, new, strict=True)):
                    return live
                return tuple(new)
            if type(live) is not list:
                return new
            live[:] = new
            return live

        return make

    def _match_fields(
        self, saved: _saved.NamedTuple | _saved.Dataclass, live: Any, keys: Keys, included: bool
    ) -> Make:
        names = list(saved.fields)
        if isinstance(saved, _saved.NamedTuple):
            is_live = isinstance(live, tuple) and getattr(live, "_fields", None) == tuple(names)
        else:
            cls = _types.dataclass_type(saved, live)
            is_live = cls is not None and type(live) is cls
        if not is_live:
            if not included and live is not MISSING:
                return lambda: live
            self._missing(live, keys)
        makes = [
            self.match(
                value, getattr(live, name, MISSING) if is_live else MISSING, (*keys, name), included
            )
            for name, value in saved.fields.items()
        ]

        def make() -> Any:
            new = [None if value is MISSING else value for value in (m() for m in makes)]
            if isinstance(saved, _saved.NamedTuple):
                if is_live and all(a is b for a, b in zip(live, new, strict=True)):
                    return live
                return _types.make_named_tuple(saved, new, live)
            if not is_live or live.__dataclass_params__.frozen:
                old = [getattr(live, name, MISSING) for name in names] if is_live else []
                if is_live and all(a is b for a, b in zip(old, new, strict=True)):
                    return live
                return _types.make_dataclass(saved, new, live)
            for name, value in zip(names, new, strict=True):
                object.__setattr__(live, name, value)
            return live

        return make

    # -- objects -----------------------------------------------------------------------------

    def _match_node(
        self, tree: Any, live: Any, rows: list[tuple[Any, Any]], keys: Keys, included: bool
    ) -> Make:
        """A node of a tree of JAX: a new one with the saved children."""
        current = dict(rows)
        match = self._match_mapping(tree, current, keys, included)

        def make() -> Any:
            new = match()
            return _jax.rebuilt(live, [new.get(key, value) for key, value in rows])

        return make

    def _match_object(self, saved: Any, live: Any, keys: Keys, included: bool) -> Make:
        tree = saved.tree if isinstance(saved, _saved.Object) else saved
        torch = _types.torch_if_imported()
        if torch is not None and isinstance(live, torch.nn.Module):
            return self._match_module(tree, live, keys, included)
        if not included:
            return lambda: live
        if torch is not None and isinstance(live, torch.optim.Optimizer):
            return self._match_optimizer(tree, live, keys)
        if hasattr(live, "tierkeep_params"):
            difference = _torch.names_differ(tree, live.tierkeep_params())
            if difference:
                self._differ(keys, difference)
                return lambda: live
            # Its tensors are as these parameters are; those that it has are overwritten.
            hints, params = live.state_dict(), live.tierkeep_params()
            self._add_moments(tree, hints, params, keys)
            self._match_names(params, _torch.in_groups(tree), keys)
            make_tree = self._make_with(tree, hints, keys)
            return lambda: _torch.load(live, make_tree(), place(keys))
        now = live.state_dict()
        difference = _torch.object_differs(saved, live, now)
        if difference:
            self._differ(keys, difference)
            return lambda: live
        # New memory, on the devices that its tensors are on now: what it keeps of it is its own.
        make_tree = self._make_beside(tree, now, keys)
        if isinstance(live, Rng):
            self.last.append(lambda: _torch.load(live, make_tree(), place(keys)))
            return lambda: live
        return lambda: _torch.load(live, make_tree(), place(keys))

    def _match_module(self, tree: Any, live: Any, keys: Keys, included: bool) -> Make:
        if not isinstance(tree, _saved.Mapping):
            if included:
                self._differ(keys, f"saved as {_saved.kind(tree)}, a torch module in the state")
            return lambda: live
        current = _torch.module_state(live)
        in_place = not _torch.needs_load_state_dict(live)
        makes: dict[str, Make] = {}
        rows = self.entries(tree, keys, current)
        for key, value in rows:
            below = (*keys, key)
            if not (included or self.include(below)):
                continue
            if key not in current:
                self._extra(below)
                if not self.strict:
                    makes[key] = self.make(value, below)
            elif in_place:
                makes[key] = self.match(value, current[key], below, True)
            else:
                makes[key] = self._beside(value, current[key], below)
        saved_keys = {key for key, _ in rows}
        for key in current:
            if included and key not in saved_keys:
                self.lacks = True
                if self.strict:
                    self._differ((*keys, key), "not in the checkpoint")
        if in_place:
            return lambda: live
        strict = self.strict and included
        return lambda: _torch.load_module(
            live, {k: make() for k, make in makes.items()}, current, strict, place(keys)
        )

    def _beside(self, saved: Any, live: Any, keys: Keys) -> Make:
        """New memory for what its owner will copy from, checked against the live one."""
        if isinstance(saved, _saved.Tensor) and is_tensor(live) and not _torch.is_lazy(live):
            facts = self._fits(saved, live, keys)
            if facts is not None and "sharded" in facts:
                return self._cut_like(saved, live, keys)
        return self.make(saved, keys)

    def _make_beside(self, saved: Any, live: Any, keys: Keys) -> Make:
        """New values, tensors on the devices of those in `live`."""
        if isinstance(saved, _saved.Foreign):
            saved = self.foreign(saved, keys)
        if isinstance(saved, _saved.Mapping) and isinstance(live, dict):
            rows = [
                (key, self._make_beside(value, live.get(key, MISSING), (*keys, key)))
                for key, value in self.entries(saved, keys, live)
            ]
            return lambda: _types.make_mapping(saved, {key: make() for key, make in rows}, live)
        if type(saved) in (list, tuple) and type(live) is type(saved):
            there = [*live, *[MISSING] * len(saved)]
            kept = own(saved, len(live))
            items = [self._make_beside(v, there[i], (*keys, i)) for i, v in enumerate(kept)]
            return lambda: type(saved)(make() for make in items)
        if isinstance(saved, _saved.Tensor) and is_tensor(live):
            facts = facts_of(live)
            if "sharded" in facts and facts["shape"] == self.entry(saved, keys)[1]:
                return self._cut_like(saved, live, keys)
        make = self.make(saved, keys)
        if isinstance(saved, _saved.Tensor) and (device := _torch.device_of(live)) is not None:
            return lambda: make().to(device)
        return make

    def _match_optimizer(self, tree: Any, live: Any, keys: Keys) -> Make:
        difference = _torch.groups_differ(tree, live)
        if difference:
            self._differ(keys, difference)
            return lambda: live
        # Its moments, where it has some already, are overwritten where they lie.
        hints = MISSING
        if _torch.loads_by_reference(live):
            hints = _torch.optimizer_state(live)
            self._add_moments(tree, hints, _torch.params_by_index(live), keys)
        make_tree = self._make_with(tree, hints, keys)
        return lambda: _torch.load_optimizer(live, make_tree(), place(keys))

    def _match_names(self, params: Collection[Any], saved: Collection[Any], keys: Keys) -> None:
        """The parameters that an optimizer has, and those that were saved with it."""
        missing = [name for name in params if name not in saved]
        self.lacks = self.lacks or bool(missing)
        # Groups of other ranks do not tell all their parameters: these are looked for by moments.
        if self.strict and not self.others:
            for name in missing:
                self._differ((*keys, name), "not in the checkpoint")
        for name in sorted(set(saved).difference(params), key=str):
            self._extra((*keys, name))

    def _add_moments(
        self, tree: _saved.Mapping, hints: Any, params: dict[Any, Any], keys: Keys
    ) -> None:
        """Memory where its parameters lie for what a fresh optimizer does not have yet."""
        state = hints.get("state") if isinstance(hints, dict) else None
        saved = dict(self.entries(tree, keys)).get("state")
        if not isinstance(state, dict) or not isinstance(saved, _saved.Mapping):
            return
        for index, of_param in self.entries(saved, (*keys, "state"), params):
            param = params.get(index)
            if param is None or index in state or not isinstance(of_param, _saved.Mapping):
                continue
            where = (*keys, "state", index)
            state[index] = {}
            if _torch.is_plain(param):
                continue  # New memory as for any other tensor.
            for name, value in self.entries(of_param, where):
                if name != "step" and isinstance(value, _saved.Tensor):
                    like = _torch.empty_like_param(param, *self.entry(value, where))
                    state[index][name] = like

    def _make_with(self, saved: Any, live: Any, keys: Keys) -> Make:
        """New containers; live tensors where they fit, fresh ones elsewhere."""
        if isinstance(saved, _saved.Mapping) and isinstance(live, dict):
            rows = [
                (key, self._make_with(value, live.get(key, MISSING), (*keys, key)))
                for key, value in self.entries(saved, keys, live)
            ]
            return lambda: _types.make_mapping(saved, {key: make() for key, make in rows})
        if isinstance(saved, _saved.Tensor) and is_tensor(live):
            facts = facts_of(live)
            fits = (facts["dtype"], facts["shape"]) == self.entry(saved, keys)
            free = "sharded" in facts or key_of(saved, facts["shape"]) not in self.targets
            if fits and free and facts.get("writable", True) and not saved.param:
                self.into(saved, live, keys)
                return lambda: live
        return self.make(saved, keys)


def _node(live: Any) -> list[tuple[Any, Any]] | None:
    """The children of a node of a tree of JAX, of a class that it does not know by itself."""
    known = (dict, list, tuple, collections.deque)
    if live is MISSING or live is None or is_tensor(live) or isinstance(live, known):
        return None
    return _jax.children(live)


class Wish(NamedTuple):
    """What of a checkpoint is wanted, and how."""

    rename: _rename.Rename | None
    include: Include
    strict: Strict
    #: The ranks that save now.
    savers: list[int]
    allow_pickle: set[str]


def planned(found: Found, state: Any, wish: Wish) -> tuple[Plan, Make]:
    """How `state` is filled from a checkpoint, as this rank finds it there: in its own shard's
    tree, or, where the state has places that this has not, in all ranks' trees.
    """
    strict, include = wish.strict, wish.include
    if strict and sorted([found.rank, *found.other_ranks]) != wish.savers:
        strict = "state"  # Other ranks may have now what this one saved.
    plan = Plan(found, allow_pickle=wish.allow_pickle, strict=strict, include=include)
    make = plan.match(_rename.renamed(found.tree, wish.rename), state, ())
    if found.other_ranks and (plan.lacks or include.unused):
        tree, others = _merge.merged(found)
        plan = Plan(
            found, allow_pickle=wish.allow_pickle, strict=strict, include=include, others=others
        )
        make = plan.match(_rename.renamed(tree, wish.rename), state, ())

    def made() -> Any:
        new = make()
        for rest in plan.last:
            rest()
        return new

    return plan, made


def _items(saved: Any) -> Sequence[Any]:
    items: Sequence[Any] = saved.items if isinstance(saved, _saved.Deque) else saved
    return items


def _may_hold(saved: Any) -> bool:
    """Whether something below may be wanted although its parent is not."""
    return isinstance(saved, _saved.Mapping | _saved.Object | _saved.Dataclass)


def _holds(live: Any) -> bool:
    """Whether a value is or holds a tensor or an object."""
    if is_tensor(live) or is_object(live):
        return True
    if isinstance(live, dict):
        return any(_holds(value) for value in live.values())
    if isinstance(live, list | tuple | collections.deque):
        return any(_holds(value) for value in live)
    return False
