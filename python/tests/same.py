"""Equality that tells a bit and a type apart, and leaves no doubt where."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy
import torch


def bits(x: float) -> bytes:
    return struct.pack("<d", x)


def same(a: Any, b: Any) -> bool:
    """`a` and `b` have the same types and the same bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same_tensor(a, b)
    if isinstance(a, numpy.ndarray | numpy.generic):
        # An empty str or bytes of numpy has no bytes, and gives some of its neighbour's.
        bits_of = (lambda x: x.tobytes()) if a.dtype.itemsize else (lambda x: b"")
        return bool(a.dtype == b.dtype and a.shape == b.shape and bits_of(a) == bits_of(b))
    if isinstance(a, float):
        return bits(a) == bits(b)
    if isinstance(a, complex):
        return bits(a.real) == bits(b.real) and bits(a.imag) == bits(b.imag)
    if isinstance(a, dict):
        if getattr(a, "default_factory", None) is not getattr(b, "default_factory", None):
            return False
        rows = zip(a.items(), b.items(), strict=True) if len(a) == len(b) else None
        return rows is not None and all(same(i, j) for i, j in rows)
    if isinstance(a, set | frozenset):
        # By no order: equal sets of sets may have different reprs.
        left = list(b)
        for i in a:
            found = next((k for k, j in enumerate(left) if same(i, j)), None)
            if found is None:
                return False
            del left[found]
        return not left
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if getattr(a, "maxlen", None) != getattr(b, "maxlen", None):
        return False
    if isinstance(a, list | tuple) or hasattr(a, "maxlen"):
        return len(a) == len(b) and all(same(i, j) for i, j in zip(a, b, strict=True))
    return bool(a == b)


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape, a.requires_grad) != (b.dtype, b.shape, b.requires_grad):
        return False
    return raw(a) == raw(b)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def fingerprint(state: Any) -> Any:
    """Everything that must come back, as plain values: two fingerprints are compared with ==."""
    if isinstance(state, torch.Tensor):
        return ("torch", str(state.dtype), tuple(state.shape), raw(state))
    if isinstance(state, numpy.ndarray):
        return ("numpy", str(state.dtype), state.shape, state.tobytes())
    if hasattr(state, "state_dict") and not isinstance(state, type):
        return (type(state).__name__, fingerprint(state.state_dict()))
    if isinstance(state, dict):
        return {key: fingerprint(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [fingerprint(value) for value in state]
    if isinstance(state, float):
        return bits(state)
    return (type(state).__name__, repr(state))
