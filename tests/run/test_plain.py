"""Plain data come back from JSON and arrays as they were; what is not plain is said."""

import collections
import enum
import json
import math
import os

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from loopscope.run.checkpoint import Draft, read, write
from loopscope.run.files import seal, unseal
from loopscope.run.plain import NotPlain, decode, encode

# No backend has a part in it.
pytestmark = pytest.mark.once

NUMBERS = ["bool", "int8", "uint8", "int32", "int64", "uint64"]
NUMBERS += ["float16", "float32", "float64"]

numbers = st.sampled_from(NUMBERS).flatmap(
    lambda dtype: npst.from_dtype(np.dtype(dtype)).map(np.dtype(dtype).type)
)
arrays = st.sampled_from([*NUMBERS, "complex64"]).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_side=3))
)
# Ones that JSON, or this way of writing, would confuse.
texts = st.text(max_size=4) | st.sampled_from(["$float", "$dict", "$", "a/b", "1", ""])
atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([-0.0, math.nan, math.inf, -math.inf])
    | texts
    | st.binary(max_size=4)
    | numbers
)
keys = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3)
    ),
    max_leaves=4,
)
values = st.recursive(
    atoms | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
        | st.dictionaries(texts, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


def same(a, b):
    """Equal in type, structure and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(same(x, y) for x, y in pairs)
    if isinstance(a, (np.ndarray, np.generic)):
        kinds = (a.dtype, a.shape) == (b.dtype, b.shape)
        return kinds and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return repr(a) == repr(b)
    return a == b


def there_and_back(value):
    """Through JSON, as a checkpoint is."""
    found = {}
    document = encode(value, found, "value")
    return decode(json.loads(json.dumps(document, allow_nan=False)), found)


@given(values)
def test_plain_data_come_back_as_they_were(value):
    assert same(there_and_back(value), value)


@given(values)
def test_a_sealed_document_comes_back_as_it_was(value):
    found = {}
    document = unseal(seal(encode(value, found, "value")), "file")
    assert same(decode(document, found), value)


@given(values)
def test_plain_data_come_back_out_of_a_checkpoint(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("checkpoint")
    extra = {}
    content = {"turn": 0, "value": encode(value, extra, "callbacks/0/value")}
    write(folder, Draft("a", 0, {}, extra, content))
    back = read(folder, "a")
    assert same(decode(back.content["value"], dict(back.extra)), value)


alike = st.sampled_from(["a", "a/a", "0", "key", 0, 1, "1", True, (1,), "(1,)"])
nests = st.recursive(
    st.integers(0, 255).map(lambda number: np.array([number], "uint8")),
    lambda inner: (
        st.dictionaries(alike, inner, max_size=4) | st.lists(inner, max_size=3)
    ),
    max_leaves=8,
)


@given(nests)
def test_arrays_in_nests_of_keys_that_look_alike_come_back_as_they_were(value):
    assert same(there_and_back(value), value)


def test_arrays_under_names_that_look_alike_are_kept_apart():
    one, two, three = (np.array([i]) for i in range(3))
    for value in (
        {"a": {"b": one}, "a/b": two},
        {1: one, "1": two, 1.0j.real: three},
        {"a": [one], "a/0": two},
        {(1,): one, "(1,)": two},
        {"key": one, 0: two},
    ):
        assert same(there_and_back(value), value), value


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_arrays_of_the_narrow_dtypes_of_keras_are_plain(dtype, tmp_path):
    # The best weights of EarlyStopping, under a policy of this dtype.
    array = np.arange(3).astype(getattr(ml_dtypes, dtype))
    extra = {}
    content = {"turn": 0, "weights": encode([array], extra, "weights")}
    write(tmp_path, Draft("a", 0, {"v": array}, extra, content))
    back = read(tmp_path, "a")
    assert same(back.state["v"], array)
    assert same(decode(back.content["weights"], dict(back.extra)), [array])


@pytest.mark.parametrize(
    "order", [">f4", ">i8", "<f4"], ids=["big float", "big int", "little"]
)
def test_arrays_of_any_byte_order_keep_their_values(order, tmp_path):
    array = np.arange(3, dtype=order)
    extra = {}
    content = {"turn": 0, "value": encode(array, extra, "value")}
    write(tmp_path, Draft("a", 0, {}, extra, content))
    back = read(tmp_path, "a")
    assert list(decode(back.content["value"], dict(back.extra))) == [0, 1, 2]


def test_arrays_that_are_no_block_of_memory_keep_their_values(tmp_path):
    whole = np.arange(24, dtype="float32").reshape(4, 6)
    for name, part in {
        "step": whole[::2, ::3],
        "turned": whole.T,
        "column": whole[:, 1],
        "none": whole[:0],
        "of no dimension": np.full((), 3.0, "float32"),
    }.items():
        extra = {}
        content = {"turn": 0, "value": encode(part, extra, "value")}
        write(tmp_path, Draft(name, 0, {name: part}, extra, content))
        back = read(tmp_path, name)
        assert same(decode(back.content["value"], dict(back.extra)), np.array(part))
        assert same(back.state[name], np.array(part))


class Colour(enum.IntEnum):
    RED = 1


class Point(collections.namedtuple("Point", "x y")):
    __slots__ = ()


class Sub(dict):
    """A dict with something of its own."""


NOT_PLAIN = {
    "a function": len,
    "a lambda": lambda: 0,
    "a class": int,
    "a module": math,
    "an object": object(),
    "a generator": (i for i in ()),
    "an enumeration": Colour.RED,
    "a named tuple": Point(1, 2),
    "a layer": keras.layers.Dense(1),
    "an array of objects": np.array([None]),
    "an array of texts": np.array(["a"]),
    "a date": np.datetime64("2026-01-01"),
    "a complex number": 1j,
    "a defaultdict": collections.defaultdict(int, a=1),
    "an OrderedDict": collections.OrderedDict(a=1),
    "a Counter": collections.Counter("aab"),
    "a dict of a subclass": Sub(a=1),
    "an array of a subclass": np.ma.masked_array([1, 2], [True, False]),
    "a range": range(3),
    "a bytearray": bytearray(b"a"),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_data_is_said_with_its_place(name):
    for value in (NOT_PLAIN[name], [{"a": (NOT_PLAIN[name],)}]):
        with pytest.raises(
            NotPlain, match=rf"^callback.*: {type(NOT_PLAIN[name]).__name__}"
        ):
            encode(value, {}, "callback")


def test_an_open_file_is_not_plain_data():
    with open(os.devnull) as file, pytest.raises(NotPlain, match="file"):
        encode({"file": file}, {}, "callback")


def test_a_list_that_holds_itself_is_not_plain_data():
    knot = [1]
    knot.append({"again": knot})
    with pytest.raises(NotPlain, match="callback"):
        encode(knot, {}, "callback")


@pytest.mark.parametrize(
    "document", [{"$unknown": 1}, {"$": 1}, {"$pickle": "gASVAAAAAAAAAAA="}]
)
def test_a_document_of_another_kind_is_refused(document):
    with pytest.raises(ValueError, match="unknown kind of value"):
        decode(document, {})
