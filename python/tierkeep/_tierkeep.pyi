"""The Rust side. What people use of it is exported by `tierkeep`; the rest is for the files beside
this one.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self, final

from tierkeep._build import Key

__all__ = [
    "Events",
    "Found",
    "Handle",
    "Progress",
    "Reader",
    "Save",
    "command",
    "decode_tree",
    "describe",
    "encode_tree",
    "join_path",
    "ml_dtypes",
    "numpy_dtypes",
    "split_path",
    "torch_dtypes",
]

@final
class Progress:
    """Numbers of one save, as they were when they were asked for.

    Attributes:
        step: completed training steps.
        rank: this process.
        bytes: bytes of this rank's shard.
        peer_bytes: sent to other nodes so far, all copies together.
        disk_bytes: of them, written to disk so far.
        object_bytes: of them, sent to the bucket so far.
        staged: the state may be changed again.
        ram: the whole checkpoint survives the process.
        peer: the whole checkpoint survives the loss of nodes: others hold copies of every shard.
        disk: the whole checkpoint survives a reboot.
        object: the whole checkpoint survives the cluster: it is sealed in the bucket.
        skipped: why nothing was saved, where the step was passed over.
        error: the first failure, with its causes.
        done: nothing more will change.
    """

    @property
    def step(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def peer_bytes(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def object_bytes(self) -> int: ...
    @property
    def staged(self) -> bool: ...
    @property
    def ram(self) -> bool: ...
    @property
    def peer(self) -> bool: ...
    @property
    def disk(self) -> bool: ...
    @property
    def object(self) -> bool: ...
    @property
    def skipped(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def done(self) -> bool: ...

@final
class Save:
    """One checkpoint on its way out. Returned by `Checkpointer.save`.

    Until `staged` returns, tensors of guarded optimizers must not be changed in place. Until
    `wait("disk")` returns, a reboot of the machine loses this checkpoint, but never an older one
    that is on disk.
    """

    @property
    def step(self) -> int:
        """Completed training steps."""

    @property
    def is_due_for_disk(self) -> bool:
        """Its step is one of those that go to disk."""

    @property
    def is_due_for_object(self) -> bool:
        """Its step is one of those that go to the bucket."""

    def staged(self, timeout_s: float | None = None) -> Self:
        """Waits until the copy is taken: from then on the state may be changed in place.

        Raises:
            DeadlineError: not within `timeout_s` seconds (None: an hour).
            TierkeepError: the save failed.
        """

    def wait(
        self,
        level: Literal["staged", "ram", "peer", "disk", "object"] | str,
        timeout_s: float | None = None,
        scope: Literal["checkpoint", "shard"] | str = "checkpoint",
    ) -> Self:
        """Waits until the checkpoint, every rank's shard, is as durable as `level` says; with
        `scope="shard"`, this rank's shard alone. A rank that does not save has none: there, both
        are the checkpoint.

        Raises:
            DeadlineError: not within `timeout_s` seconds (None: an hour); it names the ranks that
                were missing.
            UnavailableError: the step was passed over or given up, or there is no bucket. For
                `"peer"` at once where there are no other nodes, or `replicas=0`; where too few are
                alive, after `peer_wait_s`.
            InvalidError: there is no such tier, or the step does not go to disk.
            TierkeepError: the save failed.
        """

    def progress(self) -> Progress:
        """The numbers now. Never waits."""

@final
class Found:
    """One rank's shard of one checkpoint."""

    @property
    def step(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def tree(self) -> Any:
        """The tree, with marks of `tierkeep._saved` where something must still be made."""

    @property
    def rank(self) -> int:
        """The rank whose shard it is."""

    @property
    def other_ranks(self) -> list[int]:
        """The other ranks that saved the checkpoint."""

    def others(self) -> list[Found]:
        """Their shards."""

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names to (dtype as in safetensors, shape); of a tensor that is cut, the whole, as the
        tree names it (`path#`).
        """

    @property
    def boxes(self) -> list[tuple[str, list[int], list[int]]]:
        """The boxes in it: (the name of all of the tensor's, `path#`; offset; shape)."""

    @property
    def elsewhere(self) -> dict[str, int]:
        """Names of tensors that other ranks store, to the rank."""

    @property
    def meta(self) -> dict[str, Any]:
        """`metrics`, `tags`, `saved_unix_ms`."""

    def read(
        self, turns: Iterable[Sequence[tuple[Key, Any]]], threads: int | None = None
    ) -> tuple[str, list[str]]:
        """Copies each tensor or box into the torch tensor or numpy array beside it: of its dtype
        and shape, on the CPU, sharing no memory with another of its turn. A turn is filled before
        the next one is asked for. Returns the tier that most bytes came from, and a sentence for
        each damaged copy.
        """

@final
class Reader:
    """The tiers of one run, for reading."""

    def __new__(
        cls,
        destination: str | os.PathLike[str],
        ram_dir: str | os.PathLike[str] | None = None,
        options: dict[str, str] | None = None,
    ) -> Self: ...
    def choose(
        self,
        step: int | None = None,
        attempt: int | None = None,
        ranks: Sequence[int] | None = None,
    ) -> tuple[list[tuple[int, Found]], list[str]]:
        """The checkpoint that a resume would take, or the one that is named: its shards by rank,
        and a sentence for each newer one that was passed over.
        """

    def choose_for(self, rank: int, step: int | None = None, attempt: int | None = None) -> Found:
        """The same for one rank, which need not be one of those that saved."""

    def steps(self) -> list[dict[str, Any]]:
        """Every checkpoint that any tier holds a part of, oldest first."""

@final
class Events:
    """The events of one handle, pulled."""

    def next(
        self, timeout_s: float
    ) -> tuple[Literal["info", "warning", "error"], str, str, int | None] | None:
        """The next event, waiting up to `timeout_s` seconds: (severity, kind, text, step).

        Raises:
            StopIteration: the handle is closed and all is told.
        """

@final
class Handle:
    """One rank's handle on a run."""

    def __new__(
        cls,
        destination: str | os.PathLike[str],
        settings: dict[str, Any],
        allow_pickle: set[str],
        stager: Any,
    ) -> Self: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def attempt(self) -> int | None: ...
    @property
    def shard_rank(self) -> int:
        """Whose shard this rank restores: its own where it saves."""

    def begin(
        self,
        how: Literal["newest", "older", "rollback", "fresh", "new"] | str,
        step: int | None = None,
        attempt: int | None = None,
    ) -> Found | None:
        """Decides where this attempt begins and records it; the shard to restore."""

    def prepare(self, state: Any) -> None: ...
    def agree_on_init(self, wish: str) -> str:
        """Which checkpoint of another run all ranks begin with."""

    def tell_init(self, text: str) -> None: ...
    def save(
        self,
        step: int,
        state: Any,
        meta: tuple[dict[str, float], list[str]],
        skip_if_busy: bool,
        guarded: list[Any] | None,
    ) -> Save: ...
    def fence(self, timeout_s: float) -> bool: ...
    def fence_host(self, timeout_s: float) -> bool: ...
    def stop_requested(self, step: int, every: int, asked: bool) -> bool: ...
    def close(self, timeout_s: float, now: bool, failed: bool = False) -> bool: ...
    def pin(self, step: int, pinned: bool) -> None: ...
    def reader(self) -> Reader: ...
    def events(self) -> Events: ...
    def counters(self) -> dict[str, float]: ...

def command(arguments: Sequence[str]) -> int:
    """Runs the command `tierkeep` with these arguments, the program's name first."""

def describe(tensor: Any) -> dict[str, Any]:
    """What a torch tensor or numpy array is: `dtype` (as in safetensors), `shape`, `device`, `span`
    (the addresses of its first byte and the one after its last), `contiguous`, `writable`.
    """

def encode_tree(state: Any, allow_pickle: set[str] = ...) -> str:
    """The typed JSON that a state's tree is stored as."""

def decode_tree(json: str) -> Any:
    """The marked tree that this typed JSON encodes."""

def join_path(keys: Iterable[Any]) -> str:
    """The escaped path of the place that these keys lead to."""

def split_path(path: str) -> list[Any]:
    """The keys that lead to the place with this path; a key that is neither str nor int is a tuple
    of its typed JSON.
    """

def torch_dtypes() -> dict[str, str]:
    """Element types by their names in manifests, as attributes of torch."""

def ml_dtypes() -> dict[str, str]:
    """Element types by their names in manifests, as attributes of ml_dtypes."""

def numpy_dtypes() -> dict[str, str]:
    """Element types by their names in manifests, as attributes of numpy."""
