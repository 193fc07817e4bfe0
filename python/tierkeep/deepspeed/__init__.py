"""DeepSpeed saves to a run of tierkeep's and goes on from it.

    engine, *_ = deepspeed.initialize(...)
    tierkeep.deepspeed.attach(engine, "/ckpt/gpt", own={"rng": tierkeep.Rng()})
    _, client_state = tierkeep.deepspeed.resume(engine, "/ckpt/gpt")
    ...
    engine.save_checkpoint("/ckpt/gpt")     # as before

What a rank saves between DeepSpeed's `create` and `commit` is its shard of one checkpoint: one copy
into RAM, checksummed, taken before `save_checkpoint` returns; no file of torch's is written. The
checkpoint exists when all ranks' shards are there. tierkeep calls no collective for it (DeepSpeed's
`save_checkpoint` has two barriers of its own).

The directory that DeepSpeed is given holds its `latest`, and for each tag small files that say
where the content is: DeepSpeed looks for names on the file system. They stay when the run no longer
has the step; `tierkeep ls` says what it has. DeepSpeed's own scripts read files of torch's:
`export` writes them.
"""

from tierkeep.deepspeed._engine import CheckpointEngine, attach, resume
from tierkeep.deepspeed._reading import export

__all__ = ["CheckpointEngine", "attach", "export", "resume"]
