"""`Handler`, `Save` and `Restore`: for `orbax.checkpoint.CheckpointManager` and `Checkpointer`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath

from tierkeep.errors import InvalidError
from tierkeep.orbax import _runs


class Handler(ocp.AsyncCheckpointHandler):  # type: ignore[misc]
    """Saves trees of arrays to a run of tierkeep's, and restores them from there.

        ocp.CheckpointManager("/ckpt/gpt", item_handlers=tierkeep.orbax.Handler(level="ram"))

    Needed only where something is to be set: without it `Save` and `Restore` find one by
    themselves. Each item has a run of its own.

    `save` of the manager returns when the copy into RAM is taken (with `capture="overlap"` at once:
    arrays are immutable, and one that is donated meanwhile keeps its memory until it is copied).
    The rest is behind. Orbax itself holds the processes together at barriers, and does not begin a
    save before the last one is committed; a `tierkeep.Checkpointer` does neither.

    Args:
        run: the directory of the run or its place in a bucket; default:
            `<directory of the manager>/tierkeep/<item>`. It is where the arrays are.
        level: what a step is before Orbax commits it, `"ram"`, `"peer"`, `"disk"` or `"object"`;
            default: the most durable of disk and bucket that the run has. With `"ram"` Orbax counts
            steps that die with the machine: a step that is lost then raises when it is restored.
        timeout_s: seconds until then, at most.
        multiprocessing_options: as the manager's. With `active_processes`, say `ranks=` too.
        options: of the `tierkeep.Checkpointer` that is opened for the run. `keep_last` counts
            beside what Orbax keeps.
    """

    __module__ = "tierkeep.orbax"  # Part of the name by which Orbax finds it again.

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        level: Literal["ram", "peer", "disk", "object"] | None = None,
        timeout_s: float = 1800.0,
        multiprocessing_options: ocp.options.MultiprocessingOptions | None = None,
        **options: Any,
    ) -> None:
        processes = multiprocessing_options or ocp.options.MultiprocessingOptions()
        where = None if run is None else os.fsdecode(run).rstrip("/")
        self._how = _runs.How(where, level, timeout_s, processes.primary_host, options)
        self._keys: set[str] = set()

    # -- the protocol ------------------------------------------------------------------------

    async def async_save(
        self, directory: epath.Path, args: Save
    ) -> list[ocp.future.CommitFutureAwaitingContractedSignals]:
        """Copies into RAM; what is returned ends when Orbax may commit."""
        return [self._save(directory, args)]

    def save(self, directory: epath.Path, args: Save) -> None:
        """The same, and waits."""
        self._save(directory, args).result()

    def restore(self, directory: epath.Path, args: Restore | None = None) -> Any:
        """A new tree. A step that Orbax itself wrote is restored by Orbax."""
        args = args or Restore()
        directory = epath.Path(directory)
        if not _runs.is_ours(directory):
            return _theirs(directory, args)
        return _runs.restore(directory, self._how, args.item, partial=args.partial_restore)

    def metadata(self, directory: epath.Path) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` for each array: a target of `Restore`."""
        directory = epath.Path(directory)
        if not _runs.is_ours(directory):
            return ocp.StandardCheckpointHandler().metadata(directory)
        return _runs.metadata(directory, self._how)

    def close(self) -> None:
        """Waits for the newest checkpoint, and gives the run up."""
        while self._keys:
            _runs.close(self._keys.pop())

    # -- small -------------------------------------------------------------------------------

    def _save(
        self, directory: epath.Path, args: Save
    ) -> ocp.future.CommitFutureAwaitingContractedSignals:
        directory = epath.Path(directory)
        commit = _runs.save(directory, args.item, self._how)
        self._keys.add(commit.key)
        return ocp.future.CommitFutureAwaitingContractedSignals(
            commit.finish(directory), name="tierkeep"
        )


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Saves a tree to a run of tierkeep's: `manager.save(step, args=tierkeep.orbax.Save(state))`.

    Attributes:
        item: any tree of arrays (jax's on any mesh, numpy's) and plain values; typed random keys
            too.
    """

    item: Any

    def __post_init__(self) -> None:
        if self.item is None:
            raise InvalidError("Save(None): there is nothing to save")


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """Restores one: `manager.restore(step, args=tierkeep.orbax.Restore(abstract_state))`.

    Attributes:
        item: a tree of the same form with `jax.ShapeDtypeStruct`s (or arrays), which say the
            sharding; without one, an array lies on the first device of the process. What is not
            alike (a name, a shape, a dtype: nothing is cast or cut) raises, with every difference
            in one error. Default: as saved, with dicts for unknown classes, and every array whole
            on the first device of each process.
        partial_restore: names that only the checkpoint has are left out.
    """

    item: Any = None
    partial_restore: bool = False


def _theirs(directory: epath.Path, args: Restore) -> Any:
    """What Orbax's own handlers wrote: a run of theirs goes on with tierkeep."""
    if not args.partial_restore:
        like = ocp.args.StandardRestore(args.item)
        return ocp.StandardCheckpointHandler().restore(directory, args=like)
    fitting = ocp.checkpoint_utils.construct_restore_args(args.item)
    some = ocp.args.PyTreeRestore(args.item, restore_args=fitting, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(directory, args=some)
