"""Arrays and trees of JAX: saved as they lie on a mesh, restored on any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from same import same
from test_processes import ended
from test_ranks import start

import tierkeep


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return Mesh(devices.reshape(shape), ("a", "b")[: len(shape)])


def put(array: Any, on: Mesh, *spec: Any) -> Any:
    return jax.device_put(array, NamedSharding(on, PartitionSpec(*spec)))


def equal(a: Any, b: Any) -> bool:
    """Trees of the same structure and types, arrays bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(type(x) is type(y) and same(np.asarray(x), np.asarray(y)) for x, y in pairs)


SHARDINGS: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
    ((4,), ("a",)),
    ((2, 2), ("a", "b")),
    ((2, 2), (None, "b")),
    ((2, 2), (("a", "b"), None)),
    ((1,), ()),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.float8_e5m2])
def test_an_array_comes_back_on_every_mesh(run: Path, dtype: Any) -> None:
    whole = (jnp.arange(8 * 12) % 7).reshape(8, 12).astype(dtype)
    for step, (shape, spec) in enumerate(SHARDINGS, 1):
        saved = put(whole, mesh(*shape), *spec)
        with tierkeep.Checkpointer(run) as ckpt:
            found = ckpt.restore({"x": jax.ShapeDtypeStruct((8, 12), dtype)})
            assert (found is None) == (step == 1)
            ckpt.save(step, {"x": saved})
        for other_shape, other_spec in SHARDINGS:
            sharding = NamedSharding(mesh(*other_shape), PartitionSpec(*other_spec))
            target = jax.ShapeDtypeStruct((8, 12), dtype, sharding=sharding)
            with tierkeep.Checkpointer(run) as ckpt:
                found = ckpt.restore({"x": target}, read_only=True)
                assert found is not None
                x = found.state["x"]
            assert x.sharding == sharding
            assert equal(x, put(whole, mesh(*other_shape), *other_spec))


def test_a_whole_training_state_comes_back(run: Path) -> None:
    model = linen.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def fresh(seed: int) -> TrainState:
        params = model.init(jax.random.key(seed), jnp.ones((1, 4)))
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    grads = jax.tree.map(jnp.ones_like, state.params)
    state = state.apply_gradients(grads=grads)
    key = jax.random.key_data(jax.random.key(7))
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, {"train": state, "key": key, "opt": state.opt_state})
        other = fresh(9)
        found = ckpt.restore(
            {"train": other, "key": jnp.zeros_like(key), "opt": other.opt_state}, read_only=True
        )
        assert found is not None
    assert equal(found.state["train"], state)
    assert found.state["train"].apply_fn == model.apply
    assert equal(found.state["opt"], state.opt_state)
    assert type(found.state["opt"][1][0]) is type(state.opt_state[1][0])
    assert equal(found.state["key"], key)
    # On a laptop, without the classes: plain dicts.
    loaded = tierkeep.load(run)
    assert equal(loaded["train"]["params"], state.params)


def test_modules_of_nnx_come_back(run: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, {"model": nnx.state(model)})
        other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
        found = ckpt.restore({"model": nnx.state(other)}, read_only=True)
        assert found is not None
    nnx.update(other, found.state["model"])
    assert equal(nnx.state(other), nnx.state(model))


def test_a_copy_behind_is_of_its_moment_also_where_the_array_is_donated(run: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros((1 << 20,)), "b": put(jnp.zeros((1 << 18,)), mesh(4), "a")}
    with tierkeep.Checkpointer(run, capture="overlap") as ckpt:
        for number in range(1, 6):
            state = step(state)
            ckpt.save(number, state)
    with tierkeep.Checkpointer(run) as ckpt:
        for info in ckpt.steps():
            loaded = tierkeep.load(run, info.step)
            assert {float(x) for x in np.unique(loaded["w"])} == {float(info.step)}
            assert {float(x) for x in np.unique(loaded["b"])} == {float(info.step)}


def test_what_has_no_values_is_refused_by_name(run: Path) -> None:
    gone = jnp.ones(3)
    gone.delete()
    with tierkeep.Checkpointer(run) as ckpt:
        with pytest.raises(tierkeep.InvalidError, match="model/w: its memory was donated"):
            ckpt.save(1, {"model": {"w": gone}})
        with pytest.raises(tierkeep.InvalidError, match=r"key: typed random keys: store"):
            ckpt.save(1, {"key": jax.random.key(0)})
        with pytest.raises(tierkeep.InvalidError, match=r"x: a traced array has no values"):
            jax.jit(lambda x: ckpt.save(1, {"x": x}))(jnp.ones(2))
        ckpt.save(1, {"w": jnp.ones(3), "v": jnp.ones(2)})
        with pytest.raises(tierkeep.MismatchError) as told:
            ckpt.restore(
                {"w": jnp.ones(4), "v": jnp.ones(2, jnp.int32), "u": jnp.ones(1)}, read_only=True
            )
        assert [line.split(":")[0] for line in told.value.differences] == ["w", "v", "u"]


def test_torch_reads_what_jax_saved_and_the_other_way_round(run: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(
            1,
            {
                "model": {
                    "weight": put(weight, mesh(2, 2), None, "b"),
                    "half": jnp.ones(2, jnp.bfloat16),
                }
            },
        ).wait("disk")
        live = {
            "model": {"weight": torch.zeros(3, 4), "half": torch.zeros(2, dtype=torch.bfloat16)}
        }
        assert ckpt.restore(live, read_only=True) is not None
        assert np.array_equal(live["model"]["weight"].numpy(), weight)
        assert live["model"]["half"].tolist() == [1.0, 1.0]
        ckpt.save(2, live)
        target = {
            "model": {
                "weight": jax.ShapeDtypeStruct(
                    (3, 4), jnp.float32, sharding=NamedSharding(mesh(2), PartitionSpec(None, "a"))
                ),
                "half": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
            }
        }
        found = ckpt.restore(target, read_only=True)
        assert found is not None
    assert np.array_equal(np.asarray(found.state["model"]["weight"]), weight)
    assert found.state["model"]["half"].dtype == jnp.bfloat16
    # Without jax, as numpy's.
    code = (
        "import sys, tierkeep; x = tierkeep.load(sys.argv[1], 1)['model']; "
        "assert 'jax' not in sys.modules; print(type(x['weight']).__module__, x['half'].dtype)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert ran.stdout.split() == ["numpy", "bfloat16"], ran.stderr


JOB = """
    import json, os, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    jax.distributed.initialize(address, world, rank)
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import tierkeep

    mesh = Mesh(np.array(jax.devices()).reshape(world, 2), ("a", "b"))

    def made(step, spec):
        whole = np.arange(24 * 10, dtype=np.float32).reshape(24, 10) + step
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    specs = {"rows": P("a"), "mesh": P("a", "b"), "columns": P(None, "b"), "all": P()}
    def state(step):
        return {name: made(step, spec) for name, spec in specs.items()}

    with tierkeep.Checkpointer(sys.argv[1]) as ckpt:
        target = state(0)
        found = ckpt.restore(target)
        step = found.step if found else 0
        same = True
        if found:
            for name, array in state(step).items():
                for x, y in zip(found.state[name].addressable_shards, array.addressable_shards):
                    same &= np.array_equal(np.asarray(x.data), np.asarray(y.data))
        ckpt.save(step + 1, state(step + 1)).wait("disk", 60)
    print(json.dumps({"step": step, "same": bool(same), "repr": repr(ckpt)}))
"""


def test_processes_of_one_job_share_what_they_hold(run: Path) -> None:
    for turn, world in enumerate([2, 3, 1, 2]):
        results = [ended(rank) for rank in start(world, JOB, run)]
        assert all(code == 0 for code, *_ in results), results
        told = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
        assert all(line["step"] == turn and line["same"] for line in told), told
        assert "(jax.distributed)" in told[0]["repr"]
    # Of 4 arrays each element once, on 2 processes: what both hold is stored by one of them.
    sizes = [path.stat().st_size for path in run.glob(f"{4:020}/*/*.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) < 4 * 24 * 10 * 4 + 2 * 2048


def test_parts_that_begin_at_one_place_are_told_apart_by_their_size(run: Path) -> None:
    whole = jnp.arange(8.0 * 12).reshape(8, 12)
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, {"a": whole, "b": whole})  # One array: stored once.
    four, two = mesh(4), mesh(2)
    live = {"a": put(jnp.zeros((8, 12)), four, "a"), "b": put(jnp.zeros((8, 12)), two, "a")}
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(live)
        assert found is not None
        assert equal(found.state, {"a": put(whole, four, "a"), "b": put(whole, two, "a")})
