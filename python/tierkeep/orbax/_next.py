"""`PyTreeHandler` and `context`: for Orbax's new API, `orbax.checkpoint.experimental.v1`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar, Literal

import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from tierkeep.orbax import _runs, _trees

# Of the tree that `save` and `load` are about.
_STATE = "state"


class PyTreeHandler:
    """Saves trees of arrays to a run of tierkeep's, as `Handler` does.

    Orbax makes one whenever it needs one: what is to be set is said in a class.

        class Quick(tierkeep.orbax.PyTreeHandler):
            level = "ram"

        with tierkeep.orbax.context(Quick): ...

    A path to save to ends in the number of the step. Nobody tells it when the training is over: the
    run stays open until the end of the process, or `tierkeep.orbax.close_all()`.
    """

    __module__ = "tierkeep.orbax"  # Part of the name by which Orbax finds it again.

    #: As the arguments of `Handler`.
    run: ClassVar[str | None] = None
    level: ClassVar[Literal["ram", "peer", "disk", "object"] | None] = None
    timeout_s: ClassVar[float] = 1800.0
    options: ClassVar[Mapping[str, Any]] = {}

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        """Copies into RAM; what is returned ends when Orbax may commit."""
        how = self._how()._replace(primary_host=_current().multiprocessing_options.primary_host)
        commit = _runs.save(epath.Path(directory.path), checkpointable, how)
        return self._commit(commit, directory)

    async def _commit(self, commit: _runs.Commit, directory: Any) -> None:
        where = epath.Path(await directory.await_creation())
        await commit.finish(where)
        if commit.known.how.is_primary:
            # `load` takes only directories for trees that have this file. Orbax's own handler,
            # should one read it without ours, finds no tree in it.
            (where / "_METADATA").write_text(json.dumps({"handler": "tierkeep.orbax"}))

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """A new tree. One that Orbax itself wrote is loaded by Orbax."""
        where = epath.Path(directory)
        if not _runs.is_ours(where):
            theirs: Awaitable[Any] = await ocp.handlers.PyTreeHandler().load(
                directory, abstract_checkpointable
            )
            return theirs
        partial = _current().pytree_options.loading.partial_load
        return self._load(where, abstract_checkpointable, partial)

    async def _load(self, directory: epath.Path, target: Any, partial: bool) -> Any:
        return _runs.restore(directory, self._how(), target, partial=partial)

    async def metadata(self, directory: Any) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` for each array."""
        where = epath.Path(directory)
        if not _runs.is_ours(where):
            return await ocp.handlers.PyTreeHandler().metadata(directory)
        return _runs.metadata(where, self._how())

    def is_handleable(self, checkpointable: Any) -> bool:
        """Trees with an array."""
        return _trees.has_arrays(checkpointable)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """The same, of their abstract form."""
        return _trees.has_arrays(abstract_checkpointable)

    def _how(self) -> _runs.How:
        return _runs.How(self.run, self.level, self.timeout_s, 0, self.options)


def context(handler: type[PyTreeHandler] = PyTreeHandler) -> ocp.Context:
    """A context in which trees of arrays go to tierkeep; everything else as ever.

    with tierkeep.orbax.context():
        ocp.save("/ckpt/gpt/100", state)
    """
    known = ocp.handlers.global_registry()
    registry = ocp.handlers.local_registry(include_global_registry=False)
    for kind, name in known.get_all_entries():
        if name != _STATE:
            others = known.get_secondary_typestrs(kind) or None
            registry.add(kind, checkpointable_name=name, secondary_typestrs=others)
    registry.add(handler)  # The last one that can is asked first.
    registry.add(handler, checkpointable_name=_STATE)
    made = ocp.Context()
    made.checkpointables.registry = registry
    return made


def _current() -> ocp.Context:
    """The one that the caller is in. Orbax has no public name for it."""
    from orbax.checkpoint.experimental.v1._src.context.context import get_context

    return get_context()
