"""Trees as Orbax's users give and get them.

A target is only looked at: a restored tree is a new one, down to its containers. Typed random keys
are stored as their data (`jax.random.key_data`), as whoever uses a `Checkpointer` stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax as _jax_module
import numpy as np

from tierkeep import _jax, _saved, _types
from tierkeep._build import Builder, Keys, Make

jax: Any = _jax_module  # Parts of it have no types.


def without_keys(tree: Any) -> tuple[Any, dict[str, str]]:
    """The tree with the data of its typed random keys, and their kinds by path."""
    kinds = {
        _path(path): _kind(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if _is_key(leaf)
    }
    if not kinds:
        return tree, {}
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree), kinds


def with_keys(tree: Any, kinds: Mapping[str, str]) -> Any:
    """The tree with its typed random keys again."""
    if not kinds:
        return tree

    def key(path: Any, leaf: Any) -> Any:
        kind = kinds.get(_path(path))
        if kind is None:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=kind), leaf)
        return jax.random.wrap_key_data(jax.numpy.asarray(leaf), impl=kind)

    return jax.tree_util.tree_map_with_path(key, tree)


def own(target: Any) -> tuple[Any, dict[str, str]]:
    """A target that may be filled, and the kinds of its typed random keys by path."""
    kinds: dict[str, str] = {}

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.empty_like(value)
        if not _is_key(value):
            return value
        data = jax.eval_shape(jax.random.key_data, value)
        kinds[_path(path)] = _kind(value)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=value.sharding)

    return jax.tree_util.tree_map_with_path(leaf, target), kinds


def part(tree: Any, like: Any) -> Any:
    """What of a tree `like` has."""
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_path(path)], like)


def has_arrays(tree: Any) -> bool:
    """Whether it is a tree with an array, or the abstract form of one."""
    try:
        leaves = jax.tree.leaves(tree)
    except (TypeError, ValueError):
        return False
    return any(isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray) for x in leaves)


class Abstract(Builder):
    """Makes a tree with `jax.ShapeDtypeStruct` for each tensor; nothing is read."""

    def make_tensor(self, saved: _saved.Tensor, keys: Keys) -> Make:
        dtype, shape = self.entry(saved, keys)
        known = {**_types.NUMPY_DTYPES, **_types.ML_DTYPES}
        abstract = jax.ShapeDtypeStruct(shape, jax.numpy.dtype(known[dtype]))
        return lambda: abstract


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(key: Any) -> str:
    """The kind of typed random keys; asked within a trace, since the keys may be abstract."""
    kinds: list[str] = []
    jax.eval_shape(lambda traced: kinds.append(str(jax.random.key_impl(traced))), key)
    return kinds[0]


def _path(path: Any) -> str:
    return "/".join(str(_jax._key(entry)) for entry in path)
