"""Tensors of which each rank holds boxes: torch's DTensor, and what speaks the protocol of its
distributed checkpoints (`__create_chunk_list__`, `__get_tensor_shard__`).

torch is never imported here: whoever has such a tensor has done so.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

from tierkeep.errors import InvalidError


class Box(NamedTuple):
    """What this rank holds in one place of a tensor."""

    #: Where it begins in the whole, in elements.
    offset: tuple[int, ...]
    #: The plain tensor that has its elements.
    local: Any
    #: The ranks that hold the same, this one among them, rising; empty: nobody knows.
    ranks: tuple[int, ...]


class Sharded(NamedTuple):
    """A tensor as this rank holds it."""

    #: Of the whole, in elements.
    shape: tuple[int, ...]
    #: Those without elements are left out.
    boxes: tuple[Box, ...]
    #: All ranks that hold some of it, rising; empty: nobody knows.
    ranks: tuple[int, ...]
    #: What is the same while the boxes are where they are; `None`: nothing is known to be.
    layout: Any


class Pieces:
    """A tensor of which this rank has boxes, put together by hand."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, dtype
        self.boxes: list[Box] = []

    def __create_chunk_list__(self) -> list[Any]:
        raise NotImplementedError("only tierkeep saves these")


def look(tensor: Any) -> Sharded | None:
    """What this rank holds of `tensor`; `None`: it is no such tensor.

    Raises:
        InvalidError: its local tensor is not a part of its value (a `Partial` placement), or not
            one that lies in a box.
    """
    if not hasattr(type(tensor), "__create_chunk_list__"):
        return None
    if isinstance(tensor, Pieces):
        return Sharded(tensor.shape, tuple(tensor.boxes), (), None)
    mesh = getattr(tensor, "device_mesh", None)
    local: Any = getattr(tensor, "_local_tensor", None)
    if mesh is None or local is None or hasattr(local, "__create_chunk_list__"):
        return _by_protocol(tensor)
    shape = tuple(tensor.shape)
    offset, size, alike, ranks = _place(shape, mesh, tuple(tensor.placements))
    if 0 in size or not alike:
        return Sharded(shape, (), ranks, tensor._spec)
    if hasattr(local, "wait"):  # It is still being gathered.
        local = local.wait()
    if tuple(local.shape) != size:
        raise InvalidError(f"a DTensor of local shape {tuple(local.shape)}, which should be {size}")
    return Sharded(shape, (Box(offset, local, alike),), ranks, tensor._spec)


@functools.lru_cache(maxsize=1 << 16)
def _place(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(offset, shape) of the local tensor, the ranks that hold the same, all ranks of the mesh."""
    utils = sys.modules["torch"].distributed.tensor._utils
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # Another rank's.
        return (), (0,), (), ranks
    for placement in placements:
        if placement.is_partial():
            raise InvalidError(
                "a DTensor that is not reduced yet (a Partial placement): "
                "store `tensor.redistribute(...)` with other placements"
            )
    size, offset = utils.compute_local_shape_and_global_offset(shape, mesh, placements)
    same = [
        slice(None) if placement.is_replicate() else index
        for placement, index in zip(placements, coordinate, strict=True)
    ]
    alike = tuple(sorted(mesh.mesh[tuple(same)].flatten().tolist()))
    return tuple(map(int, offset)), tuple(map(int, size)), alike, ranks


def _by_protocol(tensor: Any) -> Sharded:
    index_of = sys.modules["torch"].distributed.checkpoint.metadata.MetadataIndex
    boxes = []
    for index, chunk in enumerate(tensor.__create_chunk_list__()):
        if 0 not in chunk.sizes:
            local = tensor.__get_tensor_shard__(index_of("", chunk.offsets, index))
            boxes.append(Box(tuple(chunk.offsets), local, ()))
    return Sharded(tuple(tensor.shape), tuple(boxes), (), None)


def empty_like(tensor: Any, dtype: Any) -> Any:
    """New memory for what this rank holds, on the same device, cut in the same way."""
    torch = sys.modules["torch"]
    with torch.no_grad():
        return torch.empty_like(tensor.detach(), dtype=dtype)
