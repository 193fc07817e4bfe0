"""A JAX loop of one's own, with flax's nnx. The lines that tierkeep needs end with `# +`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from small import BATCH, CLASSES, STEPS, WIDTH, arguments, data, kill_if_due, report

import tierkeep  # +


def loss_of(net: nnx.Module, rows: jax.Array, classes: jax.Array) -> jax.Array:
    """Cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(net(rows), classes).mean()


@nnx.jit
def train(
    net: nnx.Module, optimizer: nnx.Optimizer, rows: jax.Array, classes: jax.Array
) -> jax.Array:
    """One step."""
    value, grads = nnx.value_and_grad(loss_of)(net, rows, classes)
    optimizer.update(net, grads)
    return value


def main() -> None:
    args = arguments()
    rows, classes = (jnp.asarray(tensor.numpy()) for tensor in data().tensors)
    rngs = nnx.Rngs(1)
    net = nnx.Sequential(
        nnx.Linear(WIDTH, 64, rngs=rngs), nnx.relu, nnx.Linear(64, CLASSES, rngs=rngs)
    )
    adamw = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))
    optimizer = nnx.Optimizer(net, adamw, wrt=nnx.Param)
    with tierkeep.Checkpointer(args.run, every=3, capture="overlap") as ckpt:  # +
        found = ckpt.restore(nnx.state((net, optimizer)))  # +
        if found:  # +
            nnx.update((net, optimizer), found.state)  # +
        start = found.step if found else 0  # +
        print("starts at step", start)
        for step in range(start + 1, STEPS + 1):
            batch = slice((step - 1) * BATCH, step * BATCH)
            loss = train(net, optimizer, rows[batch], classes[batch])
            ckpt.step(step, nnx.state((net, optimizer)))  # +
            kill_if_due(step, args.kill_at)
    print(f"loss {loss:.4f}")
    leaves = jax.tree.leaves(nnx.state(net, nnx.Param))
    report(torch.from_numpy(np.array(leaf)) for leaf in leaves)


if __name__ == "__main__":
    main()
