"""Arrays and trees of JAX.

jax is never imported here: whoever has such an array has done so. Arrays are immutable: what is
saved of one is a view of its memory, and while that lives the runtime gives the memory to nobody
else. A function that the array is donated to gets a copy (XLA drops the donation), so a copy of the
state may be taken behind, and nobody waits. Arrays on other devices than the CPU come to the host
before `save` returns.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from tierkeep import _types
from tierkeep._sharded import Box, Sharded
from tierkeep.errors import InvalidError

Offset = tuple[int, ...]


def if_imported() -> Any:
    """jax, if the script has imported it."""
    jax = sys.modules.get("jax")
    return jax if hasattr(jax, "Array") else None


def is_array(value: Any) -> bool:
    """Whether it is an array of JAX, or the abstract form of one."""
    jax = if_imported()
    return jax is not None and isinstance(value, jax.Array | jax.ShapeDtypeStruct)


def is_key(value: Any) -> bool:
    """Whether it is an array of typed random keys."""
    jax = if_imported()
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def look(array: Any) -> Any:
    """What this process holds of an array: a numpy array where it is all of it, and nobody else's;
    else `Sharded`.

    Raises:
        InvalidError: it has no values (it is traced, or was donated and is gone).
    """
    jax = if_imported()
    if isinstance(array, jax.core.Tracer):
        raise InvalidError("a traced array has no values yet: save outside of jit")
    if array.is_deleted():
        raise InvalidError("its memory was donated: save before it is given away")
    if is_key(array):
        raise InvalidError("typed random keys: store `jax.random.key_data(key)`")
    whole, ranks, holders = _layout(array.sharding, tuple(array.shape))
    shards = {_offset(shard.index): shard for shard in array.addressable_shards}
    if whole and len(ranks) == 1:
        return _host(next(iter(shards.values())).data)
    boxes = [
        Box(offset, _host(shard.data), holders[offset])
        for offset, shard in sorted(shards.items())
        if shard.data.size > 0
    ]
    return Sharded(tuple(array.shape), tuple(boxes), ranks, None)


def _host(data: Any) -> Any:
    """Its memory, or a copy on the host."""
    return sys.modules["numpy"].asarray(data)


@functools.lru_cache(maxsize=1 << 14)
def _layout(
    sharding: Any, shape: tuple[int, ...]
) -> tuple[bool, tuple[int, ...], dict[Offset, tuple[int, ...]]]:
    """Whether each of its boxes is the whole; the processes that hold some; who holds each box."""
    holders: dict[Offset, set[int]] = {}
    whole = True
    for device, index in sharding.devices_indices_map(shape).items():
        holders.setdefault(_offset(index), set()).add(device.process_index)
        whole = whole and _size(index, shape) == shape
    ranks = sorted(set().union(*holders.values()))
    return whole, tuple(ranks), {at: tuple(sorted(who)) for at, who in holders.items()}


def _offset(index: tuple[slice, ...]) -> Offset:
    return tuple(part.start or 0 for part in index)


def _size(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


# -- back ------------------------------------------------------------------------------------


def targets(
    live: Any,
) -> tuple[dict[Offset, Any], Callable[[], Any]]:
    """Memory for what this process holds of an array like `live` (which may be abstract), by where
    it begins; and what makes the array of it.
    """
    jax, numpy = if_imported(), sys.modules["numpy"]
    shape, dtype = tuple(live.shape), live.dtype
    sharding = live.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    boxes: dict[Offset, Any] = {}
    devices = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        offset = _offset(index)
        if offset not in boxes:
            boxes[offset] = numpy.empty(_size(index, shape), dtype)
        devices.append((device, offset))

    def make() -> Any:
        parts = [jax.device_put(boxes[offset], device) for device, offset in devices]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return boxes, make


def array(memory: Any) -> Any:
    """An array of these values, which nobody changes any more."""
    return if_imported().numpy.asarray(memory)


def dtype_name(live: Any) -> str:
    """Its dtype as in safetensors."""
    tables = (_types.NUMPY_DTYPES, _types.ML_DTYPES)
    name = str(live.dtype)
    return next((known for table in tables for known, of in table.items() if of == name), name)


# -- trees -----------------------------------------------------------------------------------


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """(key, child) of a node of a tree whose class is registered with JAX; `None`: it is none."""
    jax = if_imported()
    if jax is None or jax.tree_util.all_leaves([node]):
        return None
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(_key(path[0]), child) for path, child in flat]


def rebuilt(node: Any, values: list[Any]) -> Any:
    """The node with these children."""
    jax = if_imported()
    treedef = jax.tree_util.tree_structure(node, is_leaf=lambda x: x is not node)
    return jax.tree_util.tree_unflatten(treedef, values)


def _key(entry: Any) -> Any:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            key = getattr(entry, name)
            return key if isinstance(key, str | int) else str(key)
    return str(entry)


# -- processes -------------------------------------------------------------------------------


def processes() -> tuple[int, int] | None:
    """(this process, how many), where jax.distributed is initialised."""
    jax = if_imported()
    if jax is None or "jax.distributed" not in sys.modules or not jax.distributed.is_initialized():
        return None
    return jax.process_index(), jax.process_count()


def shared(name: str, drawn: str | None, timeout_s: float = 120.0) -> str:
    """What process 0 has drawn, over the coordinator's store: no device takes part."""
    client = sys.modules["jax._src.distributed"].global_state.client
    if drawn is not None:
        client.key_value_set(name, drawn)
        return drawn
    told: str = client.blocking_key_value_get(name, int(timeout_s * 1000))
    return told
