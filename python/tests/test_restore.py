"""What fits is put back in place; what does not fit is told, all of it, and nothing is changed."""

from __future__ import annotations

import collections
import dataclasses
import enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from same import fingerprint, same
from torch import nn

import tierkeep


def save(run: Path, state: Any, **options: Any) -> None:
    with tierkeep.Checkpointer(run, **options) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state)


def restore(run: Path, state: Any, **how: Any) -> Any:
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(state, **how)
    assert found is not None
    return found.state


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32,
    torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
]  # fmt: skip


def noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits at all: NaNs, infinities, denormals."""
    count = int(numpy.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_every_dtype_comes_back_bit_for_bit(run: Path, ram: Path, tier: str) -> None:
    def make(fill: Any) -> dict[str, torch.Tensor]:
        return {str(d): fill(d, 3, 4) for d in DTYPES}

    state = make(noise)
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state).wait("disk", 30)
        live = make(lambda d, *s: torch.zeros(s, dtype=torch.uint8).new_empty(s, dtype=d))
        found = ckpt.restore(live, read_only=True)
        assert found is not None
        assert found.tier == "ram"
    if tier == "disk":
        live = make(lambda d, *s: torch.empty(s, dtype=d))
        restore(run, live)
    assert fingerprint(live) == fingerprint(state)
    assert fingerprint(tierkeep.load(run)) == fingerprint(state)


def shapes() -> dict[str, torch.Tensor]:
    base = torch.arange(240, dtype=torch.float32).reshape(6, 40)
    return {
        "0-d": torch.tensor(3.5),
        "zero-size": torch.empty(0, 7),
        "another zero-size": torch.empty(3, 0),
        "transposed": base.clone().t(),
        "columns": base.clone()[:, 3:11],
        "every second": base.clone()[::2, ::3],
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "a part": base.clone()[2:4],
        "flipped": base.clone().flip(0),
        "big": torch.randn(300, 1000),
        "big, transposed": torch.randn(300, 1000).t(),
    }


def test_every_shape_and_stride_comes_back_in_place(run: Path) -> None:
    state = shapes()
    save(run, state)
    live = {
        name: t.clone(memory_format=torch.preserve_format).zero_() for name, t in shapes().items()
    }
    tensors = dict(live)
    assert restore(run, live) is live
    for name, tensor in live.items():
        assert tensor is tensors[name]
        assert torch.equal(tensor, state[name]), name
    assert live["columns"].stride() == state["columns"].clone().stride()


def test_a_view_of_a_larger_tensor_is_filled_and_nothing_beside_it(run: Path) -> None:
    state = {"part": torch.randn(4, 5)}
    save(run, state)
    whole = torch.zeros(8, 9)
    live = {"part": whole[2:6, 3:8]}
    restore(run, live)
    assert torch.equal(whole[2:6, 3:8], state["part"])
    whole[2:6, 3:8] = 0
    assert not whole.any()


def test_views_of_one_memory_are_all_filled(run: Path) -> None:
    def make(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"first": flat[:10], "flat": flat, "rows": flat.view(10, 10)[:, 2:5]}

    save(run, make(torch.arange(100.0)))
    flat = torch.zeros(100)
    restore(run, make(flat))
    assert torch.equal(flat, torch.arange(100.0))


def test_an_expanded_tensor_is_saved_but_not_restored_into(run: Path) -> None:
    save(run, {"x": torch.ones(1).expand(3)})
    assert torch.equal(tierkeep.load(run)["x"], torch.ones(3))
    with pytest.raises(tierkeep.MismatchError, match="x: it cannot be written to"):
        restore(run, {"x": torch.zeros(1).expand(3)})


ARRAYS = {
    "f2": numpy.float16([1.5, numpy.nan]),
    "c16": numpy.complex128([[1 + 2j]]),
    "bool": numpy.array([True, False]),
    "0-d": numpy.array(7),
    "empty": numpy.zeros((0, 3)),
    "fortran": numpy.asfortranarray(numpy.arange(12.0).reshape(3, 4)),
    "reversed": numpy.arange(9)[::-2],
}


def test_numpy_arrays_come_back_in_place(run: Path) -> None:
    save(run, ARRAYS)
    live = {name: numpy.zeros_like(a) for name, a in ARRAYS.items()}
    arrays = dict(live)
    restore(run, live)
    for name, array in live.items():
        assert array is arrays[name]
        assert same(array, ARRAYS[name]) or numpy.array_equal(array, ARRAYS[name])
    loaded = tierkeep.load(run)
    assert all(type(a) is numpy.ndarray for a in loaded.values())


def test_a_read_only_array_is_a_difference(run: Path) -> None:
    save(run, {"a": numpy.ones(3)})
    frozen = numpy.zeros(3)
    frozen.flags.writeable = False
    with pytest.raises(tierkeep.MismatchError, match="a: it cannot be written to"):
        restore(run, {"a": frozen})


class Mode(enum.Enum):
    TRAIN = 1
    TEST = 2


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Config:
    rate: float
    history: list[int]


def test_containers_are_updated_in_place(run: Path) -> None:
    def make(n: int) -> dict[str, Any]:
        return {
            "list": [n, [n]],
            "dict": {"a": n, n: "key"},
            "ordered": collections.OrderedDict(z=n, a=n),
            "counter": collections.Counter({n: 2}),
            "default": collections.defaultdict(list, {"k": [n]}),
            "deque": collections.deque([n, n], 5),
            "set": {n},
            "config": Config(float(n), [n]),
            "pair": Pair(n, [n]),
            "mode": Mode(n),
            "tuple": (n, torch.full((2,), float(n))),
            "none": None if n == 1 else 3,
        }

    state, live = make(1), make(2)
    before = dict(live)
    tensor = live["tuple"][1]
    save(run, state)
    got = restore(run, live)
    assert got is live
    assert same(live, state)
    for name in ("list", "dict", "ordered", "counter", "default", "deque", "set", "config"):
        assert live[name] is before[name], name
    assert live["tuple"][1] is tensor
    assert torch.equal(tensor, torch.ones(2))


def test_what_does_not_exist_yet_is_made(run: Path) -> None:
    state = {"best": {"w": torch.ones(2)}, "log": [torch.zeros(1)], "maybe": torch.ones(1)}
    save(run, state)
    live: dict[str, Any] = {"best": {}, "log": [], "maybe": None}
    restore(run, live)
    assert same(live, state)


def test_a_state_that_is_one_tensor(run: Path) -> None:
    save(run, torch.arange(5))
    live = torch.zeros(5, dtype=torch.int64)
    assert restore(run, live) is live
    assert torch.equal(live, torch.arange(5))


def test_all_differences_are_in_one_error_and_nothing_is_changed(run: Path) -> None:
    state = {
        "model": nn.Linear(4, 3),
        "shape": torch.ones(3),
        "dtype": torch.ones(3),
        "gone": torch.ones(1),
        "value": 1,
        "tensor": torch.ones(1),
        "fine": torch.ones(2),
    }
    save(run, state)
    live = {
        "model": nn.Sequential(nn.Linear(4, 3)),
        "shape": torch.zeros(4),
        "dtype": torch.zeros(3, dtype=torch.float64),
        "value": torch.zeros(1),
        "new": torch.zeros(1),
        "tensor": torch.zeros(1),
        "fine": torch.zeros(2),
    }
    before = fingerprint(live)
    with pytest.raises(tierkeep.MismatchError) as caught:
        restore(run, live)
    assert set(caught.value.differences) == {
        "model/weight: in the checkpoint, not in the state",
        "model/bias: in the checkpoint, not in the state",
        "model/0.weight: not in the checkpoint",
        "model/0.bias: not in the checkpoint",
        "shape: saved as F32 [3], in the state F32 [4]",
        "dtype: saved as F32 [3], in the state F64 [3]",
        "gone: in the checkpoint, not in the state",
        "value: saved as int, a tensor in the state",
        "new: not in the checkpoint",
    }
    assert "9 differences" in str(caught.value)
    assert all(line in str(caught.value) for line in caught.value.differences)
    assert fingerprint(live) == before


def test_a_smaller_model_in_the_optimizer_is_a_difference(run: Path) -> None:
    def make(bias: bool) -> dict[str, Any]:
        model = nn.Linear(2, 2, bias=bias)
        return {"optim": torch.optim.SGD(model.parameters(), momentum=0.9)}

    save(run, make(True))
    with pytest.raises(tierkeep.MismatchError, match=r"optim: saved with groups of \[2\]"):
        restore(run, make(False))


def test_an_object_that_only_one_side_has_is_a_difference(run: Path) -> None:
    save(run, {"rng": tierkeep.Rng(), "x": 1})
    with pytest.raises(tierkeep.MismatchError) as caught:
        restore(run, {"x": 1, "model": nn.Linear(1, 1)})
    assert caught.value.differences == [
        "rng: in the checkpoint, not in the state",
        "model: not in the checkpoint",
    ]


def test_tensors_that_were_saved_apart_do_not_fit_into_one(run: Path) -> None:
    save(run, {"a": torch.zeros(2), "b": torch.ones(2)})
    one = torch.zeros(2)
    with pytest.raises(tierkeep.MismatchError, match="one memory in the state"):
        restore(run, {"a": one, "b": one.view(2)})


def test_tensors_that_were_saved_as_one_fill_two(run: Path) -> None:
    one = torch.randn(2)
    save(run, {"a": one, "b": one})
    live = {"a": torch.zeros(2), "b": torch.zeros(2)}
    restore(run, live)
    assert torch.equal(live["a"], one)
    assert torch.equal(live["b"], one)


# -- strict, include, rename -----------------------------------------------------------------


def test_not_strict_leaves_alone_what_only_one_side_has(run: Path) -> None:
    save(run, {"model": nn.Linear(2, 2), "old": torch.ones(1), "x": 1})
    model = nn.Sequential(nn.Linear(2, 2))
    weight = model[0].weight.detach().clone()
    live = {"model": model, "new": torch.zeros(1), "x": 0}
    restore(run, live, strict=False)
    assert torch.equal(model[0].weight, weight)
    assert list(live) == ["model", "x", "new"]
    assert live["x"] == 1
    with pytest.raises(tierkeep.MismatchError, match="model/weight"):
        restore(run, {"model": nn.Linear(2, 3), "x": 0}, strict=False)


def test_include_restores_what_matches_and_nothing_else(run: Path) -> None:
    saved = {"model": nn.Linear(2, 2), "step": 5, "opt": {"a": torch.ones(1), "b": torch.ones(1)}}
    save(run, saved)
    live = {"model": nn.Linear(2, 2), "step": 0, "opt": {"a": torch.zeros(1), "b": torch.zeros(1)}}
    bias = live["model"].bias.detach().clone()
    restore(run, live, include=["model/wei*", "opt/b"])
    assert torch.equal(live["model"].weight, saved["model"].weight)
    assert torch.equal(live["model"].bias, bias)
    assert live["step"] == 0
    assert (live["opt"]["a"].item(), live["opt"]["b"].item()) == (0, 1)
    restore(run, live, include=["model/*", "step"])
    assert torch.equal(live["model"].bias, saved["model"].bias)
    assert live["step"] == 5
    with pytest.raises(tierkeep.InvalidError, match="matches modle"):
        restore(run, live, include=["modle/*"])


def test_include_lets_other_parts_differ(run: Path) -> None:
    save(run, {"model": nn.Linear(2, 2), "head": torch.ones(10)})
    live = {"model": nn.Linear(2, 2), "head": torch.zeros(3), "extra": nn.Linear(1, 1)}
    restore(run, live, include="model")
    assert live["head"].shape == (3,)


def test_rename_by_a_mapping_and_by_a_function(run: Path) -> None:
    saved = {"net": nn.Linear(2, 2), "a": torch.ones(1), "b": torch.zeros(1)}
    save(run, saved)
    live = {"model": nn.Linear(2, 2), "a": torch.zeros(1), "b": torch.ones(1)}
    restore(run, live, rename={"net": "model", "a": "b", "b": "a"})
    assert torch.equal(live["model"].weight, saved["net"].weight)
    assert (live["a"].item(), live["b"].item()) == (0, 1)

    wrapped = {"net": nn.Sequential(nn.Linear(2, 2)), "a": torch.zeros(1), "b": torch.zeros(1)}
    restore(run, wrapped, rename=lambda path: path.replace("net/", "net/0."))
    assert torch.equal(wrapped["net"][0].weight, saved["net"].weight)
    for wrong in ({"nothing": "a"}, {"a": "b"}, {"a": "x/y"}):
        with pytest.raises(tierkeep.InvalidError, match="rename"):
            restore(run, wrapped, rename=wrong)


# -- modules with a way of their own ---------------------------------------------------------


class Versioned(nn.Module):
    """Has extra state, and saves its weight in another form than it keeps it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(n)))
        self.calls = n

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"half": self.weight.detach() / 2}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        with torch.no_grad():
            self.weight.copy_(state["half"] * 2)


def test_modules_with_a_way_of_their_own_load_by_it(run: Path) -> None:
    def make(n: int) -> dict[str, Any]:
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        return {"extra": Versioned(n), "own": Halved(), "normed": normed}

    saved, live = make(3), make(4)
    weight = live["extra"].weight
    save(run, saved)
    restore(run, live)
    assert live["extra"].calls == 3
    assert live["extra"].weight is weight
    assert fingerprint(live) == fingerprint(saved)


def test_a_lazy_module_gets_its_shape_from_the_checkpoint(run: Path) -> None:
    model = nn.LazyLinear(3)
    model(torch.ones(1, 5))
    save(run, {"m": model})
    fresh = nn.LazyLinear(3)
    restore(run, {"m": fresh})
    assert torch.equal(fresh.weight, model.weight)


def test_a_plain_module_is_filled_without_load_state_dict(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(*_: Any, **__: Any) -> None:
        raise AssertionError("a second copy of every weight")

    saved = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(4, 2))
    save(run, {"m": saved})
    live = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(4, 2))
    monkeypatch.setattr(nn.Module, "load_state_dict", copies)
    restore(run, {"m": live})
    assert fingerprint(live) == fingerprint(saved)


def test_an_exception_in_load_state_dict_learns_where_it_was(run: Path) -> None:
    class Fails:
        def state_dict(self) -> Any:
            return {}

        def load_state_dict(self, state: Any) -> None:
            raise RuntimeError("inner")

    save(run, {"a": {"b": Fails()}})
    with pytest.raises(RuntimeError, match="inner") as caught:
        restore(run, {"a": {"b": Fails()}})
    assert "(while restoring a/b)" in caught.value.__notes__


def test_state_dicts_instead_of_objects(run: Path) -> None:
    """The way of torch.save: the script calls state_dict and load_state_dict itself."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer, {"model": model.state_dict(), "optim": optimizer.state_dict()}

    model, optimizer, _ = make()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    save(run, saved)
    fresh, its_optimizer, live = make()
    new = restore(run, live)
    # The model's tensors are its own, so they are filled; the moments are new.
    assert fingerprint(fresh) == fingerprint(model)
    its_optimizer.load_state_dict(new["optim"])
    assert fingerprint(its_optimizer) == fingerprint(optimizer)


def test_an_object_gets_new_tensors_and_keeps_its_own(run: Path) -> None:
    class Keeps:
        def __init__(self, fill: float) -> None:
            self.inner = {"a": torch.full((2,), fill), "list": [torch.full((1,), fill), "x"]}

        def state_dict(self) -> Any:
            return self.inner

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state

    save(run, {"k": Keeps(1)})
    live = Keeps(2)
    restore(run, {"k": live})
    assert live.inner["a"].tolist() == [2, 2]  # type: ignore[union-attr]
    assert fingerprint(live.loaded) == fingerprint(Keeps(1).inner)


def test_a_dict_takes_the_place_of_an_object_and_the_reverse(run: Path) -> None:
    model = nn.Linear(2, 2)
    save(run, {"m": model})
    live = {"m": {k: torch.zeros_like(v) for k, v in model.state_dict().items()}}
    restore(run, live)
    assert torch.equal(live["m"]["weight"], model.weight)


def test_a_state_may_change_its_form_from_step_to_step(run: Path) -> None:
    state: dict[str, Any] = {"x": torch.ones(3)}
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state)
        state["x"] = torch.ones(1000, 1000)
        state["y"] = torch.ones(2)
        ckpt.save(2, state)
        state["x"].data = torch.zeros(2, dtype=torch.int8)
        ckpt.save(3, state)
    assert fingerprint(tierkeep.load(run)) == fingerprint(state)


def test_a_tensor_that_changes_under_the_same_object_is_seen(run: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    z = torch.zeros(4, dtype=torch.complex64)
    state = {"x": x, "z": z}
    changes = [
        lambda: setattr(x, "data", x.data.reshape(4, 3).t()),
        lambda: setattr(x, "data", x.data.t().contiguous()),
        lambda: setattr(x, "data", x.data.view(torch.int32)),
        lambda: x.resize_(2, 2),
        lambda: x.set_(torch.zeros(5, dtype=torch.int32)),
    ]
    with tierkeep.Checkpointer(run, slots=4, keep_last=9) as ckpt:
        ckpt.restore(state)
        for step, change in enumerate(changes, 1):
            change()
            ckpt.save(step, state).wait("ram")
            assert fingerprint(ckpt_load(ckpt, state)) == fingerprint(state)


def ckpt_load(ckpt: tierkeep.Checkpointer, state: Any) -> Any:
    destination = ckpt.settings["destination"]
    return tierkeep.load(destination)


def test_what_include_does_not_name_stays_as_it_is(run: Path) -> None:
    save(run, {"m": torch.ones(2), "list": [1, 2, [3]], "deep": {"x": torch.ones(1), "n": 5}})
    live = {"deep": {"n": 6, "x": torch.zeros(1)}, "list": [9], "m": torch.zeros(2), "own": 8}
    state = restore(run, live, include=["m", "deep/x"])
    assert state is live
    assert list(live) == ["deep", "list", "m", "own"]
    assert live["list"] == [9]
    assert live["own"] == 8
    assert list(live["deep"].items()) == [("n", 6), ("x", torch.ones(1))]
    assert live["m"].tolist() == [1, 1]
