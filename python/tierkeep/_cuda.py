"""CUDA tensors to slots of the ram tier and back: pinned memory, and a side stream of each device.

Out: each slot is registered with CUDA once, and every tensor is copied by DMA straight to its place
in the slot. The copy waits for what the caller's stream was given so far. The caller's stream waits
for the tensors that anybody may change after `save`; the optimizer's stream, for those that are
the optimizer's (`Stager.order`). The CPU waits for neither, but in `capture="now"`.

Back: groups of tensors are read, checked, into one of two pinned buffers, while the other one is on
its way to the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tierkeep.errors import InvalidError

if TYPE_CHECKING:
    from tierkeep._build import Key

logger = logging.getLogger("tierkeep")

# cudaHostRegisterPortable: for all devices of this process.
_PORTABLE = 1

# cudaErrorHostMemoryNotRegistered.
_NOT_REGISTERED = 713

# Two buffers of it (of the largest tensor, where that is larger) are held while a state is
# restored. A group costs some 0.2 ms beside its bytes, 32 MiB take about 3 ms to read and check.
_GROUP_BYTES = 32 << 20

# Each group is planned over all tensors and chunks: of a large state no more groups than this.
_GROUPS_MAX = 256

# Of a save: the core takes checksums of as much at a time.
_STAGE_BYTES = 128 << 20

# An event is looked at this often on the main thread: often enough not to be felt.
_POLL_SECONDS = 0.0002

# A tensor in a buffer begins at a multiple of it: a cache line, and any dtype.
_ALIGN = 64

#: What `Stager.bring` is given of each tensor: tensor, first byte in the slot, bytes, late.
Row = tuple[Any, int, int, bool]


class Stager:
    """Brings tensors of any CUDA device into slots."""

    def __init__(self) -> None:
        self._streams: dict[int, Any] = {}
        #: For each slot, by address: what its views are of, and they.
        self._views: dict[int, tuple[list[Any], list[Any]]] = {}
        #: For each device: the end of the last copy of late tensors.
        self._late: dict[int, Any] = {}
        self._told = False
        self._lock = threading.Lock()

    # -- slots -------------------------------------------------------------------------------

    def pin(self, device: str, address: int, nbytes: int) -> bool:
        """Registers a slot. False: CUDA refuses; copies to it work, and take longer."""
        torch = sys.modules["torch"]
        # The runtime makes a context on the current device, which elsewhere would be another's.
        with torch.cuda.device(device):
            try:
                error = torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE)
                why = torch.cuda.cudart().cudaGetErrorString(error) if int(error) else None
            except RuntimeError as raised:
                why = str(raised).splitlines()[0]
            if why is not None:
                _take_error(torch, device)
        if why is not None and not self._told:
            self._told = True
            logger.warning(
                "a slot of %.1f MiB could not be pinned (%s): saves of CUDA tensors take longer",
                nbytes / 2**20,
                why,
            )
        return why is None

    def unpin(self, device: str, address: int) -> bool:
        """Takes a slot back from CUDA. False: it may still know it."""
        with self._lock:
            self._views.pop(address, None)
        torch = sys.modules.get("torch")
        if torch is None:
            return False  # The interpreter is at its end.
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostUnregister(address))
            if error:
                _take_error(torch, device)
        return error in (0, _NOT_REGISTERED)

    # -- one save ----------------------------------------------------------------------------

    def bring(self, address: int, nbytes: int, rows: Sequence[Row]) -> Landing:
        """Begins to copy each tensor to its place in the slot, those that are not late first."""
        torch = sys.modules["torch"]
        views = self._views_of(torch, address, nbytes, rows)
        pairs = list(zip(rows, views, strict=True))
        landing = Landing(rows)
        try:
            for device in sorted({row[0].device.index for row in rows}):
                here = [pair for pair in pairs if pair[0][0].device.index == device]
                self._bring(torch, device, here, landing)
        except BaseException as failure:
            # What has begun must not arrive in somebody else's slot: it is waited for all the same.
            landing.failure = failure
            for device, stream in self._streams.items():
                with contextlib.suppress(RuntimeError):
                    landing.add(torch, device, stream, 0)
        return landing

    def _bring(
        self, torch: Any, device: int, pairs: Sequence[tuple[Row, Any]], landing: Landing
    ) -> None:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, current = self._streams[device], torch.cuda.current_stream(device)
        stream.wait_stream(current)
        event = None
        with torch.cuda.stream(stream), torch.no_grad():
            for late in (False, True):
                for stage in _stages([pair for pair in pairs if pair[0][3] == late]):
                    tensors = [row[0] for row, _ in stage]
                    # One call: a loop of Python's takes three times as long to say the same.
                    torch._foreach_copy_([view for _, view in stage], tensors, non_blocking=True)
                    for tensor in tensors:
                        # Its memory is not given to another tensor before the copy is done.
                        tensor.record_stream(stream)
                    event = landing.add(torch, device, stream, stage[0][0][1])
                if not late and event is not None:
                    current.wait_event(event)
        # Copies of one stream end in order: after the last one, all have.
        self._late[device] = event

    def order(self) -> None:
        """Whatever the current streams are given from here on comes after the copies of late
        tensors. The CPU does not wait.
        """
        if not self._late:
            return
        torch = sys.modules["torch"]
        if torch.cuda.is_current_stream_capturing():
            raise InvalidError(
                "a copy of the state may be under way while a CUDA graph is captured: call "
                "`fence` before the capture, and before each replay that changes guarded tensors"
            )
        for device, event in self._late.items():
            torch.cuda.current_stream(device).wait_event(event)

    def settled(self) -> None:
        """No copy is under way any more."""
        self._late.clear()

    def _views_of(self, torch: Any, address: int, nbytes: int, rows: Sequence[Row]) -> list[Any]:
        """The tensors' places in the slot, as tensors. Kept while the state keeps its form."""
        form = [(offset, size, t.dtype, t.shape) for t, offset, size, _ in rows]
        with self._lock:
            kept = self._views.get(address)
            if kept is not None and kept[0] == form:
                return kept[1]
        memory = (ctypes.c_char * nbytes).from_address(address)
        # They outlive a block of the script's in which they would be tensors of another kind.
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            views = [
                whole[offset : offset + size].view(dtype).view(shape)
                for offset, size, dtype, shape in form
            ]
        with self._lock:
            self._views[address] = (form, views)
        return views


class Landing:
    """Copies that are under way: stages, each with the first byte that it writes, and its end."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._stages: list[tuple[int, int, Any]] = []
        #: What went wrong after the first of them had begun; raised once.
        self.failure: BaseException | None = None
        # Memory that is not torch's own is kept by nothing but its tensor.
        self._rows = rows

    def add(self, torch: Any, device: int, stream: Any, first: int) -> Any:
        """A stage ends where the stream is now; its event."""
        # Waiting threads sleep: the cores are the training's.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        self._stages.append((first, device, event))
        return event

    def wait(self, upto: int) -> None:
        """Returns when the stages that begin before byte `upto` are done. Called again after an
        exception, it waits for the rest.
        """
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        for stage in [stage for stage in self._stages if stage[0] < upto]:
            try:
                _wait(stage[1], stage[2])
            except RuntimeError:
                self._stages.clear()  # CUDA is at its end in this process: nothing arrives.
                raise
            self._stages.remove(stage)


def _wait(device: int, event: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        # Python's signal handlers run in between.
        while not event.query():
            time.sleep(_POLL_SECONDS)
        return
    # On a thread of ours the current device is another's, and CUDA would make a context there.
    with sys.modules["torch"].cuda.device(device):
        event.synchronize()


def _take_error(torch: Any, device: str) -> None:
    """CUDA keeps the error of a refusal for this thread's next launch: this one takes it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def _stages(pairs: Sequence[tuple[Row, Any]]) -> Iterator[Sequence[tuple[Row, Any]]]:
    """Neighbours, whose checksums are taken while the next stage is on its way."""
    begin = 0
    for at, (row, _) in enumerate(pairs):
        if row[1] + row[2] - pairs[begin][0][1] >= _STAGE_BYTES or at + 1 == len(pairs):
            yield pairs[begin : at + 1]
            begin = at + 1


# -- back ------------------------------------------------------------------------------------


def land(wanted: dict[Key, list[Any]]) -> Iterator[Sequence[tuple[Key, Any]]]:
    """Brings tensors of a checkpoint into tensors on devices: the turns of one `read`.
    Each is in pinned memory, and on its way to the devices when the next one is asked for.
    """
    torch = sys.modules["torch"]
    groups = list(_groups({name: _size(lives[0]) for name, lives in wanted.items()}))
    room = max(sum(_room(size) for _, size in group) for group in groups)
    buffers = [
        torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=True)
        for _ in range(min(2, len(groups)))
    ]
    on_their_way: list[list[Any]] = [[] for _ in buffers]
    for turn, group in enumerate(groups):
        buffer, events = buffers[turn % 2], on_their_way[turn % 2]
        while events:
            events.pop().synchronize()
        at, targets = 0, []
        for name, size in group:
            live = wanted[name][0]
            view = buffer[at : at + size].view(live.dtype).view(live.shape)
            targets.append((name, view))
            at += _room(size)
        yield targets
        devices = set()
        with torch.no_grad():
            for name, view in targets:
                for live in wanted[name]:
                    live.detach().copy_(view, non_blocking=True)
                    devices.add(live.device)
        for device in devices:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            events.append(event)
    for events in on_their_way:
        for event in events:
            event.synchronize()


def _size(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())


def _room(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _groups(sizes: dict[Key, int]) -> Iterator[list[tuple[Key, int]]]:
    """Neighbours, up to a group's size together; one at least."""
    most = max(_GROUP_BYTES, sum(sizes.values()) // _GROUPS_MAX)
    group: list[tuple[Key, int]] = []
    total = 0
    for name, size in sizes.items():
        if group and total + _room(size) > most:
            yield group
            group, total = [], 0
        group.append((name, size))
        total += _room(size)
    if group:
        yield group
