"""A step that is looked into is the step that runs, and looking changes nothing."""

import threading

import keras
import numpy as np
import pytest
from keras import layers
from looking import by_path, looked_into, repeated

import loopscope
from loopscope import Loop
from loopscope.errors import UsageError
from loopscope.events import ChunkBegin
from models import (
    ALL,
    BATCH,
    BRIEF,
    FUSED,
    STEP,
    TENSORFLOW,
    TORCH,
    blobs,
    classes,
    fresh,
    mixed_loop,
    numbers,
    relative,
    small_loop,
    thinned,
)

ROUNDING = 2e-6
"""Of losses and updates, relative to their largest number, between two gears."""


@pytest.mark.parametrize("build", thinned(ALL, 6, ids=lambda build: build.__name__))
def test_what_is_seen_is_what_the_step_does(build):
    make, data = build()
    loop = fresh(make, FUSED)
    x, y = repeated(data, 3)
    looks = looked_into(loop, x, y, batch_size=BATCH, steps={2})
    step, after = looks.opened[2], looks.after[2]
    assert set(step.outputs) == set(looks.outputs[2])
    for name, value in looks.outputs[2].items():
        assert step.outputs[name] == pytest.approx(value, rel=ROUNDING)
    assert step.updates
    trained = {u.path for u in step.updates}
    kinds = {**step.optimizer, **step.metrics, **step.seeds, **step.others}
    assert trained.isdisjoint(kinds)
    for path, change in kinds.items():
        if "gradient_" not in path:
            assert relative(after[path], change.after) <= 20 * ROUNDING, path
    for update in step.updates:
        assert update.norm > 0
        assert update.ratio == pytest.approx(update.norm / update.weight_norm)


@pytest.mark.parametrize("gear", BRIEF)
def test_random_numbers_are_those_of_the_gear(gear):
    loop = fresh(mixed_loop, gear)
    x, y = blobs(24)
    looks = looked_into(loop, x, y, batch_size=8)
    for number, step in looks.opened.items():
        assert step.gear == gear
        assert step.loss == pytest.approx(looks.outputs[number]["loss"], rel=ROUNDING)
        dropped = by_path(step.layers)[f"{loop.model.name}/dropout"]
        assert 0 < dropped.stats.zeros < 1
        (seed,) = step.seeds.values()
        # Without a seed, PyTorch's Dropout draws from PyTorch's own generator.
        assert (seed.before != seed.after).any() or TORCH


@pytest.mark.parametrize("gear", [FUSED, STEP, "eager"])
def test_a_training_that_is_looked_into_ends_in_the_same_bits(gear):
    ends = []
    for steps in ((), None):
        loop = fresh(mixed_loop, gear)
        looked_into(loop, *blobs(40), batch_size=8, epochs=2, steps=steps)
        ends.append(loop.state.sha256())
    assert ends[0] == ends[1]


def test_a_callback_looks_into_the_step_that_comes_next():
    seen = []

    class Looking(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                seen.append(loop.look())

    loop = fresh(small_loop, FUSED)
    x, y = blobs(24)
    loop.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[Looking()])
    (step,) = seen
    assert step.step == 1
    np.testing.assert_array_equal(step.batch["x"], x[8:16])
    np.testing.assert_array_equal(step.batch["y"], y[8:16])
    np.testing.assert_array_equal(step.examples, np.arange(8, 16))


def test_the_examples_of_shuffled_data_are_named_by_their_rows():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(30)
    seen = []
    loop.subscribe(
        lambda event: (
            seen.append(loop.look()) if isinstance(event, ChunkBegin) else None
        ),
        chunk_steps={"train": 1},
    )
    loop.fit(x, y, batch_size=8, epochs=2, verbose=0)
    for step in seen:
        np.testing.assert_array_equal(step.batch["x"], x[step.examples])
    assert sorted(np.concatenate([s.examples for s in seen[:4]])) == list(range(30))
    assert [len(s.examples) for s in seen] == [8, 8, 8, 6] * 2


def test_a_batch_is_looked_into_without_training():
    loop = fresh(small_loop, "auto")
    x, y = blobs(10)
    step = loop.look(x, y)
    assert loop.gear is None
    assert step.step == loop.step == 0
    assert step.batch["x"].shape == (10, 4)
    before = loop.state.sha256()
    assert loop.look(x, y).loss == step.loss
    assert loop.state.sha256() == before
    weights = np.zeros(10, "float32")
    weights[3] = 2.0
    weighted = loop.look(x, y, weights)
    assert weighted.loss_per_example.nonzero()[0].tolist() == [3]
    assert weighted.worst[0] == 3


def test_the_first_batch_of_a_stream_is_looked_into():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(16)
    step = loop.look([(x[:8], y[:8]), (x[8:], y[8:])])
    np.testing.assert_array_equal(step.batch["x"], x[:8])
    assert step.examples is None


def test_there_is_nothing_to_look_into_between_steps():
    loop = fresh(small_loop, FUSED)
    with pytest.raises(UsageError, match="no step to look into"):
        loop.look()


def test_an_error_of_the_step_leaves_the_state_and_keras_as_they_were():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(8)
    loop.look(x, y)
    before, call = loop.state.sha256(), keras.layers.Layer.__call__

    @loop.train_step
    def train_step(x, y):
        loop.model.trainable_variables[0].assign_add(np.ones((4, 8), "float32"))
        raise ZeroDivisionError

    loop.gear = "eager"
    with pytest.raises(ZeroDivisionError):
        loop.look(x, y)
    assert loop.state.sha256() == before
    assert keras.layers.Layer.__call__ is call


def test_an_eager_step_that_builds_its_optimizer_leaves_it_new():
    loop = fresh(small_loop, "eager")
    model, optimizer = loop.model, keras.optimizers.SGD(0.1, momentum=0.9)

    @loop.train_step
    def train_step(x, y):
        assert float(y[0]) >= 0  # Nothing that could be traced.

        def loss():
            return keras.ops.mean(keras.ops.square(model(x, training=True)))

        value, grads = loopscope.value_and_grad(loss, model.trainable_variables)
        optimizer.apply(grads, model.trainable_variables)
        return value

    weights = model.get_weights()
    step = loop.look(*blobs(8))
    assert len(step.updates) == 4
    assert int(optimizer.iterations) == 0
    for was, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    for variable in optimizer.variables[2:]:
        assert not np.any(variable.numpy())


@pytest.mark.skipif(not TENSORFLOW, reason="a GradientTape step")
def test_the_step_of_the_tutorial_is_looked_into():
    import tensorflow as tf

    loop = fresh(small_loop, FUSED)
    model, optimizer = loop.model, keras.optimizers.SGD(0.1)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metric = keras.metrics.SparseCategoricalAccuracy()

    @loop.train_step
    def train_step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss_value = loss_fn(y, logits)
        grads = tape.gradient(loss_value, model.trainable_weights)
        optimizer.apply_gradients(zip(grads, model.trainable_weights, strict=True))
        metric.update_state(y, logits)
        return loss_value

    looks = looked_into(loop, *blobs(24), batch_size=8)
    for number, step in looks.opened.items():
        assert step.loss == pytest.approx(looks.outputs[number]["loss"], rel=ROUNDING)
        assert [g.path for g in step.gradients] == [
            v.path for v in model.trainable_variables
        ]
        assert all(o.gradient is not None for o in step.layers)
        moved = [p for p, c in step.metrics.items() if c.before != c.after]
        assert moved == [v.path for v in metric.variables]
        assert not step.missing


def test_what_other_threads_call_meanwhile_is_not_the_step():
    loop = fresh(small_loop, "eager")
    model = loop.model
    elsewhere = layers.Dense(3, name="elsewhere")

    @loop.train_step
    def train_step(x, y):
        assert float(y[0]) >= 0  # Nothing that could be traced.
        thread = threading.Thread(target=elsewhere, args=(x,))
        thread.start()
        thread.join()

        def loss():
            return keras.ops.mean(keras.ops.square(model(x, training=True)))

        value, grads = loopscope.value_and_grad(loss, model.trainable_variables)
        model.optimizer.apply(grads, model.trainable_variables)
        return value

    step = loop.look(*blobs(8))
    assert elsewhere.built
    assert len(step.layers) == 3
    assert not any("elsewhere" in o.path for o in step.layers)


def test_nested_and_shared_layers_are_told_by_where_they_are_called():
    shared = layers.Dense(4, name="shared")
    inner = keras.Sequential(
        [keras.Input((4,)), shared, layers.Dense(4, name="own")], name="inner"
    )
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(3, name="last")(inner(shared(shared(x)))))
    model.name = "outer"
    step = fresh(lambda gear: small_loop(gear, model=model), FUSED).look(*blobs(8))
    assert [(o.path, o.call) for o in step.layers] == [
        ("outer/shared", 0),
        ("outer/shared", 1),
        ("outer/inner/shared", 0),
        ("outer/inner/own", 0),
        ("outer/inner", 0),
        ("outer/last", 0),
        ("outer", 0),
    ]


def test_a_layer_that_is_called_for_every_time_step_is_not_kept_for_each():
    class Unrolled(layers.Layer):
        def __init__(self):
            super().__init__(name="unrolled")
            self.cell = layers.Dense(4, name="cell")

        def call(self, x):
            for _ in range(50):
                x = self.cell(x)
            return x

    model = keras.Sequential([keras.Input((4,)), Unrolled(), layers.Dense(3)])
    step = fresh(lambda gear: small_loop(gear, model=model), FUSED).look(*blobs(8))
    cells = [o for o in step.layers if o.path.endswith("/cell")]
    assert [o.call for o in cells] == list(range(8))


def test_a_model_with_several_outputs_shows_each_loss_with_its_weight():
    x = keras.Input((4,))
    outputs = [layers.Dense(1, name=n)(x) for n in ("first", "second")]
    model = keras.Model(x, outputs)
    loop = Loop(
        model, "sgd", ["mse", "mae"], loss_weights=[1.0, 0.25], gear=FUSED, seed=0
    )
    data = numbers(8, 4)
    y = [numbers(8, 1, seed=5), numbers(8, 1, seed=6)]
    step = loop.look(data, y)
    first, second = model.predict(data, verbose=0)
    mse = ((first - y[0]) ** 2)[:, 0]
    mae = np.abs(second - y[1])[:, 0]
    assert step.losses == pytest.approx(
        {"first": mse.mean(), "second": 0.25 * mae.mean()}, rel=1e-5
    )
    np.testing.assert_allclose(step.loss_per_example, mse + 0.25 * mae, rtol=1e-5)
    assert len(step.predictions) == len(step.labels) == 2


def test_what_layers_add_to_the_loss_is_a_part_of_its_own():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1)),
        ]
    )
    step = fresh(lambda gear: small_loop(gear, model=model), FUSED).look(*blobs(8))
    kernel = model.trainable_variables[0].numpy()
    assert step.losses["regularization"] == pytest.approx(0.1 * (kernel**2).sum(), 1e-5)
    assert sum(step.losses.values()) == pytest.approx(step.loss, rel=1e-6)
    assert not any("weights of the losses" in m for m in step.missing)


def test_a_loss_that_no_object_computed_is_said_to_be_missing_by_example():
    loop = fresh(small_loop, FUSED)
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        def loss():
            return keras.ops.mean(keras.ops.square(model(x, training=True)))

        value, grads = loopscope.value_and_grad(loss, model.trainable_variables)
        model.optimizer.apply(grads, model.trainable_variables)
        return value

    step = loop.look(*blobs(8))
    assert step.loss_per_example is step.worst is None
    assert any("loss per example" in m for m in step.missing)
    assert step.gradients


def test_loss_scaling_is_looked_through():
    def make(gear):
        keras.config.set_dtype_policy("mixed_float16")
        return small_loop(gear)

    loop = fresh(make, FUSED)
    looks = looked_into(loop, *blobs(16), batch_size=8)
    step = looks.opened[1]
    assert step.loss == pytest.approx(looks.outputs[1]["loss"], rel=1e-3)
    if TENSORFLOW:
        norms = [g.stats.norm for g in step.gradients]
        assert max(norms) < 100  # Not those of the scaled loss.
    assert [o.dtype for o in step.layers] == ["float16"] * 3


def test_integers_and_masks_are_part_of_what_is_seen():
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, mask_zero=True),
            layers.LSTM(3),
            layers.Dense(3),
        ]
    )
    x = classes(8 * 5, 7).reshape(8, 5)
    step = fresh(lambda gear: small_loop(gear, model=model), FUSED).look(
        x, classes(8, 3)
    )
    assert step.batch["x"].dtype == np.int32
    embedding = step.gradients[0]
    assert embedding.values.shape == (7, 4)
    assert step.loss_per_example.mean() == pytest.approx(step.loss, rel=1e-6)
