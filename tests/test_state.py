"""The state: every variable of a step, in a stable order, restored bit for bit."""

import hashlib

import keras
import numpy as np
import pytest

from loopscope import backend
from loopscope.state import State
from models import (
    FUSED,
    GEARS,
    all_kinds_loop,
    blobs,
    classes,
    fresh,
    numbers,
    small_loop,
)


def variables(*names):
    return [
        keras.Variable(np.full((2,), i, "float32"), name=name)
        for i, name in enumerate(names)
    ]


def state_of(made):
    return State(made, backend.current())


def test_variables_come_in_the_order_given_each_once():
    a, b, c = variables("a", "b", "c")
    state = state_of([b, a, b, c, a])
    assert list(dict(state)) == ["b", "a", "c"]
    assert [id(v) for v in state.variables] == [id(b), id(a), id(c)]
    assert len(state) == 3


def test_paths_that_occur_twice_are_numbered():
    assert list(dict(state_of(variables("w", "w", "b", "w")))) == [
        "w",
        "w#2",
        "b",
        "w#3",
    ]


def test_restore_undoes_everything_that_a_training_changes():
    loop = fresh(all_kinds_loop, FUSED)
    x, y = numbers(16, 6, 6, 1), classes(16, 3)
    loop.fit(x, y, batch_size=8, verbose=0)
    before, digest = loop.state.snapshot(), loop.state.sha256()
    loop.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert loop.state.sha256() != digest
    loop.state.restore(before)
    assert loop.state.sha256() == digest


def test_a_snapshot_can_be_restored_more_than_once():
    loop = fresh(small_loop, FUSED)
    loop.fit(*blobs(16), batch_size=8, verbose=0)
    before, digest = loop.state.snapshot(), loop.state.sha256()
    for _ in range(2):
        loop.fit(*blobs(16), batch_size=8, verbose=0)
        loop.state.restore(before)
        assert loop.state.sha256() == digest


def test_a_snapshot_of_another_length_is_refused():
    state = state_of(variables("a", "b"))
    with pytest.raises(ValueError, match="zip"):
        state.restore(state.snapshot()[:1])


def test_numpy_gives_copies():
    (variable,) = variables("a")
    state = state_of([variable])
    state.numpy()["a"][:] = 7
    np.testing.assert_array_equal(state.numpy()["a"], [0, 0])


def test_sha256_is_over_path_dtype_shape_and_bytes_in_order():
    digest = hashlib.sha256()
    for path, value in (("a", 0.0), ("b", 1.0)):
        array = np.full((2,), value, "float32")
        digest.update(f"{path}\0float32\0(2,)\0".encode() + array.tobytes())
    assert state_of(variables("a", "b")).sha256() == digest.hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        lambda: keras.Variable(np.zeros(2, "float32"), name="b"),
        lambda: keras.Variable(
            np.zeros(2, "int32"), dtype="int32", name="a", trainable=False
        ),
        lambda: keras.Variable(np.zeros((2, 1), "float32"), name="a"),
        lambda: keras.Variable(np.array([0, 1e-45], "float32"), name="a"),
        lambda: keras.Variable(np.array([0, -0.0], "float32"), name="a"),
    ],
    ids=["path", "dtype", "shape", "one bit", "sign of zero"],
)
def test_sha256_sees_every_difference(other):
    (first,) = variables("a")
    assert state_of([first]).sha256() != state_of([other()]).sha256()


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_the_state_of_a_loop_is_model_then_optimizer_then_metrics(gear):
    loop = fresh(all_kinds_loop, gear)
    x, y = numbers(16, 6, 6, 1), classes(16, 3)
    loop.fit(x, y, batch_size=8, verbose=0)
    model, optimizer = loop.model, loop.model.optimizer
    expected = [*model.variables, *optimizer.variables, *model.metrics_variables]
    found = {id(v): i for i, v in enumerate(loop.state.variables)}
    places = [found[id(v)] for v in expected]
    assert places == sorted(places)
    assert any("seed_generator_state" in path for path in dict(loop.state))
    assert any("iteration" in path for path in dict(loop.state))


def test_the_paths_of_the_state_are_the_same_in_every_gear_and_after_it():
    x, y = blobs(16)
    paths = {}
    for gear in GEARS:
        loop = fresh(small_loop, gear)
        loop.fit(x, y, batch_size=8, verbose=0)
        paths[gear] = list(dict(loop.state))
        loop.fit(x, y, batch_size=8, verbose=0)
        assert list(dict(loop.state)) == paths[gear]
    assert len({tuple(p) for p in paths.values()}) == 1
