"""Arrays in memory, and arrays too large for it, give the same batches."""

import keras
import numpy as np
import pytest

from loopscope import backend
from loopscope.data import arrays as arrays_module
from loopscope.data.order import permutation
from loopscope.data.source import as_source
from loopscope.errors import DataError
from models import FUSED, blobs, fresh, numbers, small_loop


def source_of(*data, **options):
    return as_source(*data, backend=backend.current(), **options)


def batches(source, epoch=0, limit=100):
    """Every batch of an epoch, cut out of the feeds as a program would."""
    data, found = source.open(epoch), []
    try:
        while (segment := data.take(limit)) is not None:
            feed = segment.feed
            for index in range(segment.start, segment.stop):
                rows = slice(index * feed.batch_size, (index + 1) * feed.batch_size)
                if feed.kind == "take":
                    rows = np.asarray(feed.order)[rows]
                batch = keras.tree.map_structure(
                    lambda a, rows=rows: np.asarray(a)[rows], feed.arrays
                )
                specs = keras.tree.map_structure(str, feed.specs)
                assert specs == keras.tree.map_structure(
                    lambda a: f"{a.dtype}[{', '.join(map(str, a.shape))}]", batch
                )
                found.append(batch)
    finally:
        data.close()
    return found


def test_without_shuffling_batches_come_in_the_order_of_the_rows():
    x = np.arange(10, dtype="float32")[:, None]
    source = source_of(x, x[:, 0] * 2, batch_size=4, shuffle=False)
    found = batches(source)
    assert [b[0][:, 0].tolist() for b in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [b[1].tolist() for b in found] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    assert (source.steps, source.ragged) == (3, True)


def test_shuffled_batches_follow_the_permutation_of_seed_and_epoch():
    x = np.arange(20)[:, None].astype("int32")
    source = source_of(x, batch_size=5, shuffle=True, seed=4)
    for epoch in (0, 3):
        found = np.concatenate([b[0][:, 0] for b in batches(source, epoch)])
        np.testing.assert_array_equal(found, permutation(20, seed=4, epoch=epoch))


def test_any_epoch_can_be_opened_without_those_before_it():
    x = numbers(20, 2)
    one, other = (source_of(x, batch_size=5, seed=1) for _ in range(2))
    for epoch in range(3):
        batches(one, epoch)
    for was, now in zip(batches(one, 7), batches(other, 7), strict=True):
        np.testing.assert_array_equal(was[0], now[0])


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_ragged_last_batch_comes_alone_at_the_end(limit):
    x = np.arange(11)[:, None].astype("int32")
    source = source_of(x, batch_size=4, shuffle=False)
    assert [len(b[0]) for b in batches(source, limit=limit)] == [4, 4, 3]


def test_a_batch_larger_than_the_data_is_all_of_them():
    source = source_of(numbers(5, 2), batch_size=64)
    assert source.steps == 1
    assert not source.ragged
    assert [len(b[0]) for b in batches(source)] == [5]


def test_dicts_tuples_and_lists_keep_their_structure():
    x = {"a": numbers(6, 2), "b": (numbers(6, 3), numbers(6, 1, seed=2))}
    found = batches(source_of(x, [numbers(6), numbers(6, 2)], batch_size=3))
    assert len(found) == 2
    assert set(found[0][0]) == {"a", "b"}
    assert [part.shape for part in found[0][0]["b"]] == [(3, 3), (3, 1)]
    assert [part.shape for part in found[0][1]] == [(3,), (3, 2)]


def test_rows_of_all_parts_stay_together():
    x = np.arange(12, dtype="float32")[:, None]
    y = {"left": np.arange(12, dtype="int32")}
    y["right"] = y["left"] * 10
    source = source_of(x, y, np.arange(12) * 100.0, batch_size=4, seed=2)
    for a, b, weight in batches(source):
        np.testing.assert_array_equal(a[:, 0], b["left"])
        np.testing.assert_array_equal(b["right"], b["left"] * 10)
        # One array of weights counts for each of the outputs.
        for part in ("left", "right"):
            np.testing.assert_array_equal(weight[part], b["left"] * 100)


def test_lists_of_numbers_are_arrays():
    found = batches(source_of([[1.0, 2.0], [3.0, 4.0]], [0.0, 1.0], shuffle=False))
    assert found[0][1].tolist() == [0, 1]


def test_the_spec_of_int64_says_what_is_on_the_device():
    found = batches(source_of(np.arange(6)[:, None]))
    assert found[0][0].shape == (6, 1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", "float32"),
        ("float32", "float32"),
        ("float16", "float32"),
        ("int32", "int32"),
        ("uint8", "uint8"),
        ("bool", "bool"),
    ],
)
def test_floats_become_floatx_and_everything_else_stays(dtype, expected):
    source = source_of(np.ones((4, 2), dtype))
    assert source.specs[0].dtype == expected
    assert batches(source)[0][0].dtype == expected


def test_floats_follow_the_floatx_of_keras():
    keras.config.set_floatx("float16")
    assert source_of(np.ones((4, 2), "float32")).specs[0].dtype == "float16"


def test_int64_labels_train_on_every_backend():
    x, y = blobs(16)
    fresh(small_loop, FUSED).fit(x, y.astype("int64"), batch_size=8, verbose=0)


def test_tensors_of_the_backend_are_arrays():
    x, y = blobs(24)
    loop = fresh(small_loop, FUSED)
    loop.fit(x, y, batch_size=8, verbose=0)
    other = fresh(small_loop, FUSED)
    tensors = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    other.fit(*tensors, batch_size=8, verbose=0)
    assert loop.state.sha256() == other.state.sha256()


def test_a_later_change_of_the_callers_array_does_not_reach_the_device():
    x, y = blobs(16)
    x = x.copy()
    loop = fresh(small_loop, FUSED)
    source = loop.source(x, y, batch_size=8, shuffle=False)
    expected = batches(source)[0][0].copy()
    x[:] = 0
    np.testing.assert_array_equal(batches(source)[0][0], expected)


# Larger than memory.


@pytest.fixture
def on_disk(tmp_path):
    x, y = blobs(43)
    mapped = np.memmap(tmp_path / "x.bin", "float32", "w+", shape=x.shape)
    mapped[:] = x
    mapped.flush()
    return np.memmap(tmp_path / "x.bin", "float32", "r", shape=x.shape), x, y


def test_a_memmap_is_streamed_and_never_placed_as_a_whole(on_disk):
    mapped, x, y = on_disk
    assert not source_of(mapped, y).resident
    assert source_of(x, y).resident


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_memmap_gives_the_batches_of_the_same_array_in_memory(on_disk, shuffle):
    mapped, x, y = on_disk
    options = {"batch_size": 8, "shuffle": shuffle, "seed": 5}
    streamed, resident = source_of(mapped, y, **options), source_of(x, y, **options)
    assert streamed.steps == resident.steps == 6
    for epoch in (0, 2):
        pairs = zip(batches(streamed, epoch), batches(resident, epoch), strict=True)
        for was, now in pairs:
            np.testing.assert_array_equal(was[0], now[0])
            np.testing.assert_array_equal(was[1], now[1])


def test_a_memmap_trains_to_the_bits_of_the_same_array_in_memory(on_disk):
    mapped, x, y = on_disk
    states = []
    for data in (mapped, x):
        loop = fresh(small_loop, FUSED)
        loop.fit(data, y, batch_size=8, epochs=2, verbose=0)
        states.append(loop.state.sha256())
    assert states[0] == states[1]


def test_arrays_above_the_limit_are_streamed(monkeypatch):
    x, y = blobs(24)
    monkeypatch.setattr(arrays_module, "RESIDENT_BYTES", 100)
    assert not source_of(x, y).resident
    loop = fresh(small_loop, FUSED)
    loop.fit(x, y, batch_size=8, verbose=0)
    monkeypatch.undo()
    other = fresh(small_loop, FUSED)
    other.fit(x, y, batch_size=8, verbose=0)
    assert loop.state.sha256() == other.state.sha256()


def test_a_large_tensor_of_the_backend_is_streamed_too(monkeypatch):
    x, y = blobs(24)
    monkeypatch.setattr(arrays_module, "RESIDENT_BYTES", 100)
    tensors = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    options = {"batch_size": 8, "seed": 2}
    large, plain = source_of(*tensors, **options), source_of(x, y, **options)
    for was, now in zip(batches(large), batches(plain), strict=True):
        np.testing.assert_array_equal(was[0], now[0])


def test_epochs_of_some_steps_go_on_where_the_last_one_stopped():
    source = source_of(numbers(22), batch_size=4, seed=3, steps_per_epoch=2)
    whole = source_of(numbers(22), batch_size=4, seed=3)
    for turn in range(2):
        parts = [b for e in range(3) for b in batches(source, epoch=3 * turn + e)]
        for was, now in zip(batches(whole, epoch=turn), parts, strict=True):
            np.testing.assert_array_equal(was[0], now[0])


def test_epochs_of_some_steps_go_on_in_streamed_arrays_too(monkeypatch):
    options = {"batch_size": 4, "seed": 3, "steps_per_epoch": 2}
    expected = [batches(source_of(numbers(22), **options), epoch=e) for e in range(6)]
    monkeypatch.setattr(arrays_module, "RESIDENT_BYTES", 10)
    streamed = source_of(numbers(22), **options)
    assert not streamed.resident
    for epoch, was in enumerate(expected):
        for one, other in zip(was, batches(streamed, epoch=epoch), strict=True):
            np.testing.assert_array_equal(one[0], other[0])


def test_a_sample_uses_nothing_up():
    source = source_of(*blobs(24), batch_size=8, seed=1)
    before = batches(source)
    assert source.sample().steps == 3
    for was, now in zip(before, batches(source), strict=True):
        np.testing.assert_array_equal(was[0], now[0])


def test_a_source_is_passed_through():
    source = source_of(*blobs(24))
    assert source_of(source) is source


def test_unequal_lengths_are_refused_with_every_shape():
    with pytest.raises(DataError) as caught:
        source_of({"a": numbers(4, 2), "b": numbers(5)}, numbers(4))
    assert "Received: shapes=[(4, 2), (5,), (4,)]" in str(caught.value)
