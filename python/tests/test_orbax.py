"""`tierkeep.orbax`: Orbax's managers save to runs of tierkeep's and restore from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_jax import equal, mesh, put
from test_processes import ended
from test_ranks import start

import tierkeep
import tierkeep.orbax
from tierkeep.orbax import Handler, Restore, Save, _places, _runs


@pytest.fixture
def root(run: Path) -> Iterator[Path]:
    """Orbax's directory of all steps."""
    yield run
    tierkeep.orbax.close_all()


def made(step: int) -> dict[str, Any]:
    """A training state in which every value tells the step."""
    params = {"w": jnp.full((8, 12), float(step)), "b": jnp.arange(12.0) + step}
    return {"params": params, "opt": optax.adam(1e-3).init(params), "step": step}


def manager(root: Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(**options))


def saved(root: Path, *steps: int, **options: Any) -> None:
    """The steps, saved by a manager of their own, which is closed."""
    with manager(root, **options) as one:
        for step in steps:
            assert one.save(step, args=Save(made(step)))


def restored(root: Path, step: int, like: Any = None) -> Any:
    with manager(root) as one:
        return one.restore(step, args=Restore(made(0) if like is None else like))


def pinned(run: Path) -> set[int]:
    return {int(path.name.split(".")[0]) for path in run.glob("_pins/*")}


def on_disk(run: Path) -> set[int]:
    return {int(path.parent.parent.name) for path in run.rglob("CHECKPOINT.json")}


# -- the manager -----------------------------------------------------------------------------


def test_a_manager_keeps_and_counts_steps_as_ever(root: Path) -> None:
    with manager(root, max_to_keep=2, save_interval_steps=2) as one:
        assert one.latest_step() is None
        assert [one.save(n, args=Save(made(n))) for n in range(2, 9)] == [True, False] * 3 + [True]
        one.wait_until_finished()
        assert (one.all_steps(), one.latest_step()) == ([6, 8], 8)
        assert {6, 8} <= on_disk(root / "tierkeep/default")
        for step in (6, 8):
            assert equal(one.restore(step, args=Restore(made(0))), made(step))
        with pytest.raises(ValueError, match="already exists"):
            one.save(8, args=Save(made(8)), force=True)
    with manager(root) as again:
        assert again.latest_step() == 8
        assert equal(again.restore(8, args=Restore(made(0))), made(8))


def test_a_manager_may_wait_for_each_save(root: Path) -> None:
    with manager(root, enable_async_checkpointing=False) as one:
        one.save(1, args=Save(made(1)))
        assert (root / "1/default/tierkeep.json").exists()
        assert equal(one.restore(1, args=Restore(made(0))), made(1))


def test_a_step_of_orbax_holds_a_name_and_the_run_the_arrays(root: Path) -> None:
    saved(root, 1)
    assert json.loads((root / "1/default/tierkeep.json").read_text())["step"] == 1
    assert sum(path.stat().st_size for path in (root / "1").rglob("*")) < 40_000
    assert not list((root / "1").rglob("*ocdbt*"))
    run = root / "tierkeep" / "default"
    assert equal(tierkeep.load(run)["params"], made(1)["params"])
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(made(0))
        assert found is not None
        assert equal(found.state, made(1))


SHARDINGS = [((4,), ("a",)), ((2, 2), (None, "b")), ((2, 2), ("a", "b")), ((1,), ())]


def test_arrays_come_back_on_the_sharding_of_the_target(root: Path) -> None:
    whole = jnp.arange(96.0).reshape(8, 12)
    with manager(root) as one:
        for step, (shape, spec) in enumerate(SHARDINGS):
            one.save(step, args=Save({"x": put(whole, mesh(*shape), *spec)}))
        for step in range(len(SHARDINGS)):
            for shape, spec in SHARDINGS:
                sharding = NamedSharding(mesh(*shape), PartitionSpec(*spec))
                like = {"x": jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=sharding)}
                x = one.restore(step, args=Restore(like))["x"]
                assert x.sharding == sharding
                assert np.array_equal(np.asarray(x), np.asarray(whole))


def test_without_a_target_values_are_what_they_were_saved_as(root: Path) -> None:
    key = jax.random.key(7, impl="rbg")
    state = {"x": put(jnp.arange(8), mesh(4), "a"), "n": np.arange(3), "i": 3, "f": 0.5, "key": key}
    with manager(root) as one:
        one.save(1, args=Save(state))
    with manager(root) as one:  # One that has not saved finds the handler by itself.
        for back in (one.restore(1), one.restore(1, args=Restore())):
            assert type(back["n"]) is np.ndarray
            assert isinstance(back["x"], jax.Array)
            assert (back["i"], back["f"]) == (3, 0.5)
            assert np.array_equal(np.asarray(back["x"]), np.arange(8))
            assert back["key"].dtype == key.dtype
        like = one.item_metadata(1)
        assert (like["x"].shape, like["x"].dtype, like["key"].dtype) == ((8,), jnp.int32, key.dtype)
        assert equal(one.restore(1, args=Restore(like))["x"], jnp.arange(8))


def test_typed_random_keys_come_back_as_such(root: Path) -> None:
    keys = {"one": jax.random.key(7), "split": jax.random.split(jax.random.key(3), 5)}
    saved_ = {**keys, "x": jnp.ones(2)}
    with manager(root) as one:
        one.save(1, args=Save(saved_))
        for like in (saved_, jax.eval_shape(lambda: saved_)):
            back = one.restore(1, args=Restore(like))
            for name, key in keys.items():
                assert back[name].dtype == key.dtype
                assert equal(jax.random.key_data(back[name]), jax.random.key_data(key))


def test_a_target_is_only_looked_at(root: Path) -> None:
    with manager(root) as one:
        one.save(1, args=Save({"n": np.ones(3), "d": {"i": 1}, "l": [1, np.ones(1)]}))
        target = {"n": np.zeros(3), "d": {"i": 0}, "l": [0, np.zeros(1)]}
        back = one.restore(1, args=Restore(target))
    assert (back["n"].tolist(), back["d"], back["l"][0]) == ([1, 1, 1], {"i": 1}, 1)
    assert (target["n"].tolist(), target["d"], target["l"][0]) == ([0, 0, 0], {"i": 0}, 0)


def test_what_does_not_fit_is_told_in_one_error(root: Path) -> None:
    saved(root, 1)
    wrong = {"params": {"w": jnp.ones((8, 11)), "b": jnp.ones(12, jnp.int32)}}
    with manager(root) as one:
        with pytest.raises(tierkeep.MismatchError) as told:
            one.restore(1, args=Restore(wrong))
        places = [line.split(":")[0] for line in told.value.differences]
        assert places[:2] == ["params/w", "params/b"]
        part = {"params": {"b": jnp.zeros(12)}}
        with pytest.raises(tierkeep.MismatchError, match="params/w: in the checkpoint"):
            one.restore(1, args=Restore(part))
        back = one.restore(1, args=Restore(part, partial_restore=True))
        assert equal(back, {"params": {"b": jnp.arange(12.0) + 1}})


def test_each_item_has_a_run_of_its_own_beside_other_handlers(root: Path) -> None:
    items = {"params": Save(made(1)["params"]), "ema": Save({"w": jnp.ones(3)})}
    with manager(root) as one:
        one.save(1, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({"epoch": 2})))
        back = one.restore(
            1,
            args=ocp.args.Composite(
                params=Restore(), ema=Restore({"w": jnp.zeros(3)}), meta=ocp.args.JsonRestore()
            ),
        )
    assert equal(back.params, made(1)["params"])
    assert (back.ema["w"].tolist(), back.meta) == ([1, 1, 1], {"epoch": 2})
    runs = sorted(path.name for path in (root / "tierkeep").iterdir())
    assert runs == ["ema", "ema.pins", "params", "params.pins"]


def test_two_items_are_not_mixed_in_one_run(root: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    with ocp.Checkpointer(Handler(one)) as a, ocp.Checkpointer(Handler(one)) as b:
        a.save(root / "1" / "a", args=Save({"x": 1}))
        with pytest.raises(tierkeep.InvalidError, match="'b' needs a run of its own"):
            b.save(root / "1" / "b", args=Save({"x": 2}))


def test_directories_of_steps_may_have_any_name_that_ends_in_a_number(root: Path) -> None:
    with manager(root, step_prefix="of_gpt", step_format_fixed_length=6) as one:
        one.save(12, args=Save(made(12)))
        assert equal(one.restore(12, args=Restore(made(0))), made(12))
    assert (root / "of_gpt_000012").is_dir()
    assert tierkeep.load(root / "tierkeep/default", 12)["step"] == 12
    with ocp.Checkpointer(Handler()) as alone:
        alone.save(root / "checkpoint-13", args=Save(made(13)))
        assert equal(alone.restore(root / "checkpoint-13", args=Restore(made(0))), made(13))
        with pytest.raises(tierkeep.InvalidError, match="final names no step"):
            alone.save(root / "final", args=Save(made(14)))


def test_a_directory_is_moved_with_all_that_is_in_it(root: Path, tmp_path: Path) -> None:
    saved(root, 1, 2)
    shutil.move(root, tmp_path / "elsewhere")
    assert equal(restored(tmp_path / "elsewhere", 1), made(1))


def test_a_run_that_orbax_has_written_goes_on_with_tierkeep(root: Path) -> None:
    state = made(1)
    with manager(root) as one:
        one.save(1, args=ocp.args.StandardSave(state))
    with manager(root) as one:
        back = one.restore(1, args=Restore(made(0)))
        assert equal(back["params"], state["params"])
        part = one.restore(1, args=Restore({"step": 0}, partial_restore=True))
        assert part == {"step": 1}
        one.save(2, args=Save({**back, "step": 2}))
        assert one.restore(2, args=Restore(made(0)))["step"] == 2


# -- what is committed, and what stays --------------------------------------------------------


def test_orbax_does_not_commit_what_is_not_complete(root: Path) -> None:
    handler = Handler(level="object")  # There is no bucket.
    with (
        pytest.raises(tierkeep.UnavailableError),
        ocp.CheckpointManager(root, item_handlers=handler) as one,
    ):
        one.save(1, args=Save(made(1)))
        one.wait_until_finished()
    with manager(root) as one:
        assert one.latest_step() is None


def test_what_a_dead_process_did_not_commit_is_saved_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(root, 1, 2)

    def dies(*args: Any) -> None:
        raise OSError("killed here: the checkpoint is complete, and Orbax does not know")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed here"):
        patch.setattr(_places, "write", dies)
        saved(root, 3)
    tierkeep.orbax.close_all()
    run = root / "tierkeep/default"
    assert tierkeep.load(run)["step"] == 3
    with manager(root) as one:
        assert one.latest_step() == 2
        state = one.restore(2, args=Restore(made(0)))
        one.save(3, args=Save({**state, "step": 33}))
        assert one.restore(3, args=Restore(made(0)))["step"] == 33
    assert tierkeep.load(run, 3)["step"] == 33
    assert pinned(run) == {1, 2, 3}


def test_a_step_committed_in_ram_need_not_be_on_disk(root: Path) -> None:
    handler = Handler(level="ram", disk_every=10)
    with ocp.CheckpointManager(root, item_handlers=handler) as one:
        for step in (9, 10, 11):
            one.save(step, args=Save(made(step)))
        one.wait_until_finished()
        assert one.latest_step() == 11
        assert equal(one.restore(11, args=Restore(made(0))), made(11))
    assert on_disk(root / "tierkeep/default") == {10}


def test_the_run_keeps_what_orbax_keeps_and_nothing_else(root: Path) -> None:
    run = root / "tierkeep/default"
    kept = {"best_fn": lambda metrics: metrics["good"], "max_to_keep": 2}
    with ocp.CheckpointManager(
        root, item_handlers=Handler(keep_last=1), options=ocp.CheckpointManagerOptions(**kept)
    ) as one:
        for step in range(1, 9):
            one.save(step, args=Save(made(step)), metrics={"good": -step})
        one.wait_until_finished()
        assert one.all_steps() == [1, 2]
        for step in (1, 2):
            assert equal(one.restore(step, args=Restore(made(0))), made(step))
    assert pinned(run) == {1, 2}
    # A collector comes after a save: what Orbax deleted last is still there.
    assert {1, 2, 8} <= on_disk(run) <= {1, 2, 6, 7, 8}


def test_what_a_person_has_pinned_stays_after_orbax_deleted_it(root: Path) -> None:
    run = root / "tierkeep/default"
    with manager(root, max_to_keep=1) as one:
        one.save(1, args=Save(made(1)))
        one.wait_until_finished()
        (root / "tierkeep/default.pins/1").unlink()  # As if not pinned for Orbax.
        for step in range(2, 7):
            one.save(step, args=Save(made(step)))
    assert pinned(run) == {1, 6}
    assert tierkeep.load(run, 1)["step"] == 1


def test_an_older_step_is_gone_on_from(root: Path) -> None:
    saved(root, 1, 2, 3)
    with manager(root) as one:
        state = one.restore(1, args=Restore(made(0)))
        one.delete(2)
        assert one.save(2, args=Save({**state, "step": 22}), force=True)
        assert one.restore(2, args=Restore(made(0)))["step"] == 22
        # What Orbax has not deleted it can still restore.
        assert one.restore(3, args=Restore(made(0)))["step"] == 3
    with tierkeep.Checkpointer(root / "tierkeep/default") as ckpt:
        assert [info.step for info in ckpt.steps() if info.in_lineage] == [1, 2]


def test_a_process_goes_on_from_what_it_restored(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(root, 1, 2, 3)
    monkeypatch.setattr(_runs, "_seen", {})  # As a process of its own.
    with manager(root) as one:
        state = one.restore(1, args=Restore(made(0)))
        one.save(4, args=Save({**state, "step": 4}))
    with tierkeep.Checkpointer(root / "tierkeep/default") as ckpt:
        assert [info.step for info in ckpt.steps() if info.in_lineage] == [1, 4]


def test_a_step_is_deleted_and_saved_again_by_one_process(root: Path) -> None:
    with manager(root) as one:
        for step in (1, 2, 3):
            one.save(step, args=Save(made(step)))
        one.wait_until_finished()
        one.delete(3)
        one.save(3, args=Save({**made(3), "step": 33}))
        assert one.restore(3, args=Restore(made(0)))["step"] == 33
        one.restore(1, args=Restore(made(0)))  # To look at it: training goes on from 3.
        one.save(4, args=Save(made(4)))
    with tierkeep.Checkpointer(root / "tierkeep/default") as ckpt:
        assert [info.step for info in ckpt.steps() if info.in_lineage] == [1, 2, 3, 4]


def test_restoring_takes_no_lock(root: Path) -> None:
    saved(root, 1)
    with manager(root) as one, tierkeep.Checkpointer(root / "tierkeep/default") as trainer:
        assert trainer.restore(made(0)) is not None
        assert equal(one.restore(1, args=Restore(made(0))), made(1))
        trainer.save(2, made(2)).wait("disk", 60)


# -- the new API -----------------------------------------------------------------------------


def test_the_new_api_saves_and_loads(root: Path) -> None:
    sharding = NamedSharding(mesh(4), PartitionSpec("a"))
    state = {"x": put(jnp.arange(8.0), mesh(2), "a"), "step": 5}
    with tierkeep.orbax.context():
        v1.save(root / "5", state)
        v1.save_async(root / "6", {**state, "step": 6}).result()
        like = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding), "step": 0}
        back = v1.load(root / "5", like)
        assert (back["x"].sharding, back["step"]) == (sharding, 5)
        assert np.array_equal(np.asarray(back["x"]), np.arange(8.0))
        assert v1.load(root / "6")["step"] == 6
        assert v1.metadata(root / "5").metadata["x"].shape == (8,)
    assert tierkeep.load(root / "tierkeep/state", 5)["step"] == 5
    with pytest.raises(Exception, match="tree_metadata"):
        v1.load(root / "5")  # Without the context: an error, not an empty tree.


def test_a_checkpointer_of_the_new_api_keeps_what_it_is_told(root: Path) -> None:
    class Quick(tierkeep.orbax.PyTreeHandler):
        level = "ram"
        options = {"keep_last": 1}  # noqa: RUF012

    policy = v1.training.preservation_policies.LatestN(2)
    context = tierkeep.orbax.context(Quick)
    with v1.training.Checkpointer(root, context=context, preservation_policy=policy) as one:
        for step in range(1, 6):
            assert one.save_checkpointables(
                step, {"state": made(step), "data": {"at": step}}, force=True
            )
        assert [c.step for c in one.checkpoints] == [4, 5]
        assert equal(one.load(4, made(0)), made(4))
        assert one.load_checkpointables(5, {"data": None})["data"] == {"at": 5}
        one.save(5, {**made(5), "step": 55}, overwrite=True, force=True)
        assert one.load(5, made(0))["step"] == 55
    tierkeep.orbax.close_all()
    assert pinned(root / "tierkeep/state") == {4, 5}


def test_what_orbax_saved_by_the_new_api_is_loaded_in_our_context(root: Path) -> None:
    v1.save(root / "1", made(1))
    with tierkeep.orbax.context():
        assert equal(v1.load(root / "1", made(0))["params"], made(1)["params"])
        assert v1.load(root / "1")["step"] == 1


# -- several processes -----------------------------------------------------------------------

JOB = """
    import os, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{os.environ['MASTER_PORT']}", world, rank)
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import tierkeep.orbax

    mesh = Mesh(np.array(jax.devices()).reshape(world, 2), ("a", "b"))
    specs = {"rows": P("a"), "mesh": P("a", "b"), "all": P()}

    def made(step):
        whole = np.arange(240, dtype=np.float32).reshape(24, 10) + step
        return {
            name: jax.make_array_from_callback(
                whole.shape, NamedSharding(mesh, spec), lambda index: whole[index]
            )
            for name, spec in specs.items()
        }

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(sys.argv[1], options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            back = manager.restore(start, args=tierkeep.orbax.Restore(made(0)))
            for name, array in made(start).items():
                for x, y in zip(back[name].addressable_shards, array.addressable_shards):
                    assert np.array_equal(np.asarray(x.data), np.asarray(y.data)), name
        for step in range(start + 1, start + 4):
            manager.save(step, args=tierkeep.orbax.Save(made(step)))
        manager.wait_until_finished()
        print(start, manager.all_steps())
"""


def test_processes_commit_one_step_of_what_each_of_them_has(root: Path) -> None:
    for world, told in ((2, "0 [2, 3]"), (1, "3 [5, 6]")):
        results = [ended(rank) for rank in start(world, JOB, root)]
        assert all(code == 0 for code, *_ in results), results
        assert [out.splitlines()[-1] for _, out, _ in results] == [told] * world
    assert pinned(root / "tierkeep/default") == {5, 6}
