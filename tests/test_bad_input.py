"""Wrong input is refused before a step; what fails in a step undoes that step only."""

import os
import signal
import threading
import traceback

import keras
import numpy as np
import pytest

import loopscope
from loopscope import Loop
from loopscope.data import stream
from loopscope.errors import DataError, GearError, StepError, UsageError
from loopscope.events import ChunkEnd, Compiled
from models import (
    FUSED,
    GEARS,
    STEP,
    TENSORFLOW,
    Batches,
    blobs,
    fresh,
    numbers,
    small_loop,
    small_model,
    warned,
)


def built_loop(gear=FUSED, *, steps=3):
    """A loop that has trained a little, so that there is something to spoil."""
    loop = fresh(small_loop, gear)
    if steps:
        loop.fit(*blobs(8 * steps), batch_size=8, verbose=0)
    else:
        loop.model.optimizer.build(loop.model.trainable_variables)
    return loop


def refused(loop, error, call):
    """The text of the error that `call` raises, with everything as it was."""
    state, step = loop.state.sha256(), loop.step
    size, iterations = len(loop.state), int(loop.model.optimizer.iterations)
    events = []
    loop.subscribe(events.append)
    with pytest.raises(error) as caught:
        call()
    loop.unsubscribe(events.append)
    assert loop.state.sha256() == state
    assert (len(loop.state), loop.step) == (size, step)
    assert int(loop.model.optimizer.iterations) == iterations
    assert not [e for e in events if isinstance(e, (ChunkEnd, Compiled))]
    assert isinstance(caught.value, UsageError)
    return str(caught.value)


@pytest.fixture(scope="module")
def loop():
    return built_loop()


def test_x_and_y_of_unequal_lengths_are_refused(loop):
    x, y = blobs(24)
    text = refused(loop, DataError, lambda: loop.fit(x, y[:20], verbose=0))
    assert text == (
        "All arrays must have the same number of examples (first axis). Make sure that "
        "x, y and sample_weight belong together. Received: shapes=[(24, 4), (20,)]"
    )


def test_sample_weight_of_another_length_is_refused(loop):
    x, y = blobs(24)
    weight = np.ones(3, "float32")
    text = refused(
        loop, DataError, lambda: loop.fit(x, y, sample_weight=weight, verbose=0)
    )
    assert "Received: shapes=[(24, 4), (24,), (3,)]" in text


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_empty_arrays_are_refused(loop, method):
    x, y = blobs(24)
    call = getattr(loop, method)
    text = refused(loop, DataError, lambda: call(x[:0], y[:0], verbose=0))
    assert text == (
        "The data are empty: expected at least one example. "
        "Received: shapes=[(0, 4), (0,)]"
    )


def test_an_empty_stream_is_refused(loop):
    text = refused(loop, DataError, lambda: loop.fit(Batches([]), verbose=0))
    assert text == (
        "The data are empty: the source gave no batch. Expected at least one. "
        "Received: Batches"
    )


@pytest.mark.parametrize("size", [0, -8, 2.5, "8", True])
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_a_batch_size_that_is_no_whole_number_above_0_is_refused(loop, method, size):
    x, y = blobs(24)
    data = (x,) if method == "predict" else (x, y)
    text = refused(
        loop,
        DataError,
        lambda: getattr(loop, method)(*data, batch_size=size, verbose=0),
    )
    assert text == (
        "`batch_size` must be a whole number of at least 1. "
        f"Received: batch_size={size!r}"
    )


@pytest.mark.parametrize("name", ["epochs", "initial_epoch", "steps_per_epoch"])
def test_a_count_below_its_least_is_refused(loop, name):
    x, y = blobs(24)
    text = refused(loop, UsageError, lambda: loop.fit(x, y, verbose=0, **{name: -1}))
    assert text.startswith(f"`{name}` must be a whole number of at least ")
    assert text.endswith(f"Received: {name}=-1")


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_a_shape_that_the_model_does_not_take_is_refused(loop, method):
    x, y = numbers(24, 5), blobs(24)[1]
    data = (x,) if method == "predict" else (x, y)
    text = refused(
        loop, DataError, lambda: getattr(loop, method)(*data, batch_size=8, verbose=0)
    )
    assert text.startswith(
        "The model does not take these data. Expected: input of shape (None, 4). "
        "Received: x=float32[8, 5] (the first axis is the batch). The model says: "
    )
    assert "incompatible" in text


def test_a_shape_that_an_unbuilt_model_does_not_take_is_refused():
    model = keras.Sequential([keras.layers.Conv2D(2, 3), keras.layers.Flatten()])
    loop = small_loop(model=model)
    with pytest.raises(DataError, match="The model does not take these data"):
        loop.fit(*blobs(24), verbose=0)
    assert not model.weights
    assert loop.step == 0


def test_validation_data_are_checked_before_training(loop):
    x, y = blobs(24)
    text = refused(
        loop,
        DataError,
        lambda: loop.fit(x, y, validation_data=(numbers(24, 5), y), verbose=0),
    )
    assert "Received: x=float32[24, 5]" in text
    text = refused(
        loop, DataError, lambda: loop.fit(x, y, validation_data=(x, y[:3]), verbose=0)
    )
    assert "Received: shapes=[(24, 4), (3,)]" in text


@pytest.mark.parametrize(("wrong", "low", "high"), [(3, 0, 3), (-1, -1, 2)])
def test_integer_labels_outside_of_the_outputs_are_refused(loop, wrong, low, high):
    x, y = blobs(24)
    y = y.copy()
    y[5] = wrong
    text = refused(loop, DataError, lambda: loop.fit(x, y, verbose=0))
    assert text.startswith("Labels must lie in 0..2")
    assert text.endswith(
        f"Received: y from {low} to {high}. Give the last layer more units, or number "
        "the classes from 0."
    )
    refused(loop, DataError, lambda: loop.evaluate(x, y, verbose=0))


def test_labels_at_the_head_of_a_stream_are_looked_at_too(loop):
    x, y = blobs(16)
    batches = Batches([(x[:8], y[:8]), (x[8:], y[8:] + 3)])
    text = refused(loop, UsageError, lambda: loop.fit(batches, verbose=0))
    assert text.startswith("Labels must lie in 0..2")


def test_labels_that_the_loss_ignores_are_not_refused():
    x, y = blobs(24)
    y = y.copy()
    y[5] = -1
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    loop = small_loop(loss=loss, metrics=None)
    assert np.isfinite(loop.fit(x, y, verbose=0).history["loss"][0])


def test_labels_of_another_shape_than_the_outputs_are_refused(loop):
    x, _ = blobs(24)
    labels = np.zeros((24, 2, 2), "int32")
    text = refused(loop, UsageError, lambda: loop.fit(x, labels, verbose=0))
    assert "shape" in text


def test_no_data_are_refused(loop):
    text = refused(loop, DataError, lambda: loop.fit(verbose=0))
    assert text == "Expected data as `x`. Received: x=None"


@pytest.mark.parametrize(
    ("x", "received"),
    [(3, "x of type int"), (3.5, "x of type float"), (object(), "x of type object")],
)
def test_what_is_no_data_is_refused(loop, x, received):
    text = refused(loop, DataError, lambda: loop.fit(x, verbose=0))
    assert text == (
        "Data must be arrays, a dict or tuple of arrays, or an iterable of batches. "
        f"Received: {received}"
    )


def test_an_array_of_words_is_refused(loop):
    words = np.array([["a", "b", "c", "d"]])
    text = refused(loop, DataError, lambda: loop.fit(words, [1], verbose=0))
    assert text.startswith("Arrays must hold numbers or booleans")
    assert "Received: dtype=<U1" in text or "Received: x=string[1, 4]" in text


def test_an_array_without_examples_axis_is_refused(loop):
    text = refused(loop, DataError, lambda: loop.fit(np.array(3.0), verbose=0))
    assert text == (
        "Every array must have a first axis that counts the examples. "
        "Received: shapes=[()]"
    )


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_y_beside_a_stream_is_refused(loop, name):
    stream = Batches([blobs(8)])
    text = refused(
        loop, DataError, lambda: loop.fit(stream, verbose=0, **{name: blobs(8)[1]})
    )
    assert text == (
        f"`{name}` must not be given when `x` is an iterable of batches: each batch "
        "carries its own. Received: x of type Batches"
    )


def test_sample_weight_without_y_is_refused(loop):
    text = refused(
        loop,
        DataError,
        lambda: loop.fit(blobs(8)[0], sample_weight=np.ones(8), verbose=0),
    )
    assert text == "`sample_weight` needs `y`. Received: y=None"


def test_a_batch_of_a_stream_that_is_none_is_refused(loop):
    x, y = blobs(8)
    text = refused(loop, DataError, lambda: loop.fit(Batches([(None, y)]), verbose=0))
    assert text == (
        "A batch must be x, (x, y) or (x, y, sample_weight), without None in between. "
        "Received: tuple of 2: ['NoneType', 'ndarray']"
    )
    text = refused(loop, DataError, lambda: loop.fit(Batches([(x, y[:3])]), verbose=0))
    assert text == (
        "Every array of a batch must have the same first axis, which counts its "
        "examples. Received: shapes=[(8, 4), (3,)]"
    )


@pytest.mark.parametrize("share", [-0.5, 1.0, 1.5])
def test_a_validation_split_outside_of_0_to_1_is_refused(loop, share):
    x, y = blobs(24)
    text = refused(
        loop, DataError, lambda: loop.fit(x, y, validation_split=share, verbose=0)
    )
    assert text == (
        f"`validation_split` must lie between 0 and 1. Received: "
        f"validation_split={share}"
    )


def test_a_validation_split_that_leaves_nothing_is_refused(loop):
    x, y = blobs(2)
    text = refused(
        loop, DataError, lambda: loop.fit(x, y, validation_split=0.9, verbose=0)
    )
    assert text == "validation_split=0.9 of 2 examples leaves one side empty."


def test_a_validation_split_of_a_stream_is_refused(loop):
    text = refused(
        loop,
        DataError,
        lambda: loop.fit(Batches([blobs(8)]), validation_split=0.5, verbose=0),
    )
    assert text == (
        "`validation_split` works on arrays only. Give `validation_data` instead. "
        "Received: x of type Batches"
    )


def test_class_weight_beside_sample_weight_is_refused(loop):
    x, y = blobs(8)
    text = refused(
        loop,
        DataError,
        lambda: loop.fit(
            x, y, sample_weight=np.ones(8), class_weight={0: 1.0}, verbose=0
        ),
    )
    assert text.startswith("`class_weight` and `sample_weight` exclude each other.")


def test_an_unknown_gear_is_refused_and_a_compiled_model_keeps_its_parts():
    model = small_model()
    model.compile("sgd", "mse")
    optimizer = model.optimizer
    with pytest.raises(GearError, match="Received: gear='turbo'"):
        Loop(model, "adam", "mae", gear="turbo")
    assert model.optimizer is optimizer
    assert model.loss == "mse"


@pytest.mark.parametrize("model", [None, "model", 3, keras.Sequential])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(UsageError) as caught:
        Loop(model)
    assert str(caught.value) == (
        f"Expected a `keras.Model` (or layer) as `model`. Received: model={model!r} of "
        f"type {type(model).__name__}"
    )


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_a_model_without_a_loss_is_refused_with_what_to_do(gear):
    loop = Loop(small_model(), gear=gear)
    with pytest.raises(UsageError) as caught:
        loop.fit(*blobs(8), verbose=0)
    assert str(caught.value) == (
        "The built-in train step needs a loss and an optimizer. Give them: "
        "`Loop(model, optimizer=..., loss=...)`, compile the model, or write the step "
        "yourself with `@loop.train_step`. Received: model='sequential', which is not "
        "compiled"
    )
    with pytest.raises(UsageError, match=r"The built-in test step needs a loss\. Give"):
        loop.evaluate(*blobs(8), verbose=0)


def own_step(loop, returns):
    """Make `loop` train with a step that updates everything, then returns this."""
    model = loop.model
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            return loss_fn(y, model(x, training=True))

        loss, gradients = loopscope.value_and_grad(
            compute_loss, model.trainable_variables
        )
        model.optimizer.apply(gradients, model.trainable_variables)
        return returns(loss)

    return loop


RETURNS = {
    "nothing": (lambda loss: None, "'loss': 'None'"),
    "a vector": (lambda loss: keras.ops.stack([loss, loss]), "'loss': 'float32[2]'"),
    "a tuple": (lambda loss: (loss, loss), "'loss'"),
    "a word": (lambda loss: "done", "'loss': 'done'"),
    "a dict of a vector": (
        lambda loss: {"loss": loss, "both": keras.ops.stack([loss, loss])},
        "'both': 'float32[2]'",
    ),
    "a dict in a dict": (lambda loss: {"loss": {"part": loss}}, "'loss'"),
    "an empty dict": (lambda loss: {}, "{}"),
}


@pytest.mark.parametrize("what", RETURNS)
@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_a_step_that_returns_no_scalar_is_refused(gear, what):
    returns, received = RETURNS[what]
    if what == "a word" and gear != "eager":
        if keras.backend.backend() == "jax":
            pytest.skip("JAX refuses to trace it, by an error of its own")
        received = "'loss': 'string[]'"
    loop = own_step(built_loop(gear, steps=0), returns)
    text = refused(loop, StepError, lambda: loop.fit(*blobs(24), verbose=0))
    assert "train_step' must return a scalar (the loss) or a dict of scalars" in text
    assert "Received: " in text
    assert received in text
    assert text.endswith("Reduce it, for example with `keras.ops.mean`.")


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_a_loss_that_no_trainable_variable_reaches_is_refused(gear):
    loop = built_loop(gear, steps=0)
    model = loop.model
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            return loss_fn(y, keras.ops.stop_gradient(model(x, training=True)))

        loss, gradients = loopscope.value_and_grad(
            compute_loss, model.trainable_variables
        )
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    text = refused(loop, StepError, lambda: loop.fit(*blobs(24), verbose=0))
    assert text.startswith(
        "No trainable variable reaches the loss, so there is no gradient to apply."
    )
    assert "sequential/dense/kernel" in text


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_a_model_with_nothing_to_train_is_evaluated_with_keras_own_warning(gear):
    model = small_model()
    model.trainable = False
    loop = small_loop(gear, model=model)
    weights = [np.array(w) for w in model.get_weights()]
    with warned("does not have any trainable weights"):
        history = loop.fit(*blobs(24), verbose=0)
    assert np.isfinite(history.history["loss"][0])
    for was, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


# While training.

STEPS, FAILS_AT = 12, 7


class Broken(Exception):
    """An error of the user's own."""


def stopped_at(step, gear, *, prepare=None):
    """State and step of a run of the same training that ends there by itself."""
    loop = fresh(small_loop, gear)
    if prepare is not None:
        prepare(loop)
    x, y = blobs(STEPS * 4)
    for epoch in loop.epochs(1):
        for _ in epoch.train((x, y), batch_size=4, steps=step, every=None):
            pass
    return loop.state.sha256(), loop.step


def note(step, *, at=None, phase="train", epoch=0):
    return (
        f"loopscope: raised at {phase} step {step if at is None else at} of epoch "
        f"{epoch} (global step {step}); the variables are as the last finished step "
        "left them."
    )


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_an_error_in_a_source_leaves_the_steps_before_it(gear):
    x, y = blobs(STEPS * 4)

    def batches():
        for index in range(STEPS):
            if index == FAILS_AT:
                raise Broken("the disk is gone")
            yield x[index * 4 : index * 4 + 4], y[index * 4 : index * 4 + 4]

    loop = fresh(small_loop, gear)
    with pytest.raises(Broken, match="the disk is gone") as caught:
        loop.fit(batches(), verbose=0)
    assert caught.value.__notes__ == [note(FAILS_AT)]
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "batches" in frames
    assert loop.step == FAILS_AT

    whole = fresh(small_loop, gear)
    whole.fit(
        Batches((x[i * 4 : i * 4 + 4], y[i * 4 : i * 4 + 4]) for i in range(FAILS_AT)),
        verbose=0,
    )
    assert loop.state.sha256() == whole.state.sha256()


def test_a_python_error_in_an_eager_step_leaves_the_steps_before_it():
    calls = []

    def failing(loop):
        model = loop.model

        @loop.train_step
        def train_step(x, y):
            calls.append(1)
            if len(calls) == FAILS_AT + 1:
                model.layers[0].bias.assign(model.layers[0].bias + 1.0)
                raise Broken("in the middle of a step")
            return Loop.train_step(loop, x, y)

    loop = fresh(small_loop, "eager")
    failing(loop)
    x, y = blobs(STEPS * 4)
    with pytest.raises(Broken, match="in the middle of a step") as caught:
        loop.fit(x, y, batch_size=4, verbose=0)
    assert caught.value.__notes__ == [note(FAILS_AT)]
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "train_step"
    assert loop.step == FAILS_AT
    calls.clear()
    state, step = stopped_at(FAILS_AT, "eager", prepare=failing)
    assert (loop.state.sha256(), loop.step) == (state, step)


@pytest.mark.skipif(not TENSORFLOW, reason="JAX has no operation that raises")
@pytest.mark.parametrize("gear", ["eager", "graph", "fused-graph"])
def test_an_operation_that_raises_leaves_the_steps_before_it(gear):
    import tensorflow as tf

    loop = fresh(small_loop, gear)
    x, y = blobs(STEPS * 4)
    x = x.copy()
    x[FAILS_AT * 4] = np.nan

    def checking(loop):
        @loop.train_step
        def train_step(x, y):
            # The state is spoilt before the check, so that it has to be mended.
            # On some CPUs a fused ReLU hides the NaN of x from the loss: add x.
            loss = Loop.train_step(loop, x, y) + tf.reduce_sum(x)
            return tf.debugging.check_numerics(loss, "the loss is not finite")

    checking(loop)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not finite") as caught:
        loop.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert caught.value.__notes__ == [note(FAILS_AT)]
    assert loop.step == FAILS_AT

    other = fresh(small_loop, gear)
    checking(other)
    other.fit(
        x[: FAILS_AT * 4], y[: FAILS_AT * 4], batch_size=4, shuffle=False, verbose=0
    )
    assert loop.state.sha256() == other.state.sha256()


@pytest.mark.skipif(not TENSORFLOW, reason="JAX has no operation that raises")
def test_a_label_out_of_range_far_into_a_stream_raises_at_its_step(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(stream, "CHUNK_STEPS", 2)
    loop = fresh(small_loop, "fused-graph", metrics=None)
    x, y = blobs(STEPS * 4)
    y = y.copy()
    y[FAILS_AT * 4] = 3
    batches = Batches((x[i : i + 4], y[i : i + 4]) for i in range(0, STEPS * 4, 4))
    with pytest.raises(tf.errors.InvalidArgumentError, match="label value") as caught:
        loop.fit(batches, verbose=0)
    assert caught.value.__notes__ == [note(FAILS_AT)]
    assert (loop.step, int(loop.model.optimizer.iterations)) == (FAILS_AT, FAILS_AT)


def test_training_goes_on_after_an_error():
    loop = fresh(small_loop, "eager")
    x, y = blobs(16)
    model, calls = loop.model, []

    @loop.train_step
    def train_step(x, y):
        calls.append(1)
        if len(calls) == 3:
            raise Broken("once")
        return Loop.train_step(loop, x, y)

    with pytest.raises(Broken):
        loop.fit(x, y, batch_size=4, verbose=0)
    assert loop.step == 2
    history = loop.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert loop.step == 10
    assert len(history.history["loss"]) == 2
    assert int(model.optimizer.iterations) == 10


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_an_error_in_a_batch_hook_leaves_the_step_it_was_told_of(gear):
    def fail(batch, logs):
        if batch == FAILS_AT:
            raise Broken("in a callback")

    loop = fresh(small_loop, gear)
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    x, y = blobs(STEPS * 4)
    with pytest.raises(Broken, match="in a callback") as caught:
        loop.fit(x, y, batch_size=4, callbacks=[callback], verbose=0)
    assert caught.value.__notes__ == [note(FAILS_AT + 1)]
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "fail"
    assert (loop.state.sha256(), loop.step) == stopped_at(FAILS_AT + 1, gear)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_epoch_end"])
def test_an_error_in_an_epoch_hook_comes_out_as_it_is(hook):
    def fail(*args):
        raise Broken(hook)

    loop = built_loop()
    x, y = blobs(24)
    callback = keras.callbacks.LambdaCallback(**{hook: fail})
    with pytest.raises(Broken, match=hook):
        loop.fit(x, y, batch_size=8, callbacks=[callback], verbose=0)
    assert loop.step == (6 if hook == "on_epoch_end" else 3)
    assert int(loop.model.optimizer.iterations) == loop.step
    loop.fit(x, y, batch_size=8, verbose=0)


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end"])
def test_an_error_in_an_epoch_hook_names_the_step(hook):
    def fail(*args):
        raise Broken(hook)

    loop = built_loop()
    callback = keras.callbacks.LambdaCallback(**{hook: fail})
    with pytest.raises(Broken) as caught:
        loop.fit(*blobs(24), batch_size=8, callbacks=[callback], verbose=0)
    assert f"global step {loop.step}" in "".join(caught.value.__notes__)


def test_an_error_in_the_body_of_an_open_loop_leaves_the_step_reported_last():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(STEPS * 4)

    def train():
        for epoch in loop.epochs(2):
            for step in epoch.train((x, y), batch_size=4, every=FAILS_AT):
                if step.index == FAILS_AT:
                    raise Broken("in the body")

    with pytest.raises(Broken, match="in the body"):
        train()
    assert (loop.state.sha256(), loop.step) == stopped_at(FAILS_AT + 1, FUSED)


def test_an_error_while_validating_names_the_test_step():
    def fail(batch, logs):
        if batch == 1:
            raise Broken("while validating")

    loop = built_loop()
    x, y = blobs(24)
    callback = keras.callbacks.LambdaCallback()
    callback.on_test_batch_end = fail
    with pytest.raises(Broken) as caught:
        loop.fit(
            x, y, batch_size=8, validation_data=(x, y), callbacks=[callback], verbose=0
        )
    assert caught.value.__notes__ == [note(6, at=2, phase="test")]
    assert loop.step == 6


# Ctrl-C.


@pytest.mark.parametrize("gear", [STEP, FUSED])
def test_ctrl_c_from_a_callback_leaves_the_last_finished_step(gear):
    def press(batch, logs):
        if batch == FAILS_AT:
            os.kill(os.getpid(), signal.SIGINT)

    loop = fresh(small_loop, gear)
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=press)
    x, y = blobs(STEPS * 4)
    with pytest.raises(KeyboardInterrupt) as caught:
        loop.fit(x, y, batch_size=4, callbacks=[callback], verbose=0)
    assert caught.value.__notes__ == [note(FAILS_AT + 1)]
    assert (loop.state.sha256(), loop.step) == stopped_at(FAILS_AT + 1, gear)


@pytest.mark.parametrize("gear", GEARS)
def test_ctrl_c_at_any_moment_falls_between_two_steps(gear):
    loop = fresh(small_loop, gear)
    x, y = blobs(STEPS * 4)
    # As many epochs as it takes: the signal comes from a thread, at no step of its own.
    begun, epochs = threading.Event(), 1_000_000

    def press():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    def started(event):
        if isinstance(event, ChunkEnd) and event.step >= 30:
            begun.set()

    thread = threading.Thread(target=press)
    thread.start()
    loop.subscribe(started)
    with pytest.raises(KeyboardInterrupt) as caught:
        loop.fit(x, y, batch_size=4, epochs=epochs, verbose=0)
    thread.join()
    done = loop.step
    assert done >= 30
    assert int(loop.model.optimizer.iterations) == done
    assert f"(global step {done})" in "".join(caught.value.__notes__)

    again = fresh(small_loop, gear)
    for epoch in again.epochs(epochs):
        left = done - again.step
        if left:
            for _ in epoch.train((x, y), batch_size=4, steps=left, every=None):
                pass
        if again.step == done:
            again.stop()
    weights = zip(loop.model.get_weights(), again.model.get_weights(), strict=True)
    assert all(np.array_equal(was, now) for was, now in weights)


def test_ctrl_c_inside_of_a_step_waits_for_its_end():
    loop = fresh(small_loop, "eager")
    x, y = blobs(STEPS * 4)
    calls = []

    @loop.train_step
    def train_step(x, y):
        calls.append(1)
        if len(calls) == FAILS_AT:
            os.kill(os.getpid(), signal.SIGINT)
        return Loop.train_step(loop, x, y)

    with pytest.raises(KeyboardInterrupt) as caught:
        loop.fit(x, y, batch_size=4, verbose=0)
    assert len(calls) == FAILS_AT
    assert loop.step == int(loop.model.optimizer.iterations) == FAILS_AT
    assert caught.value.__notes__ == [note(FAILS_AT)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
