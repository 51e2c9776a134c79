"""Sources that can only be iterated."""

import gc
import threading
import time

import keras
import numpy as np
import pytest

from loopscope.data import stream
from loopscope.data.feed import Spec
from loopscope.data.stream import StreamSource, as_batch
from loopscope.errors import DataError
from loopscope.events import ChunkEnd, Compiled
from models import (
    FUSED,
    GEARS,
    TENSORFLOW,
    Batches,
    blobs,
    fresh,
    numbers,
    relative,
    small_loop,
    warned,
)

SIZE = 8


def cut(x, y, size=SIZE):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def taken(source, epoch=0, limit=100):
    """Batches of one epoch as lists of x."""
    data, found = source.open(epoch), []
    try:
        while (segment := data.take(limit)) is not None:
            rows = segment.feed.batch_size
            array = np.asarray(segment.feed.arrays[0])
            for index in range(segment.start, segment.stop):
                found.append(array[index * rows : (index + 1) * rows].tolist())
    finally:
        data.close()
    return found


def stream_of(batches, **options):
    return StreamSource(batches, place=np.asarray, **options)


def prefetching():
    return [t for t in threading.enumerate() if t.name == "loopscope-data"]


def trained_state(*data, epochs=2, gear=FUSED, **options):
    loop = fresh(small_loop, gear)
    loop.fit(*data, epochs=epochs, verbose=0, **options)
    return loop.state.sha256(), loop.step


@pytest.fixture(scope="module")
def data():
    return blobs(44)


@pytest.fixture(scope="module")
def expected(data):
    """What the same arrays in memory train to."""
    return trained_state(*data, batch_size=SIZE, shuffle=False)


def as_dataset(x, y):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(SIZE)


class Indexed(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.epochs_ended = 0

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]

    def on_epoch_end(self):
        self.epochs_ended += 1


KINDS = {
    "an iterable": lambda x, y: Batches(cut(x, y)),
    "a PyDataset": lambda x, y: Indexed(cut(x, y)),
    "a list of batches": lambda x, y: cut(x, y),
    "a tf.data.Dataset": as_dataset,
    "an iterable of lists": lambda x, y: Batches([list(b) for b in cut(x, y)]),
    "an iterable of tensors": lambda x, y: Batches(
        keras.tree.map_structure(keras.ops.convert_to_tensor, cut(x, y))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_trains_to_the_bits_of_the_same_arrays(kind, data, expected):
    if kind == "a tf.data.Dataset" and not TENSORFLOW:
        pytest.skip("TensorFlow is not the backend")
    assert trained_state(KINDS[kind](*data), shuffle=False) == expected


@pytest.mark.parametrize("gear", [g for g in GEARS if "xla" not in g or g == FUSED])
def test_a_stream_runs_in_every_gear(gear, data):
    in_memory = trained_state(
        *data, batch_size=SIZE, shuffle=False, gear=gear, epochs=1
    )
    assert trained_state(Batches(cut(*data)), gear=gear, epochs=1) == in_memory


def test_a_generator_is_one_epoch_long(data):
    batches = (batch for batch in cut(*data))
    loop = fresh(small_loop, FUSED)
    history = loop.fit(batches, epochs=1, verbose=0)
    assert loop.step == 6
    assert len(history.history["loss"]) == 1


def test_a_generator_that_is_dry_is_refused_in_the_next_training(data):
    batches = (batch for batch in cut(*data))
    loop = fresh(small_loop, FUSED)
    loop.fit(batches, epochs=1, verbose=0)
    with pytest.raises(DataError, match="The data are empty: the source gave no batch"):
        loop.fit(batches, epochs=1, verbose=0)


def test_a_pydataset_hears_of_the_end_of_each_epoch(data):
    dataset = Indexed(cut(*data))
    trained_state(dataset, epochs=3)
    assert dataset.epochs_ended == 3


def test_a_stream_is_begun_once_an_epoch(data):
    batches = Batches(cut(*data))
    trained_state(batches, epochs=3)
    assert batches.begun == 3


def test_the_length_of_a_stream_is_known_where_it_has_one():
    assert stream_of(Batches([])).steps is None
    assert stream_of([1, 2, 3]).steps == 3
    assert stream_of(Batches([]), steps_per_epoch=5).steps == 5


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_batches_come_in_order_whatever_the_limit(limit):
    batches = [np.full((2, 1), i, "float32") for i in range(7)]
    found = taken(stream_of(Batches(batches)), limit=limit)
    assert found == [batch.tolist() for batch in batches]


def test_batches_of_one_shape_are_gathered_into_one_chunk():
    source = stream_of(Batches(np.zeros((2, 3)) for _ in range(9)))
    data = source.open(0)
    segment = data.take(100)
    data.close()
    assert segment.steps == 9


def test_a_ragged_batch_in_the_middle_keeps_its_place():
    lengths = [4, 4, 2, 4, 3, 3, 4]
    batches = [np.full((n, 1), i, "float32") for i, n in enumerate(lengths)]
    found = taken(stream_of(Batches(batches)))
    assert found == [batch.tolist() for batch in batches]


def test_a_chunk_holds_no_more_than_its_bytes(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 3 * 2 * 4 * 5)
    source = stream_of(Batches(np.zeros((2, 5), "float32") for _ in range(9)))
    data = source.open(0)
    steps = []
    while (segment := data.take(100)) is not None:
        steps.append(segment.steps)
    data.close()
    assert steps == [3, 3, 3]


def test_a_slow_source_hands_on_what_it_has(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_WAIT_S", 0.0)
    source = stream_of(Batches(np.zeros((2, 5), "float32") for _ in range(4)))
    data = source.open(0)
    steps = []
    while (segment := data.take(100)) is not None:
        steps.append(segment.steps)
    data.close()
    assert sum(steps) == 4
    assert len(steps) > 1


@pytest.mark.parametrize("gear", ["eager", FUSED])
@pytest.mark.parametrize("good", [0, 1, 5])
def test_an_error_after_some_batches_leaves_so_many_steps(gear, good, data):
    def failing():
        yield from cut(*data)[:good]
        raise OSError("no such shard")

    loop = fresh(small_loop, gear)
    with pytest.raises(OSError, match="no such shard"):
        loop.fit(failing(), verbose=0)
    assert loop.step == int(loop.model.optimizer.iterations) == good
    assert prefetching() == []


@pytest.mark.parametrize("kind", ["whole", "broken off", "steps", "evaluate"])
def test_no_thread_is_left_behind(kind, data):
    loop = fresh(small_loop, FUSED)
    endless = Batches(cut(*data)[:1] * 3000)
    if kind == "whole":
        loop.fit(Batches(cut(*data)), epochs=2, verbose=0)
    elif kind == "broken off":
        for epoch in loop.epochs(1):
            for _ in epoch.train(endless):
                break
    elif kind == "steps":
        for epoch in loop.epochs(1):
            for _ in epoch.train(endless, every=None, steps=3):
                pass
        assert loop.step == 3
    else:
        loop.evaluate(Batches(cut(*data)), verbose=0)
    for thread in prefetching():
        thread.join(2)
    assert prefetching() == []


@pytest.fixture
def close_what_is_left():
    yield
    for thing in gc.get_objects():
        if type(thing) is stream.StreamPass:
            thing.close()


def test_no_thread_is_left_behind_by_data_that_are_refused(data, close_what_is_left):
    loop = fresh(small_loop, FUSED)
    with pytest.raises(DataError, match="The model does not take these data"):
        loop.fit(Batches([(numbers(8, 5), data[1][:8])] * 3000), verbose=0)
    time.sleep(0.3)
    assert prefetching() == []


def test_a_generator_goes_on_in_the_next_training_where_the_last_one_stopped(data):
    given = []

    def generator():
        for batch in cut(*data) * 9:
            given.append(batch)
            yield batch

    batches, loop = generator(), fresh(small_loop, FUSED)
    for _ in range(3):
        loop.fit(batches, epochs=2, steps_per_epoch=2, verbose=0)
        assert len(given) == loop.step
    assert loop.step == 12
    assert next(batches) is given[12]


def test_a_generator_is_not_begun_again_in_a_second_epoch(data):
    loop = fresh(small_loop, FUSED)
    with warned("Your input ran out of data"):
        history = loop.fit((batch for batch in cut(*data)), epochs=2, verbose=0)
    assert loop.step == 6
    assert history.epoch == [0, 1]


def test_closing_a_pass_does_not_wait_for_more_batches():
    slow = threading.Event()

    def generator():
        yield np.zeros((2, 1))
        slow.wait(5)
        yield np.zeros((2, 1))

    source = stream_of(generator())
    data = source.open(0)
    closer = threading.Thread(target=lambda: (time.sleep(0.05), slow.set()))
    closer.start()
    data.close()
    closer.join()
    assert prefetching() == []


# steps_per_epoch.


def test_steps_per_epoch_goes_on_where_the_last_epoch_stopped():
    batches = [np.full((2, 1), i, "float32") for i in range(8)]
    source = stream_of(Batches(batches), steps_per_epoch=3)
    for epoch, first in ((0, 0), (1, 3)):
        data = source.open(epoch)
        seen = []
        for _ in range(3):
            segment = data.take(1)
            array = np.asarray(segment.feed.arrays[0])
            seen.append(array[segment.start * 2, 0])
        data.close()
        assert seen == [first, first + 1, first + 2]
    source.close()


def test_training_with_steps_per_epoch_uses_every_batch_of_a_stream_once(data):
    whole = fresh(small_loop, FUSED)
    whole.fit(Batches(cut(*data)), verbose=0)
    parts = fresh(small_loop, FUSED)
    parts.fit((batch for batch in cut(*data)), epochs=3, steps_per_epoch=2, verbose=0)
    assert parts.step == whole.step == 6
    for was, now in zip(
        whole.model.get_weights(), parts.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(was, now)


def test_a_stream_that_runs_dry_says_so(data):
    loop = fresh(small_loop, FUSED)
    with warned("Your input ran out of data; interrupting"):
        loop.fit(
            (batch for batch in cut(*data)), epochs=1, steps_per_epoch=9, verbose=0
        )
    assert loop.step == 6


def test_an_endless_generator_trains_for_its_steps(data, close_what_is_left):
    def endless():
        while True:
            yield from cut(*data)

    loop = fresh(small_loop, FUSED)
    history = loop.fit(
        endless(),
        epochs=2,
        steps_per_epoch=5,
        validation_data=endless(),
        validation_steps=2,
        verbose=0,
    )
    assert loop.step == 10
    assert len(history.history["val_loss"]) == 2


def test_no_thread_is_left_behind_by_steps_per_epoch(data, close_what_is_left):
    loop = fresh(small_loop, FUSED)
    loop.fit(Batches(cut(*data) * 500), epochs=2, steps_per_epoch=3, verbose=0)
    time.sleep(0.3)
    assert prefetching() == []


# Batches.


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (np.zeros((2, 1)), 1),
        ((np.zeros((2, 1)),), 1),
        ((np.zeros((2, 1)), np.zeros(2)), 2),
        ([np.zeros((2, 1)), np.zeros(2), np.ones(2)], 3),
        ((np.zeros((2, 1)), None), 1),
        (({"a": np.zeros((2, 1))}, None, None), 1),
    ],
)
def test_a_batch_is_x_then_y_then_sample_weight(raw, parts):
    assert len(as_batch(raw)) == parts


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            (np.zeros(2),) * 4,
            "A batch must be x, (x, y) or (x, y, sample_weight), without None in "
            "between. Received: tuple of 4: ['ndarray', 'ndarray', 'ndarray', "
            "'ndarray']",
        ),
        (
            (np.zeros(2), None, np.zeros(2)),
            "A batch must be x, (x, y) or (x, y, sample_weight), without None in "
            "between. Received: tuple of 3: ['ndarray', 'NoneType', 'ndarray']",
        ),
        (
            None,
            "A batch must be x, (x, y) or (x, y, sample_weight), without None in "
            "between. Received: NoneType",
        ),
        (
            np.float32(3),
            "Every array of a batch must have the same first axis, which counts its "
            "examples. Received: shapes=[()]",
        ),
    ],
)
def test_what_is_no_batch_is_refused(raw, text):
    with pytest.raises(DataError) as caught:
        as_batch(raw)
    assert str(caught.value) == text


def test_a_bad_batch_in_the_middle_names_its_step(data):
    batches = cut(*data)
    batches[3] = (batches[3][0], batches[3][1][:2])
    loop = fresh(small_loop, FUSED)
    with pytest.raises(DataError, match="the same first axis") as caught:
        loop.fit(Batches(batches), verbose=0)
    assert loop.step == 3
    assert "global step 3" in "".join(caught.value.__notes__)


def test_class_weights_of_a_stream_are_those_of_arrays(data):
    weights = {0: 0.5, 2: 3.0}
    in_memory = trained_state(
        *data, batch_size=SIZE, shuffle=False, class_weight=weights, epochs=1
    )
    streamed = trained_state(Batches(cut(*data)), class_weight=weights, epochs=1)
    assert streamed == in_memory


def test_samples_of_a_stream_are_counted(data):
    loop = fresh(small_loop, FUSED)
    seen = []
    loop.subscribe(lambda e: seen.append(e) if isinstance(e, ChunkEnd) else None)
    loop.fit(Batches(cut(*data)), verbose=0)
    assert seen[-1].samples == 44


def test_ever_new_shapes_share_one_program_where_axes_can_stay_open():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((None,)),
            keras.layers.Embedding(9, 4),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3),
        ]
    )
    lengths = [3, 7, 5, 4, 9, 6, 8, 3, 11, 2]
    x = [np.random.default_rng(n).integers(0, 9, (4, n)) for n in lengths]
    y = np.array([0, 1, 2, 0])
    loop, compiled = small_loop(FUSED, model=model), []
    loop.subscribe(lambda e: compiled.append(e) if isinstance(e, Compiled) else None)
    loop.fit(Batches([(part, y) for part in x]), verbose=0)
    assert loop.step == len(lengths)
    # The first three as they are, one program for all that follow.
    shapes = len(set(lengths))
    assert len(compiled) == (4 if TENSORFLOW else shapes)
    expected = model.predict_on_batch(x[4])
    got = loop.predict(Batches([(part, y) for part in x]), verbose=0)
    assert relative(expected, got[16:20]) < 1e-5


def test_a_common_spec_leaves_open_what_varies():
    shapes, seen = stream.Shapes(), []
    for rows, columns in ((8, 3), (8, 4), (2, 5), (8, 6), (8, 7), (8, 3), (4, 9)):
        found = shapes.loosened((Spec((rows, columns), "int32"),))
        seen.append(None if found is None else found[0].shape)
    assert seen == [
        None,
        None,
        None,
        (None, None),
        (None, None),
        None,
        (None, None),
    ]
    assert shapes.loosened((Spec((8, 3, 1), "int32"),)) is None
    assert shapes.loosened((Spec((8, 6), "int64"),)) is None
