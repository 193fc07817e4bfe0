"""JAX and optax under Orbax's CheckpointManager. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
from small import BATCH, CLASSES, STEPS, WIDTH, arguments, data, kill_if_due, report

import tierkeep.orbax  # +

optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))


def fresh() -> dict[str, Any]:
    """Parameters, the optimizer's state, and the key that dropout draws from."""
    one, two, key = jax.random.split(jax.random.key(1), 3)
    params = {
        "in": jax.random.normal(one, (WIDTH, 64)) / WIDTH**0.5,
        "out": jax.random.normal(two, (64, CLASSES)) / 8,
    }
    return {"params": params, "opt": optimizer.init(params), "key": key}


@jax.jit
def train(state: dict[str, Any], rows: Any, classes: Any) -> tuple[dict[str, Any], Any]:
    """One step."""
    key, drop = jax.random.split(state["key"])

    def loss(params: Any) -> Any:
        hidden = jax.nn.relu(rows @ params["in"])
        hidden = hidden * jax.random.bernoulli(drop, 0.9, hidden.shape) / 0.9
        logits = hidden @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

    value, grads = jax.value_and_grad(loss)(state["params"])
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key}, value


def main() -> None:
    args = arguments()
    rows, classes = (jnp.asarray(tensor.numpy()) for tensor in data().tensors)
    state = fresh()
    options = ocp.CheckpointManagerOptions(save_interval_steps=3, max_to_keep=2)
    with ocp.CheckpointManager(Path(args.run).absolute(), options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            state = manager.restore(start, args=tierkeep.orbax.Restore(state))  # +
        print("starts at step", start)
        for step in range(start + 1, STEPS + 1):
            batch = slice((step - 1) * BATCH, step * BATCH)
            state, loss = train(state, rows[batch], classes[batch])
            manager.save(step, args=tierkeep.orbax.Save(state))  # +
            kill_if_due(step, args.kill_at)
    print(f"loss {loss:.4f}")
    report(torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(state["params"]))


if __name__ == "__main__":
    main()
