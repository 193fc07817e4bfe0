"""`Checkpointer`: one rank's hand on a run."""

from __future__ import annotations

import logging
import operator
import os
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from tierkeep import _agent, _ending, _ranks, _replicas, _stop
from tierkeep._address import bucket, directory, of_disk, places
from tierkeep._build import Include
from tierkeep._checks import at_least_one, names, one_of, setting, words
from tierkeep._cuda import Stager
from tierkeep._events import Callback, Teller
from tierkeep._facts import Restored, StepInfo
from tierkeep._filling import Strict
from tierkeep._guarded import FENCE_SECONDS, Guarded
from tierkeep._init import Origin
from tierkeep._rename import Rename
from tierkeep._restore import Wish, planned
from tierkeep._saves import Saves, disk_failures, failure, most_durable, not_there
from tierkeep._tierkeep import Found, Handle, Save
from tierkeep.errors import BugError, DeadlineError, FencedError, InvalidError, TierkeepError

if TYPE_CHECKING:
    from tierkeep._replicas import Replicated

logger = logging.getLogger("tierkeep")

# A clean end waits this long for the last checkpoint to reach disk.
_CLOSE_SECONDS = 1800.0
# After an exception, the process wants to end.
_HURRY_SECONDS = 5.0

Level = Literal["ram", "peer", "disk", "object"]


class Checkpointer:
    """Saves the state of a training job, and brings it back after any failure.

        state = {"model": model, "optim": optimizer, "sched": scheduler, "rng": tierkeep.Rng()}
        with tierkeep.Checkpointer("/ckpt/llama-7b", every=50) as ckpt:
            found = ckpt.restore(state)                     # newest step, nearest tier; or None
            for step in range(found.step if found else 0, total):
                train(state)
                ckpt.step(step + 1, state)                  # saves if due; `save` saves now

    A `step` is a number of completed training steps. The state is any tree of tensors (torch,
    JAX, numpy), plain values, and objects with `state_dict` and `load_state_dict` at any depth, the
    recommended form. A save copies it to RAM (files in /dev/shm, which survive the process),
    and from there to disk and to a bucket while training goes on; where the node has an agent, also
    after this process died.

    What is not given is looked for in the environment, `TIERKEEP_` and the name in capitals; then
    there is a default.

    Args:
        destination: the run, `<root>/<run>`: a directory that all ranks share, or one of the same
            name on each node, where the nodes' agents know of each other; or its place in a bucket,
            as in `s3://bucket/root/run` (`gs://`, `az://`; `file://` for a shared file system).
        disk: for a destination in a bucket: this node's directory for `<run>` on its way there.
            Default: none; then checkpoints go to the bucket from RAM.
        storage_options: for the bucket, under the names that Rust's `object_store` uses, as in
            `{"aws_endpoint": "http://host:9000"}`; beside what AWS_*, GOOGLE_* or AZURE_* say.
        every: `step` saves steps that are divisible by it; default: 1.
        rank, world_size: this process of the job's. Default: torch.distributed or jax.distributed
            if initialised; what torchrun, mpirun, srun, Kubeflow, an indexed Job set; else alone.
        ranks: those that save, the same list on all; default: every one. Where all ranks have the
            same state, as with DDP, `[0]`. On the others `save` copies nothing and what it returns
            follows the checkpoint of those that save; they restore the state of the nearest of
            these below them (below the first, the first's).
        replicated: tensors that several ranks hold alike; the same on all ranks. They are stored
            once, shared out over these ranks, and brought back to all of them. Every save compares
            their checksums: where one differs, the checkpoint is not made and the error names
            tensor and ranks. True: every tensor, over all ranks that save; patterns over paths, as
            in `["model/*"]`; ranks or a process group; or a mapping from patterns to one of these,
            False for what each rank has alone, as BatchNorm's running statistics and random number
            states (the first that matches counts). Plain values are every rank's own. Only for
            tensors in memory of the host.
        attempt_id: 32 hex digits, drawn anew at each start of the job and the same on all ranks.
            Default: broadcast once over an initialised process group, else found on the host.
        agent: the socket of the node's agent, which then owns the ram tier and carries on when this
            process is gone; False: none. Default: the one that listens, else this process is its
            own. What it is stays: while an agent is away, training goes on and it is looked for.
        ram_dir: where the ram tier keeps its files; a directory on tmpfs that jobs may share.
            Default: /dev/shm/tierkeep-<uid>. With an agent it is the agent's to say.
        ram_bytes_max: limit of all files below `ram_dir`. Default: a share of what is free.
        replicas: copies of every rank's shard that other nodes hold in RAM, so that as many nodes
            can be lost at once; 16 at most. Default: 1 where the agent has others (`gossip`), else
            none.
        slots: snapshots that RAM holds for this rank: 2 or more, 3 without a disk.
        disk_every: steps that are divisible by it go to disk.
        keep_last, keep_every: newest checkpoints, and steps divisible by it, that stay on disk.
        object_every: steps that are divisible by it go on to the bucket, one at a time: a slow one
            gets fewer checkpoints, each of them whole. Default: `disk_every`.
        object_every_minutes: of these not more than one in so many minutes. Default: no limit.
        object_keep_last, object_keep_every: as on disk; default: 3, none.
        object_keep_hours: the first of each period of so many hours stays there too.
        object_bytes_per_second_max: limit of what this rank sends there.
        object_compress: floats are compressed on their way there, where that gains something.
        capture: `"now"` (the default): `save` returns when everything is copied. `"overlap"`:
            tensors of the optimizers given to `guard` are copied behind; their next step waits.
        busy: what a save does while every slot is in use: `"wait"` (the default), or `"skip"` the
            step.
        fresh: begin at step 0, and abandon the checkpoints that are there.
        init_from: what `restore` begins with where it finds no checkpoint of this run, at step 0:
            another run's newest checkpoint, or a `.safetensors` file. Once this run has a
            checkpoint it is not looked at any more. See `restore`.
        max_failures: after so many failed saves in a row, the next one raises the last error.
        threads: of a copy. Default: as many as help.
        allow_pickle: `module:Name` of types whose instances may be pickled, and unpickled again.
        timeouts_s: seconds by name, over the defaults: `lock_wait_s`, `attempt_wait_s`,
            `slot_wait_s`, `peer_wait_s`, `disk_wait_s`, `object_wait_s`, `object_grace_s`.

    Raises:
        InvalidError: an argument is not what it must be, or the destination cannot be used.
        FencedError: another live process has this rank of this run; it names its pid.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        disk: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, str] | None = None,
        every: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        ranks: Iterable[int] | None = None,
        replicated: Replicated | None = None,
        attempt_id: str | None = None,
        agent: _agent.Wish = None,
        ram_dir: str | os.PathLike[str] | None = None,
        ram_bytes_max: int | None = None,
        replicas: int | None = None,
        slots: int | None = None,
        disk_every: int | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        object_every: int | None = None,
        object_every_minutes: int | None = None,
        object_keep_last: int | None = None,
        object_keep_every: int | None = None,
        object_keep_hours: int | None = None,
        object_bytes_per_second_max: int | None = None,
        object_compress: bool | None = None,
        capture: Literal["now", "overlap"] | None = None,
        busy: Literal["wait", "skip"] | None = None,
        fresh: bool = False,
        init_from: str | os.PathLike[str] | None = None,
        max_failures: int | None = None,
        threads: int | None = None,
        allow_pickle: Iterable[str] = (),
        timeouts_s: Mapping[str, float] | None = None,
    ) -> None:
        said = dict(locals())
        path, url = places(destination, disk)
        self._init_from = None if init_from is None else directory(init_from)
        self.every = at_least_one("every", setting("every", every, 1))
        captures, busies = ("now", "overlap"), ("wait", "skip")
        self._capture = one_of("capture", setting("capture", capture, "now"), captures)
        self._skip_if_busy = one_of("busy", setting("busy", busy, "wait"), busies) == "skip"
        self._fresh = fresh
        limit = setting("max_failures", max_failures, sys.maxsize)
        self._max_failures = at_least_one("max_failures", limit)
        self._allow_pickle = names(allow_pickle)
        self._threads = threads
        self._ram_dir = None if ram_dir is None else os.fspath(ram_dir)
        self._ranks = _ranks.detect(rank, world_size)
        savers = _ranks.savers(ranks, self._ranks)
        settings: dict[str, object] = {
            "rank": self._ranks.rank,
            "world_size": self._ranks.world_size,
            "savers": savers,
            "replicated": _replicas.rules(replicated, savers),
            "attempt_id": attempt_id or _ranks.shared_attempt_id(self._ranks),
            "agent": _agent.wish(agent, ram_dir, ram_bytes_max),
            "ram_dir": self._ram_dir,
            "ram_bytes_max": ram_bytes_max,
            "replicas": replicas,
            "slots": slots,
            **of_disk((path, url), said),
            **bucket((path, url, storage_options), said),
            "threads": threads,
            **(timeouts_s or {}),
        }
        self._stager = Stager()
        self._handle = Handle(path, settings, self._allow_pickle, self._stager)
        self._pid = os.getpid()
        self._begun = False
        # The newest step that this rank was called with.
        self._newest = 0
        self._closed = False
        self._guarded = Guarded(self._handle, self._stager)
        self._saves = Saves()
        self._teller = Teller(self._handle.events(), self.rank, self.world_size)
        self._teller.callbacks.append(disk_failures(weakref.ref(self._saves)))
        _ending.remember(self)

    # -- what it is --------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process among those of the job."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """How many processes the job has."""
        return self._ranks.world_size

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in force, defaults and environment included."""
        return self._handle.settings

    @property
    def last_error(self) -> TierkeepError | None:
        """The error of the last save that failed, if one has."""
        if os.getpid() == self._pid:
            self._saves.settle()
        return self._saves.last_error

    def counters(self) -> dict[str, float]:
        """Sums since this handle was opened: saves, bytes, seconds, failures."""
        return self._handle.counters()

    def __repr__(self) -> str:
        agent = self.settings["agent"]
        mode = "embedded" if agent is None else f"with the agent at {os.fsdecode(agent)}"
        mode = mode if os.getpid() == self._pid else f"of process {self._pid}"
        mode = mode if self.rank in self.settings["savers"] else f"{mode}, does not save"
        return (
            f"Checkpointer({self._handle.settings['destination']!r}, rank {self.rank} of "
            f"{self.world_size} ({self._ranks.source}), {mode}, every={self.every}, "
            f"capture={self._capture!r}{', closed' if self._closed else ''})"
        )

    # -- saving ------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
    ) -> Save | None:
        """Saves `state` if `step` is divisible by `every`; else returns None at once."""
        number = self._completed(step)
        if number % self.every:
            return None
        return self.save(number, state, metrics=metrics, tags=tags)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
    ) -> Save:
        """Saves `state` as the state after `step` completed training steps.

        Returns when the copy is taken, or with `capture="overlap"` when everything but the guarded
        optimizers' tensors is copied (on CUDA: when whatever the current stream is given from now
        on comes after that copy). A save that fails later is logged at ERROR, kept in
        `last_error` and raised by the `wait` of what is returned; training goes on. A second save
        of one step returns the first.

        Args:
            step: completed training steps; rises from save to save.
            state: the same tree each time.
            metrics: numbers to keep beside it.
            tags: words to keep beside it.

        Raises:
            InvalidError: something in the state cannot be stored (the message has its path), or
                the run has checkpoints and neither `restore` nor `fresh=True` was said.
            FencedError: a newer attempt has taken over, or this is a forked child.
            TierkeepError: the last `max_failures` saves have failed.
        """
        number = self._completed(step)
        self._raise_if_failing()
        self._begin_if_new()
        said = ({k: float(v) for k, v in (metrics or {}).items()}, words("tags", tags))
        guarded = self._guarded.live() if self._capture == "overlap" else None
        save = self._handle.save(number, state, said, self._skip_if_busy, guarded)
        self._saves.add(save)
        return save

    def prepare(self, state: Any) -> None:
        """Sizes the slots for `state` and puts their memory in place behind, so that not even the
        first save waits for page faults. `restore` does it too; an optimizer has its full size only
        after its first step.

        Raises:
            InvalidError: the memory budget is too small (the message has the sum), or something
                in the state cannot be stored.
        """
        self._handle.prepare(state)

    def guard(self, *optimizers: Any) -> None:
        """Makes `optimizers` wait for the copy that `capture="overlap"` takes behind.

        Their parameters and state may be copied while forward and backward run; before one of
        them steps, or loads a state, it waits. On CUDA the stream that it steps on waits, not the
        CPU. Whoever else writes to these tensors in place calls `fence` first: so does a script
        before it captures a CUDA graph, and before it replays one that changes them.

        Args:
            optimizers: of torch, with `register_step_pre_hook`.

        Raises:
            InvalidError: one of them has no such hook.
        """
        for optimizer in optimizers:
            self._guarded.add(optimizer)

    def fence(self, timeout_s: float = FENCE_SECONDS) -> None:
        """Waits until no copy is being taken behind: then any tensor may be changed in place.

        Raises:
            DeadlineError: the copy took longer than `timeout_s` seconds.
        """
        if os.getpid() != self._pid:
            return
        if not self._handle.fence(timeout_s):
            raise DeadlineError(f"the copy of the state did not end within {timeout_s} s")
        self._stager.settled()

    # -- restoring ---------------------------------------------------------------------------

    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        attempt: int | None = None,
        rollback: bool = False,
        read_only: bool = False,
        accept_older: bool = False,
        strict: Strict = True,
        include: Iterable[str] | None = None,
        rename: Rename | None = None,
    ) -> Restored | None:
        """Brings `state` back: the newest complete checkpoint, from the nearest tier.

        Bytes go straight into live tensors; what does not exist yet (a fresh optimizer's moments)
        is made; values are put back through their owner without a cast; mutable containers are
        updated. Names, shapes and dtypes are checked first: where anything differs, nothing is
        changed. The first call also begins this attempt, on all ranks.

        Where there is no checkpoint and `init_from` was given, the weights there are taken: the
        tensors of torch modules, and those that lie in `state` itself. Names match by path; the
        names in a plain file may also be those inside the one module of `state`. What only one
        side has is left alone, one tensor at least must match. Optimizers, other objects and plain
        values stay as they are, but for those of another run that `include` names. `include` and
        `rename` are for whatever is restored: later starts that go on from this run's own
        checkpoints leave them out (ask `latest_step` first).

        Args:
            state: the tree, as it is given to `save`.
            step: this step instead of the newest. A step that is not the newest needs
                `rollback=True` or `read_only=True`.
            attempt: the attempt that saved it, where two attempts saved the step.
            rollback: abandon what is newer than `step`.
            read_only: only look: no attempt begins, nothing is repaired.
            accept_older: take an older checkpoint where a tier that may have a newer one does not
                answer.
            strict: False: names that only one side has are left alone; `"state"`: those that only
                the checkpoint has (so it is where other ranks saved it than save now).
            include: glob patterns over paths, as in `["model/*"]`: only what matches is restored.
            rename: saved paths to live ones, as a mapping, or as a function of each tensor's path.

        Returns:
            What was restored; None on a run without checkpoints.

        Raises:
            MismatchError: the checkpoint does not fit; `differences` lists all of it.
            CheckpointNotFoundError: there is no such step.
            CorruptError: no tier has a good copy. Found while reading: then the live tensors hold
                old and new bytes.
            UnavailableError: a tier that may have a newer checkpoint does not answer.
        """
        self.fence()
        found = self._find(step, attempt, rollback, read_only, accept_older)
        if found is None:
            if self._init_from is not None:
                agree = (lambda wish: wish) if read_only else self._handle.agree_on_init
                savers, shard = self.settings["savers"], self._handle.shard_rank
                origin = Origin(self._init_from, self._ram_dir, savers, shard, agree)
                how = (include, rename, self._allow_pickle, self._threads)
                self._handle.tell_init(origin.fill(state, *how))
            self._prepare_behind(state)
            return None
        wish = Wish(rename, Include(include), strict, self.settings["savers"], self._allow_pickle)
        plan, make = planned(found, state, wish)
        plan.check()
        tier, damaged = plan.fill(self._threads)
        new = make()
        if not read_only:
            self._prepare_behind(state)
        return Restored(found.step, found.attempt, tier, new, found.meta, tuple(damaged))

    def _find(
        self,
        step: int | None,
        attempt: int | None,
        rollback: bool,
        read_only: bool,
        accept_older: bool,
    ) -> Found | None:
        if read_only:
            reader = self._handle.reader()
            if step is None and attempt is None and not self._complete():
                return None
            return reader.choose_for(self.rank, step, attempt)
        if rollback and step is None:
            raise InvalidError("rollback=True needs the step to go back to")
        how = "rollback" if rollback else "older" if accept_older else "newest"
        if self._fresh:
            if step is not None or attempt is not None:
                raise InvalidError("fresh=True begins at step 0: no step can be restored")
            how = "fresh"
        found = self._handle.begin(how, step, attempt)
        self._begun, self._fresh = True, False
        self._newest = found.step if found else 0
        return found

    def _begin_if_new(self) -> None:
        if self._begun:
            return
        if self._init_from is not None:
            raise InvalidError("init_from is taken by `restore`: call it before the first save")
        self._handle.begin("fresh" if self._fresh else "new")
        self._begun, self._fresh = True, False

    def _prepare_behind(self, state: Any) -> None:
        try:
            self._handle.prepare(state)
        except TierkeepError as error:
            logger.warning("the slots were not prepared: %s", error)

    # -- looking -----------------------------------------------------------------------------

    def steps(self) -> list[StepInfo]:
        """Every checkpoint that a tier holds a part of, oldest first."""
        return [StepInfo(**row) for row in self._handle.reader().steps()]

    def _complete(self) -> list[StepInfo]:
        return [info for info in self.steps() if info.complete and info.in_lineage]

    def latest_step(self) -> int | None:
        """The newest step that a resume could take now; None where there is none."""
        return max((info.step for info in self._complete()), default=None)

    def pin(self, step: int) -> None:
        """Keeps the checkpoint of `step` for ever.

        Raises:
            CheckpointNotFoundError: there is no complete checkpoint of that step.
        """
        self._handle.pin(step, True)

    def unpin(self, step: int) -> None:
        """Gives the checkpoint of `step` back to retention."""
        self._handle.pin(step, False)

    def wait_all(self, level: Level | None = None, timeout_s: float = _CLOSE_SECONDS) -> None:
        """Waits until nothing is on its way, and the newest save is as durable as `level` says;
        default: as it can be here.

        Raises:
            DeadlineError: not within `timeout_s` seconds.
            TierkeepError: the newest save failed.
        """
        levels = ("ram", "peer", "disk", "object")[: 3 + ("object" in self.settings)]
        self._saves.wait_all(one_of("level", level or levels[-1], levels), timeout_s)

    def stop_requested(self) -> bool:
        """Whether to leave the loop now, because the job was asked to stop (SIGTERM).

            ckpt.step(step + 1, state)
            if ckpt.stop_requested():
                ckpt.save(step + 1, state)  # only the first save of a step does anything
                break

        Ask after each step. Alone, the answer is the signal. Several ranks stop after one and the
        same step, and none waits for another: a rank with the signal proposes, at the next step
        that is divisible by `every`, the one two times `every` later; the first proposal holds,
        also if its rank dies, and the others find it at such a step. So it takes up to three times
        `every` steps, and the last step is one that `step` saves. It goes to disk whatever
        `disk_every` says, and is not skipped.

        Ranks that drift apart by `every` steps or more (no collective holds them together) may
        learn of it too late: they stop at once, and a warning names both steps. Where the directory
        does not answer, that is logged and the training goes on; nothing is raised. Before
        `restore` or the first save there is nobody to agree with: False.

        The first call installs the handler, on the main thread; the script's own handler is called
        too. A second SIGTERM, more than a second later, ends the process at once.
        """
        asked = _stop.requested()
        return self._handle.stop_requested(self._newest, self.every, asked)

    def on_event(self, callback: Callback) -> Callback:
        """Calls `callback` with each `Event`, on a thread of tierkeep's. Can be a decorator."""
        self._teller.callbacks.append(callback)
        return callback

    # -- the end -----------------------------------------------------------------------------

    def close(self, timeout_s: float = _CLOSE_SECONDS) -> None:
        """Waits until the newest checkpoint is on disk, and in the bucket where it goes there, and
        gives the rank up.

        Raises:
            DeadlineError: it was not there within `timeout_s` seconds. It stays where it is.
            TierkeepError: the newest save failed.
        """
        if self._closed or os.getpid() != self._pid:
            return
        done = self._shut(timeout_s)
        newest = self._saves.newest
        if not done:
            raise DeadlineError(not_there(newest, timeout_s))
        if newest is not None and not newest.progress().skipped:
            error = failure(newest, most_durable(newest))
            if error is not None and not isinstance(error, FencedError):
                raise error

    def _shut(self, timeout_s: float, *, failed: bool = False) -> bool:
        done = False
        try:
            done = self._handle.close(timeout_s, False, failed)
        finally:
            # Late or interrupted: what is in RAM is safe there.
            if not done:
                self._handle.close(_HURRY_SECONDS, True)
            self._closed = True
            self._teller.join(_HURRY_SECONDS)
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
            return
        self._hurry()

    def _hurry(self) -> None:
        """Ends soon, and never with an exception: there is one already."""
        try:
            end = time.monotonic() + _HURRY_SECONDS
            self._handle.fence(_HURRY_SECONDS)
            self._shut(max(0.0, end - time.monotonic()), failed=True)
        except TierkeepError as trouble:
            logger.error("while closing: %s", trouble)

    def at_exit(self) -> None:
        """The process ends, and nobody has closed this."""
        if self._closed or os.getpid() != self._pid:
            return
        if getattr(sys, "last_exc", None) or getattr(sys, "last_value", None):
            self._hurry()
            return
        try:
            self.close()
        except TierkeepError as trouble:
            logger.error("while closing at the end of the process: %s", trouble)

    # -- small -------------------------------------------------------------------------------

    def _completed(self, step: int) -> int:
        number = operator.index(step)
        if number < 0:
            raise InvalidError(f"step = {number}: a number of completed training steps")
        self._newest = max(self._newest, number)
        return number

    def _raise_if_failing(self) -> None:
        self._saves.settle()
        if self._saves.failures >= self._max_failures:
            raise self._saves.last_error or BugError("a save failed without an error")
