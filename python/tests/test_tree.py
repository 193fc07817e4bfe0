"""decode(encode(x)) == x, types included, for every value that a state may hold."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import math
import struct
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from same import same

import tierkeep
from tierkeep import _types
from tierkeep._build import Builder
from tierkeep._tierkeep import decode_tree, encode_tree, join_path, split_path


class Colour(enum.Enum):
    RED = 1
    GREEN = "g"


class Number(enum.IntEnum):
    ONE = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: Any
    y: Any = 0


@dataclasses.dataclass
class Settings:
    lr: Any
    name: Any = "adam"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    inner: Any


class Word(str):
    pass


def decode(text: str, allow_pickle: tuple[str, ...] = ()) -> Any:
    found = types.SimpleNamespace(tensors={})
    return Builder(found, allow_pickle).make(decode_tree(text), ())()  # type: ignore[arg-type]


def again(value: Any) -> Any:
    return decode(encode_tree(value))


FLOATS = st.one_of(
    st.floats(),
    # NaNs that carry something.
    st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0]),
)
TEXT = st.text(st.characters(), max_size=8) | st.text(st.characters(categories=["Cs"]), max_size=2)
SCALARS = st.one_of(
    st.sampled_from([numpy.float32(1.5), numpy.bool_(True), numpy.str_("ß\0"), numpy.str_("")]),
    st.integers(-128, 127).map(numpy.int8),
    FLOATS.map(numpy.float64),
    st.builds(complex, FLOATS, FLOATS).map(numpy.complex128),
    st.binary(max_size=4).map(numpy.bytes_),
    st.just(numpy.datetime64("2024-02-29T12:00:00")),
    st.just(numpy.dtype(">i4").type(7)),
)
TORCH = st.one_of(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool]),
    st.lists(st.integers(0, 2**40), max_size=4).map(torch.Size),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.device("meta")]),
)
# Few texts are paths, and a NUL is not in any.
PATHS = st.sampled_from([Path("/a/b.c"), Path("rel"), Path("ü/🦀"), Path(".")])
HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    FLOATS.filter(lambda x: x == x),
    TEXT,
    st.binary(max_size=8),
    st.sampled_from([Colour.RED, Colour.GREEN, Number.ONE, Access.WRITE]),
    PATHS,
    TORCH,
)
LEAVES = st.one_of(HASHABLE, FLOATS, st.builds(complex, FLOATS, FLOATS), SCALARS)
KEYS = st.one_of(
    HASHABLE,
    st.lists(HASHABLE, max_size=3).map(tuple),
    st.frozensets(HASHABLE, max_size=3),
    st.builds(Point, HASHABLE, HASHABLE.map(Frozen)),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, inner, max_size=4)
    lists = st.lists(inner, max_size=4)
    return st.one_of(
        dicts,
        dicts.map(collections.OrderedDict),
        dicts.map(lambda d: collections.defaultdict(list, d)),
        dicts.map(lambda d: collections.defaultdict(None, d)),
        st.dictionaries(KEYS, st.integers(), max_size=4).map(collections.Counter),
        lists,
        lists.map(tuple),
        st.builds(collections.deque, lists, st.none() | st.integers(4, 9)),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Settings, inner, inner),
        st.builds(Frozen, inner),
    )


TREES = st.recursive(LEAVES, containers, max_leaves=12)


@settings(max_examples=400, deadline=None)
@given(TREES)
@example({frozenset({None}), frozenset({b"\x05\x83", 3})})
def test_what_was_encoded_decodes_to_the_same_value_and_type(value: Any) -> None:
    assert same(again(value), value)


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_what_was_encoded_is_json_that_any_reader_takes(value: Any) -> None:
    text = encode_tree(value)
    assert same(decode(json.dumps(json.loads(text))), value)


def test_the_order_of_an_ordered_dict_is_its_own() -> None:
    moved = collections.OrderedDict([("a", 1), ("b", 2), ("c", 3)])
    moved.move_to_end("a")
    assert list(again(moved)) == ["b", "c", "a"]


def test_ints_of_any_size() -> None:
    edges = [s * (1 << n) + d for n in (53, 63, 64, 128) for d in (-1, 0, 1) for s in (1, -1)]
    # More digits than Python writes in decimal, and than anybody could in decimal in time.
    long = (1 << 9_000_000) - 12345
    state = {"edges": edges, "long": [long, -long], long: "a key"}
    assert same(again(state), state)


def test_a_key_that_is_nan() -> None:
    ((key, value),) = again({math.nan: 1}).items()
    assert math.isnan(key)
    assert value == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(KEYS, max_size=4))
def test_paths_split_into_the_keys_that_were_joined(keys: list[Any]) -> None:
    path = join_path(keys)
    parts = split_path(path)
    assert len(parts) == len(keys)
    for key, part in zip(keys, parts, strict=True):
        if type(key) is str and "\ud800" <= max(key, default="") <= "\udfff":
            continue
        if type(key) is str or (type(key) is int and -(2**63) <= key < 2**63):
            assert part == key or isinstance(part, tuple)
        else:
            assert isinstance(part, tuple)


# -- types that this process does not have ---------------------------------------------------


def renamed(value: Any, old: str, new: str) -> Any:
    return decode(encode_tree(value).replace(old, new))


def test_an_unknown_named_tuple_becomes_a_generic_one() -> None:
    got = renamed(Point(1, "a"), "test_tree:Point", "elsewhere:Point")
    assert isinstance(got, tuple)
    assert (type(got).__name__, got.x, got.y) == ("Point", 1, "a")


def test_an_unknown_dataclass_becomes_a_namespace() -> None:
    got = renamed(Settings(0.1), "test_tree:Settings", "elsewhere:Settings")
    assert got == types.SimpleNamespace(lr=0.1, name="adam")


def test_an_unknown_enum_becomes_its_name() -> None:
    got = renamed({Colour.RED: 1}, "test_tree:Colour", "elsewhere:Colour")
    assert got == {_types.UnknownEnum("elsewhere:Colour", "RED"): 1}


def test_a_type_is_used_only_if_it_is_what_the_checkpoint_says() -> None:
    assert type(renamed(Point(1, 2), "test_tree:Point", "subprocess:Popen")).__name__ == "Popen"
    got = renamed(Settings(1), "test_tree:Settings", "subprocess:Popen")
    assert type(got) is types.SimpleNamespace
    # The fields have changed since.
    got = renamed(Settings(1), '"lr"', '"rate"')
    assert got == types.SimpleNamespace(rate=1, name="adam")


def test_nothing_is_imported_for_a_checkpoint() -> None:
    assert "this" not in sys.modules
    renamed(Point(1, 2), "test_tree:Point", "this:Point")
    renamed(Colour.RED, "test_tree:Colour", "this:Colour")
    assert "this" not in sys.modules


def test_no_code_of_the_class_runs() -> None:
    @dataclasses.dataclass
    class Loud:
        x: int

        def __post_init__(self) -> None:
            calls.append(self.x)

    calls: list[int] = []
    globals()["Loud"] = Loud
    Loud.__qualname__ = "Loud"
    try:
        text = encode_tree(Loud(3))
        calls.clear()
        got = decode(text)
        assert type(got) is Loud
        assert (got.x, calls) == (3, [])
    finally:
        del globals()["Loud"]


def test_a_factory_that_is_not_pythons_own_is_not_called() -> None:
    got = renamed(collections.defaultdict(list, {1: 2}), "builtins:list", "subprocess:Popen")
    assert type(got) is collections.defaultdict
    assert got.default_factory is None


class Custom:
    def __init__(self, x: int) -> None:
        self.x = x


def test_a_pickle_is_made_and_opened_only_by_name() -> None:
    name = "test_tree:Custom"
    text = encode_tree({"c": Custom(5)}, {name})
    assert decode(text, (name,))["c"].x == 5
    with pytest.raises(tierkeep.InvalidError, match="allow_pickle") as caught:
        decode(text)
    assert "(at c)" in str(caught.value.__notes__)
    with pytest.raises(tierkeep.InvalidError, match="test_tree:Custom"):
        decode(text, ("other:Name",))


# -- what cannot be stored -------------------------------------------------------------------


class NoState:
    pass


def cycle() -> Any:
    ring: dict[str, Any] = {"a": []}
    ring["a"].append(ring)
    return ring


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


UNSTORABLE: dict[str, tuple[Any, str]] = {
    "an object": (NoState(), "state_dict"),
    "a function": (len, "code is not stored"),
    "a lambda": (lambda: 1, "code is not stored"),
    "a str subclass": (Word("x"), "subclass"),
    "an int subclass": (type("Int", (int,), {})(3), "subclass"),
    "a dict subclass": (type("Dict", (dict,), {})(), "subclass"),
    "a class": (Colour, "class"),
    "a bytearray": (bytearray(b"x"), "bytes"),
    "a range": (range(3), "list"),
    "a generator": ((x for x in ()), "given"),
    "a flag of two": (Access.READ | Access.WRITE, "not a member"),
    "a defaultdict with a lambda": (collections.defaultdict(lambda: 0), "factory"),
    "a torch generator": (torch.Generator(), "get_state"),
    "a numpy generator": (numpy.random.default_rng(), "bit_generator"),
    "a record": (numpy.zeros(1, dtype=[("a", "i4")])[0], "parts"),
    "an array of objects": (numpy.array([None]), "dtype"),
    "an array of dates": (numpy.array(["2020-01-01"], "M8[D]"), "dtype"),
    "an array of the other byte order": (numpy.zeros(2, ">f4"), "newbyteorder"),
    "a masked array": (numpy.ma.array([1]), "subclass of numpy.ndarray"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "to_dense"),
    "a meta tensor": (torch.empty(2, device="meta"), "no bytes"),
    "a lazy conjugate": (torch.zeros(2, dtype=torch.complex64).conj(), "resolve_conj"),
    "a return type": (torch.max(torch.eye(2), 0), "subclass"),
    "a cycle": (cycle(), "contains itself"),
    "too deep": (nested(60), "deeper than 40"),
    "a tensor in a key": ({(torch.zeros(1),): 1}, "key"),
    "a pure path": (type(Path("x")).__mro__[2]("x"), "pathlib.Path"),
}


@pytest.mark.parametrize("what", UNSTORABLE)
def test_what_cannot_be_stored_is_an_error_that_names_its_path(what: str) -> None:
    value, hint = UNSTORABLE[what]
    with pytest.raises(tierkeep.InvalidError) as caught:
        encode_tree({"outer": [0, {"a.b/c": value}]})
    assert str(caught.value).startswith("cannot store outer/1/a.b~1c"), caught.value
    assert hint in str(caught.value)


def test_a_quantized_tensor_cannot_be_stored() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
    with pytest.raises(tierkeep.InvalidError, match=r"cannot store x: a quantized tensor"):
        encode_tree({"x": quantized})


def test_a_dataclass_with_more_than_its_fields_cannot_be_stored() -> None:
    more = Settings(1)
    more.extra = 2  # type: ignore[attr-defined]
    with pytest.raises(tierkeep.InvalidError, match="the attribute extra"):
        encode_tree(more)


def test_an_exception_in_state_dict_learns_where_it_was() -> None:
    class Fails:
        def state_dict(self) -> Any:
            raise KeyError("inner")

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(KeyError, match="inner") as caught:
        encode_tree({"a": {"b": Fails()}})
    assert caught.value.__notes__ == ["(while saving a/b)"]


def test_forty_levels_can_be_stored() -> None:
    assert again(nested(39)) == nested(39)
    with pytest.raises(tierkeep.InvalidError, match="deeper than 40"):
        encode_tree(nested(40))


def test_values_that_hold_one_another_twice_are_refused_in_time() -> None:
    bomb: Any = []
    for _ in range(35):
        bomb = [bomb, bomb]
    with pytest.raises(tierkeep.InvalidError, match="values"):
        encode_tree(bomb)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"x": 1}', "[" * 500, '{"dict": [[1]]}'])
def test_a_tree_that_is_not_one_is_damage(text: str) -> None:
    with pytest.raises(tierkeep.CorruptError):
        decode_tree(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"dict": [[[], 1]]}',
        '{"set": [[]]}',
        '{"dict": [[1, 2], [true, 3]]}',
        '{"numpy": ["O", "00"]}',
        '{"numpy": ["nonsense", "00"]}',
        '{"torch.dtype": "load"}',
        '{"tensor": {"lib": "torch", "name": "x"}}',
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(tierkeep.InvalidError):
        decode(text)
