"""What each process of jobset-jax.yaml runs: a small model, sharded over all devices, that goes on
from its newest checkpoint wherever it is started. `DEST`, `DISK`: arguments of the Checkpointer.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import tierkeep

WIDTH, HIDDEN, BATCH = 256, 1024, 32
STEPS = int(os.environ.get("STEPS", "100000"))


def main() -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["JOB_COMPLETION_INDEX"])
    jax.distributed.initialize(os.environ["COORDINATOR"], world, rank)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    optimizer = optax.adamw(1e-3)

    def made(key: jax.Array) -> dict[str, Any]:
        up, down = jax.random.split(key)
        params = {
            "up": jax.random.normal(up, (WIDTH, HIDDEN)) / 16,
            "down": jax.random.normal(down, (HIDDEN, WIDTH)) / 32,
        }
        return {"params": params, "optimizer": optimizer.init(params)}

    # Made where it belongs, a part on each device: no process ever has the whole state.
    def place(shape: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec("fsdp") if shape.ndim else PartitionSpec())

    key = jax.random.key(1)
    places = jax.tree.map(place, jax.eval_shape(made, key))
    train_state = jax.jit(made, out_shardings=places)(key)

    @functools.partial(jax.jit, out_shardings=(places, None))
    def train(state: dict[str, Any], step: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        rows = jax.random.normal(jax.random.fold_in(jax.random.key(2), step), (BATCH, WIDTH))

        def loss_of(params: dict[str, jax.Array]) -> jax.Array:
            there = jax.nn.gelu(rows @ params["up"]) @ params["down"]
            return jnp.mean((there - rows) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": moments}, loss

    disk = os.environ.get("DISK")
    with tierkeep.Checkpointer(os.environ["DEST"], disk=disk, every=50, capture="overlap") as ckpt:
        found = ckpt.restore(train_state)
        train_state = found.state if found else train_state
        start = found.step if found else 0
        print(f"{ckpt!r}\nstarts after step {start}", found and f"from {found.tier}", flush=True)
        for step in range(start + 1, STEPS + 1):
            train_state, loss = train(train_state, np.uint32(step))
            ckpt.step(step, train_state)
            if step % 100 == 0 and rank == 0:
                print(f"{time.strftime('%X')} step {step} loss {float(loss):.4f}", flush=True)


if __name__ == "__main__":
    main()
