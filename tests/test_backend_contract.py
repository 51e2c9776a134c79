"""What every room under `backend/` has to keep. A new backend passes this file."""

import keras
import numpy as np
import pytest
from keras import layers

import loopscope
from loopscope import backend
from loopscope.backend import base
from loopscope.data.arrays import ArraySource
from loopscope.errors import BackendError, StepError
from loopscope.gear import EAGER, Gear
from loopscope.gear import GEARS as ALL_GEARS
from models import GEARS, TENSORFLOW


@pytest.fixture
def room():
    return backend.current()


@pytest.fixture
def counter():
    return keras.Variable(np.zeros(2, "float32"), name="counter")


def segment_of(room, steps=4, rows=2):
    x = np.arange(steps * rows, dtype="float32")[:, None]
    source = ArraySource((x,), batch_size=rows, shuffle=False, seed=0, place=room.place)
    return source.open(0).take(steps)


def program_of(room, step, gear, segment, variables, capacity=8):
    trace = room.trace(step, segment.feed.specs, lambda: variables)
    return room.program(
        step,
        gear,
        segment.feed,
        None if gear == EAGER else trace,
        trace.variables or variables,
        capacity,
    )


def test_it_has_a_name_gears_and_a_device(room):
    assert room.name == keras.backend.backend()
    assert all(isinstance(gear, Gear) for gear in room.gears)
    assert EAGER in room.gears
    assert len(set(room.gears)) == len(room.gears)
    assert isinstance(room.device(), str)
    assert room.device()


def test_there_is_one_room_in_a_process(room):
    assert backend.current() is room


def test_every_method_of_the_protocol_is_there(room):
    for name in vars(base.Backend):
        if not name.startswith("_"):
            assert hasattr(room, name), name


def test_place_and_to_numpy_give_back_what_was_given(room):
    for dtype in ("float32", "int32", "uint8", "bool"):
        array = np.array([[1, 0], [1, 1]], dtype)
        placed = room.place(array)
        assert room.is_tensor(placed)
        back = room.to_numpy(placed)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_what_was_placed_is_not_the_callers_memory(room):
    array = np.ones(4096, "float32")
    placed = room.place(array)
    array[:] = 0
    np.testing.assert_array_equal(room.to_numpy(placed), 1)


@pytest.mark.parametrize("value", [np.zeros(3), [1.0], 3, None, "words"])
def test_what_is_of_no_framework_is_no_tensor(room, value):
    assert not room.is_tensor(value)


def test_a_keras_tensor_of_the_backend_is_a_tensor(room):
    assert room.is_tensor(keras.ops.zeros(3))


def test_assign_sets_a_value_from_numpy_and_from_the_device(room, counter):
    room.assign(counter, np.array([1, 2], "float32"))
    np.testing.assert_array_equal(room.to_numpy(room.read(counter)), [1, 2])
    room.assign(counter, room.place(np.array([3, 4], "float32")))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(counter), [3, 4])


@pytest.mark.parametrize("gear", GEARS)
def test_what_was_read_is_not_changed_by_later_steps(room, counter, gear):
    def step(x):
        counter.assign_add(keras.ops.ones(2))
        return {"loss": keras.ops.sum(x)}

    segment = segment_of(room)
    program = program_of(room, step, ALL_GEARS[gear], segment, [counter])
    before = room.read(counter)
    program(segment.feed, 0, 4)
    between = room.read(counter)
    counter.assign(np.array([9, 9], "float32"))
    counter.assign_add(keras.ops.ones(2))
    np.testing.assert_array_equal(room.to_numpy(before), [0, 0])
    np.testing.assert_array_equal(room.to_numpy(between), [4, 4])


@pytest.mark.parametrize("gear", GEARS)
def test_a_program_runs_the_steps_it_is_told_and_stacks_their_outputs(
    room, counter, gear
):
    def step(x):
        counter.assign_add(keras.ops.ones(2))
        return {"sum": keras.ops.sum(x), "first": x[0], "count": counter + 0}

    segment = segment_of(room, steps=6)
    program = program_of(room, step, ALL_GEARS[gear], segment, [counter])
    outputs = program(segment.feed, 1, 4)
    assert set(outputs) == {"sum", "first", "count"}
    assert all(isinstance(value, np.ndarray) for value in outputs.values())
    np.testing.assert_array_equal(outputs["sum"], [5, 9, 13])
    np.testing.assert_array_equal(outputs["first"], [[2], [4], [6]])
    np.testing.assert_array_equal(outputs["count"], [[1, 1], [2, 2], [3, 3]])
    assert outputs["sum"].dtype == "float32"
    outputs = program(segment.feed, 5, 6)
    np.testing.assert_array_equal(outputs["sum"], [21])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(counter), [4, 4])


@pytest.mark.parametrize("gear", GEARS)
def test_a_program_sees_what_was_assigned_between_two_calls(room, counter, gear):
    def step(x):
        return {"loss": counter[0] + 0 * keras.ops.sum(x)}

    segment = segment_of(room)
    program = program_of(room, step, ALL_GEARS[gear], segment, [counter])
    assert program(segment.feed, 0, 1)["loss"] == [0]
    room.assign(counter, np.array([5, 5], "float32"))
    assert program(segment.feed, 0, 1)["loss"] == [5]


@pytest.mark.parametrize("gear", GEARS)
def test_integers_and_booleans_come_back_as_such(room, gear):
    def step(x):
        return {
            "count": keras.ops.cast(keras.ops.sum(x), "int32"),
            "large": keras.ops.sum(x) > 6,
        }

    segment = segment_of(room, steps=3)
    program = program_of(room, step, ALL_GEARS[gear], segment, [])
    outputs = program(segment.feed, 0, 3)
    assert (outputs["count"].dtype, outputs["large"].dtype) == ("int32", "bool")
    assert outputs["count"].tolist() == [1, 5, 9]
    assert outputs["large"].tolist() == [False, False, True]


def test_tracing_changes_no_value_and_builds_what_is_not_built(room):
    optimizer = keras.optimizers.Adam(0.1)
    model = keras.Sequential(
        [keras.Input((1,)), layers.BatchNormalization(), layers.Dense(1)]
    )
    metric = keras.metrics.Mean()

    def step(x):
        def compute_loss():
            return keras.ops.mean(keras.ops.square(model(x, training=True) - 1))

        loss, grads = loopscope.value_and_grad(compute_loss, model.trainable_variables)
        optimizer.apply(grads, model.trainable_variables)
        metric.update_state(loss)
        return {"loss": loss}

    def known():
        return [*model.variables, *optimizer.variables, *metric.variables]

    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    trace = room.trace(step, segment_of(room).feed.specs, known)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert optimizer.built
    assert int(optimizer.iterations) == 0
    slots = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
    assert all(np.isfinite(slot).all() for slot in slots)
    assert float(metric.result()) == 0
    touched = {id(variable) for variable in trace.variables}
    assert {id(v) for v in model.variables} <= touched
    assert {id(v) for v in metric.variables} <= touched
    assert trace.outputs == {"loss": base.Spec((), "float32")}


def test_a_trace_names_a_variable_that_nobody_knew(room, counter):
    def step(x):
        counter.assign_add(keras.ops.ones(2))
        return {"loss": keras.ops.sum(x)}

    trace = room.trace(step, segment_of(room).feed.specs, lambda: [])
    native = getattr(counter, "value", None)
    assert any(v is counter or v is native for v in trace.variables)


def test_a_trace_shows_an_output_that_is_no_tensor_as_it_came(room):
    def step(x):
        return {"loss": keras.ops.sum(x), "nothing": None}

    trace = room.trace(step, segment_of(room).feed.specs, lambda: [])
    assert trace.outputs["nothing"] is None


# Gradients.


def in_a_step(room, step, variables, gear=EAGER):
    segment = segment_of(room, steps=1)
    return program_of(room, step, gear, segment, variables)(segment.feed, 0, 1)


@pytest.mark.parametrize("gear", GEARS)
def test_value_and_grad_gives_the_value_and_the_derivatives(room, gear):
    a, b = (
        keras.Variable(value, name=name) for name, value in (("a", 3.0), ("b", 2.0))
    )

    def step(x):
        value, (da, db) = loopscope.value_and_grad(lambda: a * a * b, [a, b])
        return {"value": value, "da": da, "db": db}

    outputs = in_a_step(room, step, [a, b], ALL_GEARS[gear])
    assert {k: v.tolist() for k, v in outputs.items()} == {
        "value": [18],
        "da": [12],
        "db": [9],
    }


def test_value_and_grad_with_aux_gives_both(room):
    a = keras.Variable(3.0)

    def step(x):
        (value, aux), (da,) = loopscope.value_and_grad(
            lambda: (a * a, {"twice": 2 * a}), [a], has_aux=True
        )
        return {"value": value, "twice": aux["twice"], "da": da}

    outputs = in_a_step(room, step, [a])
    assert [outputs[k].item() for k in ("value", "twice", "da")] == [9, 6, 6]


@pytest.mark.parametrize("gear", GEARS)
@pytest.mark.parametrize("has_aux", [True, False])
def test_value_and_grad_keeps_what_the_forward_pass_assigns(room, gear, has_aux):
    norm = layers.BatchNormalization(momentum=0.5)
    norm.build((None, 1))
    drop = layers.Dropout(0.5, seed=1)
    calls = keras.Variable(0.0, trainable=False)

    def step(x):
        def compute_loss():
            calls.assign(calls + 1)
            y = drop(norm(x + 4, training=True), training=True)
            loss = keras.ops.sum(y * norm.gamma)
            return (loss, y) if has_aux else loss

        value, _ = loopscope.value_and_grad(
            compute_loss, norm.trainable_variables, has_aux=has_aux
        )
        return {"loss": value[0] if has_aux else value}

    variables = [*norm.variables, *drop.variables, calls]
    seed = keras.ops.convert_to_numpy(drop.seed_generator.state).copy()
    in_a_step(room, step, variables, ALL_GEARS[gear])
    assert float(calls) == 1
    # Rows 0 and 1, plus 4: a mean of 4.5, taken in by half.
    mean = keras.ops.convert_to_numpy(norm.moving_mean)
    np.testing.assert_allclose(mean, [2.25])
    assert (keras.ops.convert_to_numpy(drop.seed_generator.state) != seed).any()


def test_value_and_grad_sees_what_the_step_assigned_before(room):
    a = keras.Variable(1.0)

    def step(x):
        a.assign(5.0)
        value, (da,) = loopscope.value_and_grad(lambda: a * a, [a])
        return {"value": value, "da": da}

    outputs = in_a_step(room, step, [a])
    assert (outputs["value"].item(), outputs["da"].item()) == (25, 10)


def test_a_variable_that_the_value_does_not_depend_on_has_no_gradient(room):
    a, b = keras.Variable(3.0), keras.Variable(2.0)

    def step(x):
        value, (_, db) = loopscope.value_and_grad(lambda: a * 2, [a, b])
        assert db is None or not TENSORFLOW
        return {"value": value, "db": keras.ops.zeros(()) if db is None else db}

    assert in_a_step(room, step, [a, b])["db"].item() == 0


@pytest.mark.parametrize(
    "unreached",
    [
        lambda a: keras.ops.stop_gradient(a * 2),
        lambda a: keras.ops.ones(()),
        lambda a: keras.ops.convert_to_tensor(1.0),
    ],
    ids=["stop_gradient", "constant", "tensor"],
)
def test_a_value_that_no_variable_reaches_is_refused(room, unreached):
    a = keras.Variable(3.0, name="lonely")

    def step(x):
        value, _ = loopscope.value_and_grad(lambda: unreached(a), [a])
        return {"value": value}

    with pytest.raises(StepError) as caught:
        room.trace(step, segment_of(room).feed.specs, lambda: [a])
    assert str(caught.value) == base.no_gradient([a])
    assert "Received: variables=['lonely']" in str(caught.value)


def test_a_gradient_with_respect_to_nothing_is_refused(room):
    def step(x):
        value, _ = loopscope.value_and_grad(lambda: keras.ops.sum(x), [])
        return {"value": value}

    with pytest.raises(StepError, match=r"Received: variables=\[\]"):
        room.trace(step, segment_of(room).feed.specs, lambda: [])


def test_gradients_are_right_outside_of_any_program_too():
    a = keras.Variable(3.0)
    value, (da,) = loopscope.value_and_grad(lambda: a * a, [a])
    assert (float(value), float(da)) == (9, 6)


# The door.


def test_a_backend_without_a_room_is_refused(monkeypatch):
    backend.current.cache_clear()
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    try:
        with pytest.raises(BackendError) as caught:
            backend.current()
    finally:
        backend.current.cache_clear()
    assert str(caught.value) == (
        "loopscope has no room for Keras's 'numpy' backend. It has: 'tensorflow', "
        "'jax', 'torch'. Set KERAS_BACKEND to one of these before Keras is imported."
    )


def test_two_reads_are_the_same_until_the_variable_is_assigned():
    room = backend.current()
    values = [np.zeros((3, 2), "float32"), np.float32(1), np.int32(2)]
    for value in values:
        variable = keras.Variable(value, dtype=value.dtype.name, trainable=False)
        before, again = room.read(variable), room.read(variable)
        assert room.same(before, before)
        assert np.ndim(value) == 0 or room.same(before, again)
        # Nothing else may be taken for unchanged: what was assigned would be lost.
        variable.assign(value + 1)
        after = room.read(variable)
        assert not room.same(before, after)
        assert not room.same(after, before)
