"""tierkeep under the interfaces that Orbax's users know.

    with ocp.CheckpointManager("/ckpt/gpt", options=options) as manager:
        manager.save(step, args=tierkeep.orbax.Save(state))
        state = manager.restore(step, args=tierkeep.orbax.Restore(abstract_state))

and in Orbax's new API, `orbax.checkpoint.experimental.v1`:

    with ocp.training.Checkpointer("/ckpt/gpt", context=tierkeep.orbax.context()) as checkpointer:
        checkpointer.save(step, state)
        state = checkpointer.load(step, abstract_state)

Orbax decides when to save and which steps stay, and commits a step by renaming its directory. In
that directory is one small file, which names a run of tierkeep's (`/ckpt/gpt/tierkeep/default`) and
a step of it. The arrays are in the run: one copy into RAM, checksums, tiers, as of every save; a
`tierkeep.Checkpointer` and `tierkeep.load` read it too. Orbax commits only after the checkpoint of
all processes is complete in the run, and what Orbax has committed the run keeps until Orbax deletes
it.
"""

from tierkeep.orbax._handler import Handler, Restore, Save
from tierkeep.orbax._next import PyTreeHandler, context
from tierkeep.orbax._runs import close_all

__all__ = ["Handler", "PyTreeHandler", "Restore", "Save", "close_all", "context"]
