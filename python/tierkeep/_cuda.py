"""CUDA tensors on their way to the host: a side stream of each device, and pinned buffers that are
kept from save to save.

The copy waits for what the caller's stream was given so far, and the caller's stream does not wait
for the copy. The buffers belong to tierkeep: nobody writes to them until the next save.
"""

from __future__ import annotations

import sys
import time
from typing import Any

# A device's event is looked at this often: often enough not to be felt, and Python's signal
# handlers run in between.
_POLL_SECONDS = 0.0002


class Stager:
    """Brings tensors of any CUDA device into pinned memory."""

    def __init__(self) -> None:
        self._buffers: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    def __call__(self, tensors: list[Any]) -> list[Any]:
        """One contiguous tensor in pinned memory for each of `tensors`, same dtype and shape."""
        torch = sys.modules["torch"]
        buffers = [self._buffer(torch, place, tensor) for place, tensor in enumerate(tensors)]
        events = []
        for device in sorted({tensor.device.index for tensor in tensors}):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), torch.no_grad():
                for tensor, buffer in zip(tensors, buffers, strict=True):
                    if tensor.device.index == device:
                        buffer.copy_(tensor.detach(), non_blocking=True)
                        # Its memory is not given to another tensor before the copy is done.
                        tensor.record_stream(stream)
                event = torch.cuda.Event()
                event.record(stream)
            events.append(event)
        for event in events:
            while not event.query():
                time.sleep(_POLL_SECONDS)
        return buffers

    def _buffer(self, torch: Any, place: int, tensor: Any) -> Any:
        kept = self._buffers.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[place] = kept
        return kept
