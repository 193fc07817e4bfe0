"""A new run that begins with the weights of another one, or of a plain file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from same import fingerprint, raw
from test_processes import ended
from test_ranks import start
from torch import nn

import tierkeep


def trained(seed: int, width: int = 5) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 7), nn.BatchNorm1d(7), nn.Linear(7, 2).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 1000)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {
        "model": model,
        "optim": optimizer,
        "ema": [torch.randn(4), {"deep": numpy.arange(3.0) + seed}],
        "epoch": seed,
    }


def save(run: Path, state: Any, step: int = 30, **options: Any) -> None:
    with tierkeep.Checkpointer(run, **options) as ckpt:
        ckpt.restore(state)
        ckpt.save(step, state)


def begin(run: Path, state: Any, source: Path, how: Any = None, **options: Any) -> str:
    """Begins `run` from `source`; what was told."""
    told = []
    with tierkeep.Checkpointer(run, init_from=source, **options) as ckpt:
        ckpt.on_event(told.append)
        assert ckpt.restore(state, **(how or {})) is None
    (text,) = [event.text for event in told if event.kind == "initialised"]
    return text


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def source(run: Path) -> Path:
    path = run.with_name("base")
    save(path, trained(1))
    return path


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_weights_are_taken_and_the_rest_is_fresh(
    run: Path, ram: Path, source: Path, tier: str
) -> None:
    base, state = trained(1), trained(2)
    fresh = fingerprint([state["optim"], state["epoch"]])
    places = [p.data_ptr() for p in state["model"].parameters()]
    if tier == "disk":
        shutil.rmtree(ram)
        ram.mkdir()
    before = files(source)
    text = begin(run, state, source)
    assert text == f"11 of the state's 11 tensors were taken from {source}, step 30 of attempt 1"
    assert fingerprint([state["model"], state["ema"]]) == fingerprint([base["model"], base["ema"]])
    assert fingerprint([state["optim"], state["epoch"]]) == fresh
    assert [p.data_ptr() for p in state["model"].parameters()] == places
    assert files(source) == before, "the source was written to"
    record = json.loads((run / "attempts/00000001.json").read_bytes())
    assert record["parent"] is None


def test_once_this_run_has_a_checkpoint_the_source_is_not_looked_at(
    run: Path, source: Path
) -> None:
    state = trained(2)
    with tierkeep.Checkpointer(run, init_from=source) as ckpt:
        assert ckpt.restore(state) is None
        state["ema"][0].fill_(7)
        ckpt.save(1, state)
    shutil.rmtree(source)
    again = trained(3)
    with tierkeep.Checkpointer(run, init_from=source) as ckpt:
        found = ckpt.restore(again)
        assert found is not None
        assert found.step == 1
        assert fingerprint(again) == fingerprint(state)
    # Begun anew on purpose, it is.
    with (
        tierkeep.Checkpointer(run, init_from=source, fresh=True) as ckpt,
        pytest.raises(tierkeep.CheckpointNotFoundError, match="base") as caught,
    ):
        ckpt.restore(again)
    assert caught.value.__notes__ == [f"(init_from={str(source)!r})"]


def test_a_state_of_another_form_keeps_what_the_source_has_not(run: Path, source: Path) -> None:
    state = trained(2)
    state["head"] = nn.Linear(2, 9)
    state["ema"].append(torch.ones(2))
    state["other"] = torch.ones(1)
    before = fingerprint([state["head"], state["ema"][2], state["other"]])
    order = list(state)
    assert begin(run, state, source).startswith("11 of the state's 15 tensors")
    assert list(state) == order
    assert len(state["ema"]) == 3
    assert fingerprint([state["head"], state["ema"][2], state["other"]]) == before
    assert fingerprint(state["model"]) == fingerprint(trained(1)["model"])


def test_a_state_that_has_less_takes_what_it_has(run: Path, source: Path) -> None:
    state = {"ema": [torch.zeros(4)], "model": nn.Sequential(nn.Linear(5, 7))}
    assert begin(run, state, source).startswith("3 of the state's 3 tensors")
    assert len(state["ema"]) == 1
    assert fingerprint(state["ema"]) == fingerprint(trained(1)["ema"][:1])


def test_what_does_not_fit_is_told_at_once_and_nothing_is_changed(run: Path, source: Path) -> None:
    state = trained(2, width=6)
    state["ema"][0] = torch.zeros(4, dtype=torch.float64)
    before = fingerprint(state)
    with pytest.raises(tierkeep.MismatchError) as caught:
        begin(run, state, source)
    assert caught.value.differences == [
        "model/0.weight: saved as F32 [7, 5], in the state F32 [7, 6]",
        "ema/0: saved as F32 [4], in the state F64 [4]",
    ]
    assert fingerprint(state) == before
    with pytest.raises(tierkeep.MismatchError, match="no tensor has the name") as caught:
        begin(run, {"net": nn.Linear(2, 2)}, source)
    assert "the source has ema/0, ema/1/deep, model/0.bias and 26 more" in str(caught.value)
    assert "the state net/bias, net/weight (rename=" in str(caught.value)


def test_include_narrows_and_names_what_is_not_weights(run: Path, source: Path) -> None:
    base, state = trained(1), trained(2)
    old = fingerprint(state)
    begin(run, state, source, {"include": ["model/0.*", "ema/1"]})
    new = fingerprint(state)
    assert new["ema"][0] == old["ema"][0]
    assert new["ema"][1] == fingerprint(base["ema"])[1]
    assert new["model"][1]["0.weight"] == fingerprint(base["model"])[1]["0.weight"]
    assert new["model"][1]["2.weight"] == old["model"][1]["2.weight"]
    assert (new["optim"], new["epoch"]) == (old["optim"], old["epoch"])
    begin(run, state, source, {"include": ["model", "optim", "epoch"]})
    assert fingerprint(state["optim"]) == fingerprint(base["optim"])
    assert state["epoch"] == 1
    with pytest.raises(tierkeep.InvalidError, match="nothing in the checkpoint matches nowhere"):
        begin(run, state, source, {"include": ["nowhere"]})


@pytest.mark.parametrize("mapped", [True, False])
def test_rename_maps_names_of_the_source(run: Path, source: Path, mapped: bool) -> None:
    state = {"net": trained(2)["model"]}
    how: Any = {"model": "net"} if mapped else lambda path: path.replace("model", "net")
    assert begin(run, state, source, {"rename": how}).startswith("9 of the state's 9")
    assert fingerprint(state["net"]) == fingerprint(trained(1)["model"])
    if mapped:
        begin(run, state, source, {"rename": how, "include": ["net"]})
    with pytest.raises(tierkeep.InvalidError, match="rename: there is no odd"):
        begin(run, state, source, {"rename": {"odd": "even"}})


class Hooked(nn.Module):
    """Loads in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.loaded: list[str] = []

    def load_state_dict(self, tree: Any, *arguments: Any, **options: Any) -> Any:
        self.loaded += list(tree)
        return super().load_state_dict(tree, *arguments, **options)


def test_a_module_with_a_loader_of_its_own_is_loaded_by_it(run: Path, source: Path) -> None:
    module = Hooked()
    rename = {"model/0.weight": "model/inner.weight", "model/1.bias": "model/odd"}
    begin(run, {"model": module}, source, {"rename": rename})
    assert module.loaded == ["inner.weight"]
    assert raw(module.inner.weight) == raw(trained(1)["model"][0].weight)


def test_tied_and_strided_tensors_are_filled(run: Path) -> None:
    source = run.with_name("base")
    tensor = torch.arange(12.0).view(3, 4)
    save(source, {"a": tensor, "b": tensor, "c": torch.ones(2)})
    live = {"a": torch.zeros(3, 4), "b": torch.zeros(4, 3).t(), "c": torch.zeros(1).expand(1)}
    del live["c"]
    begin(run, live, source)
    assert torch.equal(live["a"], tensor)
    assert torch.equal(live["b"], tensor)


# -- plain files -----------------------------------------------------------------------------


def everything() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        "w": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "eight": torch.randn(6).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "one": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }


def test_a_plain_file_fills_what_it_names(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    made = everything()
    safetensors.torch.save_file({f"net/{name}": t for name, t in made.items()}, file)
    net = {name: torch.zeros_like(t) for name, t in made.items()}
    net["w"] = torch.zeros(4, 3).t()
    state = {"net": net, "rest": torch.ones(1), "array": numpy.ones(2)}
    text = begin(run, state, file)
    assert text == f"6 of the state's 8 tensors were taken from {file}"
    assert {name: raw(t) for name, t in net.items()} == {name: raw(t) for name, t in made.items()}
    assert state["rest"].item() == 1
    include = {"include": ["net/w"]}
    assert begin(run, state, file, include).startswith("1 of the state's 8")


def test_a_modules_own_file_needs_no_prefix(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    base, state = trained(1)["model"], trained(2)
    safetensors.torch.save_file(base.state_dict(), file)
    assert begin(run, state, file).startswith("9 of the state's 11 tensors")
    assert fingerprint(state["model"]) == fingerprint(base)
    # With two modules it cannot be told which one is meant; a name says it.
    both = {"one": trained(3)["model"], "two": trained(2)["model"]}
    with pytest.raises(tierkeep.MismatchError, match="rename= maps"):
        begin(run, both, file)
    begin(run, both, file, {"rename": lambda name: f"two/{name}"})
    assert fingerprint(both["two"]) == fingerprint(base)
    # The module is the state.
    alone = trained(2)["model"]
    begin(run, alone, file)
    assert fingerprint(alone) == fingerprint(base)


def test_a_shard_of_tierkeep_is_a_plain_file_too(run: Path, source: Path) -> None:
    (file,) = source.rglob("rank-*.safetensors")
    state = trained(2)
    assert begin(run, state, file).startswith("11 of the state's 11 tensors")
    assert fingerprint(state["model"]) == fingerprint(trained(1)["model"])


@pytest.mark.parametrize(
    "damage", ["empty", "text", "long header", "cut off", "shape", "offsets", "no object", "nested"]
)
def test_a_file_that_is_damaged_is_refused_and_changes_nothing(
    run: Path, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": torch.ones(8), "b": torch.ones(8)}, file)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(text: str) -> bytes:
        return len(text).to_bytes(8, "little") + text.encode() + whole[8 + length :]

    file.write_bytes(
        {
            "empty": lambda: b"",
            "text": lambda: b"not a safetensors file at all",
            "long header": lambda: (2**63).to_bytes(8, "little") + whole[8:],
            "cut off": lambda: whole[:-3],
            # It says more than there is.
            "shape": lambda: with_header(
                json.dumps(header | {"b": header["b"] | {"data_offsets": [0, 4]}})
            ),
            "offsets": lambda: with_header(
                json.dumps(header | {"b": header["b"] | {"data_offsets": [60, 32]}})
            ),
            "no object": lambda: with_header("[1, 2]"),
            "nested": lambda: with_header("[" * 100_000),
        }[damage]()
    )
    state = {"a": torch.zeros(8), "b": torch.zeros(8)}
    with pytest.raises(tierkeep.CorruptError, match=r"weights\.safetensors"):
        begin(run, state, file)
    assert not state["a"].any()
    assert not state["b"].any()


def test_a_source_that_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    for name in ("nothing", "nothing.safetensors"):
        with pytest.raises(tierkeep.CheckpointNotFoundError, match="nothing"):
            begin(run, trained(1), tmp_path / name)
    with pytest.raises(tierkeep.InvalidError, match="not with a bucket"):
        tierkeep.Checkpointer(run, init_from="s3://bucket/base")


def test_a_save_before_the_restore_is_refused(run: Path, source: Path) -> None:
    with tierkeep.Checkpointer(run, init_from=source) as ckpt:
        with pytest.raises(tierkeep.InvalidError, match="before the first save"):
            ckpt.save(1, trained(2))
        assert ckpt.restore(trained(2)) is None
        ckpt.save(1, trained(2))


# -- several ranks ---------------------------------------------------------------------------


def job(run: Path, states: list[Any], **options: Any) -> list[tierkeep.Checkpointer]:
    world = len(states)
    made = [tierkeep.Checkpointer(run, rank=r, world_size=world, **options) for r in range(world)]
    for ckpt, state in zip(made, states, strict=True):
        assert ckpt.restore(state) is None
    return made


def close(made: list[tierkeep.Checkpointer]) -> None:
    for ckpt in made:
        ckpt.close(60)


def save_by(run: Path, states: list[Any], step: int = 30, **options: Any) -> None:
    made = job(run, states, **options)
    for ckpt, state in zip(made, states, strict=True):
        ckpt.save(step, state)
    close(made)


def test_each_rank_takes_its_own_shard_where_as_many_saved(run: Path) -> None:
    source = run.with_name("base")
    save_by(source, [{"x": torch.tensor(float(rank))} for rank in range(3)])
    states = [{"x": torch.tensor(-1.0)} for _ in range(3)]
    close(job(run, states, init_from=source))
    assert [s["x"].item() for s in states] == [0, 1, 2]


def test_another_number_of_ranks_takes_what_is_whole_and_the_same_everywhere(run: Path) -> None:
    source = run.with_name("base")

    def shard(rank: int) -> dict[str, Any]:
        nan = torch.tensor([float("nan"), -0.0])
        tied = torch.full((2,), 5.0)
        return {
            "all": {"n": nan, "a": tied, "b": tied},
            f"layer{rank}": torch.tensor([float(rank)]),
        }

    save_by(source, [shard(0), shard(1)])

    def live() -> dict[str, Any]:
        same = {"n": torch.zeros(2), "a": torch.zeros(2), "b": torch.zeros(2)}
        return {"all": same, "layer0": torch.zeros(1), "layer1": torch.zeros(1)}

    for world in (1, 3):
        states = [live() for _ in range(world)]
        close(job(run.with_name(f"of{world}"), states, init_from=source))
        for state in states:
            assert fingerprint(state) == fingerprint(shard(0) | shard(1))


def test_tensors_that_differ_between_ranks_are_refused_by_name(run: Path) -> None:
    source = run.with_name("base")
    save_by(source, [{"x": torch.tensor(float(rank)), "y": torch.ones(1)} for rank in range(2)])
    live = {"x": torch.tensor(-1.0), "y": torch.zeros(1)}
    with pytest.raises(tierkeep.MismatchError) as caught:
        begin(run, live, source)
    assert caught.value.differences == ["x: rank 0 and rank 1 have different ones"]
    assert (live["x"].item(), live["y"].item()) == (-1, 0)
    begin(run, live, source, {"include": ["y"]})
    assert (live["x"].item(), live["y"].item()) == (-1, 1)


def test_ranks_that_do_not_save_begin_with_the_same_weights(run: Path, source: Path) -> None:
    states = [trained(seed) for seed in (2, 3, 4)]
    made = job(run, states, ranks=[0], init_from=source)
    for state in states:
        assert fingerprint(state["model"]) == fingerprint(trained(1)["model"])
    for ckpt, state in zip(made, states, strict=True):
        ckpt.save(1, state)
    close(made)


def test_all_ranks_take_the_step_that_the_first_one_saw(run: Path) -> None:
    source = run.with_name("base")
    state = {"x": torch.ones(3)}
    with tierkeep.Checkpointer(source) as other:
        other.restore(state)
        other.save(1, state).wait("disk", 30)
        made = [
            tierkeep.Checkpointer(run, rank=rank, world_size=2, init_from=source)
            for rank in range(2)
        ]
        taken = []
        for ckpt in made:
            live = {"x": torch.zeros(3)}
            assert ckpt.restore(live) is None
            taken.append(live["x"][0].item())
            # That run goes on.
            state["x"] += 1
            other.save(len(taken) + 1, state).wait("disk", 30)
        assert taken == [1, 1]
    close(made)


KILLED = """
    import json, os, signal, sys
    import torch
    import torch.distributed as dist
    import tierkeep

    run, source, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo")
    state = {"x": torch.zeros(1000), "rank": torch.zeros(1)}
    ckpt = tierkeep.Checkpointer(run, init_from=source, ranks=[0])
    found = ckpt.restore(state)
    begin = found.step if found else 0
    print(json.dumps({"begin": begin, "x": state["x"][0].item()}), flush=True)
    if stop:
        state["x"] += 1
        dist.barrier()
        ckpt.save(begin + 1, state).wait("ram", 60)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    ckpt.close()
"""


def test_a_job_that_is_killed_goes_on_from_its_own_checkpoint(run: Path) -> None:
    source = run.with_name("base")
    save(source, {"x": torch.full((1000,), 40.0)})
    for stop, expected in ((1, {"begin": 0, "x": 40.0}), (0, {"begin": 1, "x": 41.0})):
        results = [ended(rank) for rank in start(2, KILLED, run, source, stop)]
        assert [json.loads(out) for _, out, _ in results] == [expected] * 2, results
