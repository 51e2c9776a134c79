"""The open loop: the user writes the `for`, or the step, or both."""

import keras
import numpy as np
import pytest

import loopscope
from loopscope import Loop
from loopscope.errors import StepError
from loopscope.events import (
    ChunkEnd,
    EpochBegin,
    EpochEnd,
    PhaseBegin,
    PhaseEnd,
    TrainBegin,
    TrainEnd,
)
from models import (
    BATCH,
    FUSED,
    GEARS,
    STEP,
    TENSORFLOW,
    blobs,
    fresh,
    gan,
    relative,
    small_loop,
    small_model,
)

ROWS = 80


@pytest.fixture(scope="module")
def data():
    return blobs(ROWS)


class Resets:
    """A metric that counts how often it was reset while training."""

    def __init__(self, loop):
        self.count = 0
        self.metric = loop.model.metrics[0]
        reset = self.metric.reset_state

        def counted():
            self.count += 1
            reset()

        self.metric.reset_state = counted


# The outer loop.


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, list(range(10))),
        (3, [0, 3, 6, 9]),
        (4, [0, 4, 8]),
        (200, [0]),
        (None, []),
    ],
)
def test_the_body_runs_after_every_so_many_steps(data, every, expected):
    loop = small_loop()
    for epoch in loop.epochs(2):
        seen = list(epoch.train(data, every=every, batch_size=8))
        assert [step.index for step in seen] == expected
        assert [step.samples for step in seen] == [8 * (i + 1) for i in expected]
        assert [step.number for step in seen] == [
            i + 10 * epoch.index for i in expected
        ]
    assert loop.step == 20


def test_what_lies_between_two_reports_runs_as_one_chunk(data):
    loop = small_loop()
    chunks = []
    loop.subscribe(lambda e: chunks.append(e) if isinstance(e, ChunkEnd) else None)
    for epoch in loop.epochs(2):
        for _ in epoch.train(data, every=4, batch_size=8):
            pass
    # The last epoch: nothing is left to be compiled or measured.
    assert [c.steps for c in chunks if c.step >= 10] == [1, 4, 4, 1]


def test_a_report_holds_the_loss_of_its_own_batch(data):
    x, y = data
    loop = small_loop(optimizer=keras.optimizers.SGD(0.0))
    for epoch in loop.epochs(1):
        for step in epoch.train(data, every=3, batch_size=8, shuffle=False):
            rows = slice(8 * step.index, 8 * step.index + 8)
            expected = loop.model.evaluate(x[rows], y[rows], verbose=0)[0]
            assert isinstance(step.loss, float)
            assert step.loss == pytest.approx(expected, rel=1e-5)
            assert step.outputs == {"loss": step.loss}


def test_the_variables_are_those_of_the_step_that_was_reported(data):
    ended = {}
    for length in (4, 7):
        other = fresh(small_loop, FUSED)
        for epoch in other.epochs(1):
            list(epoch.train(data, every=None, steps=length, batch_size=8))
        ended[length] = other.state.sha256()
    loop = fresh(small_loop, FUSED)
    for epoch in loop.epochs(1):
        for step in epoch.train(data, every=3, batch_size=8):
            if step.index + 1 in ended:
                assert loop.state.sha256() == ended[step.index + 1]


def test_steps_ends_an_epoch_early(data):
    loop = small_loop()
    for epoch in loop.epochs(1):
        assert [s.index for s in epoch.train(data, steps=5, batch_size=8)] == [
            0,
            1,
            2,
            3,
            4,
        ]
    assert loop.step == int(loop.model.optimizer.iterations) == 5


def test_a_source_can_be_made_once_and_used_in_each_epoch(data):
    loop = fresh(small_loop, FUSED)
    source = loop.source(*data, batch_size=8)
    for epoch in loop.epochs(2):
        for _ in epoch.train(source, every=None):
            pass
    other = fresh(small_loop, FUSED)
    other.fit(*data, batch_size=8, epochs=2, verbose=0)
    assert loop.state.sha256() == other.state.sha256()


def test_epochs_are_numbered_from_the_initial_one():
    loop = small_loop()
    assert [epoch.index for epoch in loop.epochs(5, initial_epoch=3)] == [3, 4]
    assert [epoch.epochs for epoch in loop.epochs(2)] == [2, 2]


@pytest.mark.parametrize(("name", "value"), [("epochs", -1), ("initial_epoch", 1.5)])
def test_a_wrong_number_of_epochs_is_refused_at_the_call(name, value):
    words = {"epochs": 1, name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number") as caught:
        small_loop().epochs(**words)
    assert str(caught.value).endswith(f"Received: {name}={value}")


def test_metrics_of_an_epoch_are_over_its_own_steps(data):
    loop = small_loop(optimizer=keras.optimizers.SGD(0.0))
    expected = loop.model.evaluate(*data, batch_size=8, verbose=0, return_dict=True)
    for epoch in loop.epochs(3):
        for _ in epoch.train(data, every=None, batch_size=8):
            pass
        assert epoch.metrics == pytest.approx(expected, rel=1e-5)


def test_metrics_can_be_read_in_the_body(data):
    loop = small_loop()
    for epoch in loop.epochs(1):
        losses = []
        for step in epoch.train(data, batch_size=8):
            losses.append(step.loss)
            assert epoch.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_metrics_are_reset_once_an_epoch_and_kept_after_the_last(data):
    loop = small_loop()
    loop.fit(*data, batch_size=8, verbose=0)
    resets = Resets(loop)
    for epoch in loop.epochs(3):
        list(epoch.train(data, every=2, batch_size=8))
        assert resets.count == epoch.index + 1
    assert float(resets.metric.result()) == pytest.approx(epoch.metrics["loss"])


def test_metrics_are_reset_once_an_epoch_after_a_break(data):
    loop = small_loop(optimizer=keras.optimizers.SGD(0.0))
    loop.fit(*data, batch_size=8, verbose=0)
    resets = Resets(loop)
    for epoch in loop.epochs(3):
        for step in epoch.train(data, batch_size=8, shuffle=False):
            if step.index == epoch.index:
                break
        assert resets.count == epoch.index + 1
        assert float(loop.model.metrics[0].count) == 8 * (epoch.index + 1)
    assert loop.step == 10 + 1 + 2 + 3


def test_metrics_are_reset_once_an_epoch_after_an_exception(data):
    loop = small_loop()
    loop.fit(*data, batch_size=8, verbose=0)
    resets = Resets(loop)

    def train():
        for epoch in loop.epochs(1):
            for step in epoch.train(data, batch_size=8):
                if step.index == 1:
                    raise ZeroDivisionError

    for attempt in range(3):
        with pytest.raises(ZeroDivisionError):
            train()
        assert resets.count == attempt + 1
        assert float(resets.metric.count) == 16


def test_metrics_are_reset_once_an_epoch_after_a_return(data):
    loop = small_loop()
    loop.fit(*data, batch_size=8, verbose=0)
    resets = Resets(loop)

    def train():
        for epoch in loop.epochs(5):
            for step in epoch.train(data, batch_size=8):
                if step.index == 2:
                    return epoch

    assert train().index == 0
    assert train().index == 0
    assert resets.count == 2


def test_training_twice_in_an_epoch_adds_up(data):
    loop = small_loop()
    for epoch in loop.epochs(1):
        list(epoch.train(data, batch_size=8, steps=2))
        list(epoch.train(data, batch_size=8, steps=3))
        assert float(loop.model.metrics[0].count) == 40
    assert loop.step == 5


def test_validating_in_the_middle_leaves_the_training_metrics(data):
    x, y = data
    with_validation, without = [], []
    for into in (with_validation, without):
        loop = fresh(small_loop, FUSED)
        for epoch in loop.epochs(2):
            for step in epoch.train(data, every=4, batch_size=8):
                if into is with_validation and step.index == 4:
                    found = epoch.validate((x[:16], y[:16]))
                    assert found == pytest.approx(
                        loop.evaluate(x[:16], y[:16], verbose=0, return_dict=True)
                    )
            names = [n for n in epoch.metrics if not n.startswith("val_")]
            into.append({name: epoch.metrics[name] for name in names})
        into.append(loop.state.sha256())
    assert with_validation == without


def test_epoch_metrics_hold_the_last_validation_under_val(data):
    loop = small_loop()
    for epoch in loop.epochs(2):
        list(epoch.train(data, every=None, batch_size=8))
        assert set(epoch.metrics) == {"loss", "accuracy"}
        found = epoch.validate(data)
        assert set(epoch.metrics) == {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert epoch.metrics["val_loss"] == found["loss"]


def test_seconds_stand_still_when_an_epoch_is_over(data):
    loop = small_loop()
    kept = []
    for epoch in loop.epochs(2):
        list(epoch.train(data, batch_size=8))
        kept.append(epoch)
    assert all(epoch.seconds > 0 for epoch in kept)
    assert kept[0].seconds == kept[0].seconds


def test_stop_ends_training_after_the_chunk_that_runs(data):
    loop = small_loop()
    epochs = 0
    for epoch in loop.epochs(5):
        epochs += 1
        for step in epoch.train(data, every=3, batch_size=8):
            if step.index == 3:
                loop.stop()
    assert epochs == 1
    assert loop.step == 4
    loop.fit(*data, batch_size=8, verbose=0)
    assert loop.step == 14


def test_events_come_in_the_order_of_what_happens(data):
    loop = small_loop()
    seen = []
    loop.subscribe(seen.append)
    for epoch in loop.epochs(1):
        list(epoch.train(data, every=None, batch_size=8))
        epoch.validate(data)
    kinds = [type(event) for event in seen]
    order = [k for k in kinds if k in (PhaseBegin, PhaseEnd)]
    assert order == [PhaseBegin, PhaseEnd] * 2
    assert kinds[:2] == [TrainBegin, EpochBegin]
    assert kinds[-2:] == [EpochEnd, TrainEnd]
    assert [e.phase for e in seen if isinstance(e, PhaseEnd)] == ["train", "test"]
    logs = next(e.logs for e in seen if isinstance(e, EpochEnd))
    assert set(logs) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    chunks = [e for e in seen if isinstance(e, ChunkEnd) and e.phase == "train"]
    assert sum(chunk.steps for chunk in chunks) == 10
    assert chunks[-1].samples == ROWS


def test_an_unsubscribed_listener_hears_nothing(data):
    loop, seen = small_loop(), []
    loop.subscribe(seen.append)
    loop.unsubscribe(seen.append)
    loop.fit(*data, verbose=0)
    assert seen == []


# Steps of one's own.


def portable(loop, metric):
    model = loop.model
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            logits = model(x, training=True)
            return loss_fn(y, logits), logits

        (loss_value, logits), grads = loopscope.value_and_grad(
            compute_loss, model.trainable_variables, has_aux=True
        )
        model.optimizer.apply(grads, model.trainable_variables)
        metric.update_state(y, logits)
        return loss_value


def built_in_result(data, gear=FUSED):
    loop = fresh(small_loop, gear)
    history = loop.fit(*data, batch_size=8, epochs=2, verbose=0).history
    return history, loop.model.get_weights()


def assert_same_weights(weights, others):
    for was, now in zip(weights, others, strict=True):
        assert relative(was, now) < 1e-5


@pytest.mark.parametrize("gear", GEARS)
def test_the_portable_step_trains_as_the_built_in_one(gear, data):
    loop = fresh(small_loop, gear)
    portable(loop, keras.metrics.SparseCategoricalAccuracy(name="own"))
    history = loop.fit(*data, batch_size=8, epochs=2, verbose=0).history
    expected, weights = built_in_result(data)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(history["own"], expected["accuracy"], rtol=1e-5)
    assert_same_weights(weights, loop.model.get_weights())


def tutorial_loop(gear, decorate):
    """The tutorial's own lines, on TensorFlow: nothing in them knows of loopscope."""
    import tensorflow as tf

    model = small_model()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    train_acc_metric = keras.metrics.SparseCategoricalAccuracy()
    val_acc_metric = keras.metrics.SparseCategoricalAccuracy()
    loop = Loop(model, gear=gear, seed=0)

    @loop.train_step
    @decorate
    def train_step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss_value = loss_fn(y, logits)
        grads = tape.gradient(loss_value, model.trainable_weights)
        optimizer.apply_gradients(zip(grads, model.trainable_weights, strict=True))
        train_acc_metric.update_state(y, logits)
        return loss_value

    @loop.test_step
    @decorate
    def test_step(x, y):
        val_logits = model(x, training=False)
        val_acc_metric.update_state(y, val_logits)

    return loop, train_acc_metric, val_acc_metric


@pytest.mark.skipif(not TENSORFLOW, reason="tf.GradientTape is TensorFlow's")
@pytest.mark.parametrize(
    ("gear", "compiled"),
    [*((gear, False) for gear in GEARS), ("eager", True), (FUSED, True)],
)
def test_the_step_of_the_tutorial_runs_unchanged_in_every_gear(gear, compiled, data):
    import tensorflow as tf

    def make(gear):
        return tutorial_loop(gear, tf.function if compiled else lambda f: f)

    loop, train_acc_metric, _ = fresh(make, gear)
    losses = []
    for epoch in loop.epochs(2):
        for step in epoch.train(data, every=1, batch_size=8):
            losses.append(step.loss)
        accuracy = float(train_acc_metric.result())
        assert epoch.metrics["sparse_categorical_accuracy"] == pytest.approx(accuracy)
    expected, weights = built_in_result(data)
    assert np.mean(losses[10:]) == pytest.approx(expected["loss"][1], rel=1e-5)
    assert accuracy == pytest.approx(expected["accuracy"][1])
    assert_same_weights(weights, loop.model.get_weights())
    assert float(train_acc_metric.count) == ROWS


@pytest.mark.skipif(not TENSORFLOW, reason="tf.GradientTape is TensorFlow's")
def test_the_tutorial_validates_with_its_own_step_and_metric(data):
    loop, _, val_acc_metric = tutorial_loop(FUSED, lambda f: f)
    for epoch in loop.epochs(2):
        list(epoch.train(data, every=None, batch_size=8))
        found = epoch.validate(data)
        right = np.argmax(loop.model.predict(data[0], verbose=0), -1) == data[1]
        assert found["sparse_categorical_accuracy"] == pytest.approx(right.mean())
        assert "val_sparse_categorical_accuracy" in epoch.metrics
    assert val_acc_metric.variables


@pytest.mark.skipif(not TENSORFLOW, reason="tf.GradientTape is TensorFlow's")
@pytest.mark.parametrize("gear", ["eager", "graph"])
def test_a_gradient_tape_that_no_variable_reaches_is_refused(gear, data):
    import tensorflow as tf

    loop = small_loop(gear)
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss_value = tf.reduce_mean(tf.stop_gradient(model(x, training=True)))
        grads = tape.gradient(loss_value, model.trainable_weights)
        model.optimizer.apply_gradients(
            zip(grads, model.trainable_weights, strict=True)
        )
        return loss_value

    weights = model.get_weights()
    with pytest.raises(StepError, match="No trainable variable reaches the loss"):
        loop.fit(*data, verbose=0)
    for was, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_an_own_test_step_has_its_own_metrics(data):
    loop = small_loop(metrics=None)
    model = loop.model
    wrong = keras.metrics.Mean(name="wrong")

    @loop.test_step
    def test_step(x, y):
        logits = model(x, training=False)
        guess = keras.ops.cast(keras.ops.argmax(logits, -1), y.dtype)
        wrong.update_state(keras.ops.not_equal(guess, y))
        return {"biggest": keras.ops.max(logits)}

    logs = loop.evaluate(*data, batch_size=8, verbose=0, return_dict=True)
    logits = model.predict(data[0], verbose=0)
    assert set(logs) == {"biggest", "wrong"}
    assert logs["wrong"] == pytest.approx(np.mean(logits.argmax(-1) != data[1]))
    biggest = logits.reshape(10, 8, 3).max((1, 2)).mean()
    assert logs["biggest"] == pytest.approx(biggest, rel=1e-5)


def test_an_own_predict_step_gives_its_output(data):
    loop = small_loop()
    model = loop.model

    @loop.predict_step
    def predict_step(x):
        return keras.ops.softmax(model(x, training=False))

    probabilities = loop.predict(data[0], batch_size=8, verbose=0)
    assert probabilities.shape == (ROWS, 3)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


def test_a_subclass_can_override_the_steps(data):
    class Doubling(Loop):
        def train_step(self, x, y):
            def compute_loss():
                return 2 * self.model.compute_loss(x, y, self.model(x, training=True))

            loss, grads = loopscope.value_and_grad(
                compute_loss, self.model.trainable_variables
            )
            self.model.optimizer.apply(grads, self.model.trainable_variables)
            return loss

        def test_step(self, x, y):
            return 3 * self.model.compute_loss(x, y, self.model(x, training=False))

    model = small_model()
    loop = Doubling(
        model,
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        gear=FUSED,
        seed=0,
    )
    model.optimizer.learning_rate = 0.0
    expected = model.evaluate(*data, batch_size=8, verbose=0)
    history = loop.fit(*data, batch_size=8, validation_data=data, verbose=0).history
    assert history["loss"][0] == pytest.approx(2 * expected, rel=1e-5)
    assert history["val_loss"][0] == pytest.approx(3 * expected, rel=1e-5)


def test_a_subclass_may_call_the_built_in_step(data):
    class Counting(Loop):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.seen = keras.Variable(0.0, trainable=False, name="seen")

        def train_step(self, x, y):
            self.seen.assign_add(keras.ops.cast(keras.ops.shape(x)[0], "float32"))
            return super().train_step(x, y)

    def make(gear):
        return Counting(
            small_model(),
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            ["accuracy"],
            gear=gear,
            seed=0,
        )

    loop = fresh(make, FUSED)
    history = loop.fit(*data, batch_size=8, epochs=2, verbose=0).history
    expected, weights = built_in_result(data)
    for name in ("loss", "accuracy"):
        assert history[name] == pytest.approx(expected[name])
    assert_same_weights(weights, loop.model.get_weights())
    assert float(loop.seen.value) == 2 * ROWS
    assert "seen" in dict(loop.state)


def test_a_step_that_returns_a_dict_reports_every_entry(data):
    loop = small_loop()
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        loss = Loop.train_step(loop, x, y)
        return {"loss": loss, "twice": 2 * loss, "norm": keras.ops.norm(x)}

    for epoch in loop.epochs(1):
        for step in epoch.train(data, every=5, batch_size=8):
            assert set(step.outputs) == {"loss", "twice", "norm"}
            assert step.outputs["twice"] == pytest.approx(2 * step.loss)
        assert {"loss", "twice", "norm"} <= set(epoch.metrics)
    assert model.optimizer.iterations == 10


def test_an_output_counts_as_its_mean_over_the_steps(data):
    loop = small_loop(metrics=None)

    @loop.train_step
    def train_step(x, y):
        Loop.train_step(loop, x, y)
        return {"first": x[0, 0]}

    logs = loop.fit(*data, batch_size=8, shuffle=False, verbose=0).history
    assert logs["first"] == pytest.approx([data[0][::8, 0].mean()], rel=1e-5)


@pytest.mark.parametrize("gear", [STEP, FUSED])
def test_a_gan_trains_two_models_with_two_optimizers(gear):
    make, (real, noise) = gan()
    loop = fresh(make, gear)
    paths = list(dict(loop.state)) if len(loop.state) else []
    reports = []
    for epoch in loop.epochs(2):
        for step in epoch.train((real, noise), every=1, batch_size=4):
            reports.append(step.outputs)
        assert {"critic_loss", "generator_loss", "critic_loss_mean"} <= set(
            epoch.metrics
        )
        mean = np.mean([r["critic_loss"] for r in reports[-2:]])
        assert epoch.metrics["critic_loss_mean"] == pytest.approx(mean, rel=1e-5)
    assert len(reports) == 4 == loop.step
    assert set(reports[0]) == {"critic_loss", "generator_loss"}
    names = list(dict(loop.state))
    assert len(names) > len(paths)
    for word in ("generator/", "critic/", "of_generator/", "of_critic/"):
        assert any(name.startswith(word) for name in names)
    values = loop.state.numpy()
    assert values["of_generator/iteration"] == values["of_critic/iteration"] == 4


def test_the_gan_of_two_gears_ends_alike():
    make, (real, noise) = gan()
    states = []
    for gear in (STEP, FUSED):
        loop = fresh(make, gear)
        loop.fit(real, noise, batch_size=BATCH, epochs=1, verbose=0)
        states.append(loop.state.numpy())
    assert list(states[0]) == list(states[1])
    assert all(relative(states[0][p], states[1][p]) < 1e-5 for p in states[0])


def test_a_new_step_takes_the_place_of_the_old_one(data):
    loop = small_loop()
    loop.fit(*data, batch_size=8, verbose=0)

    @loop.train_step
    def train_step(x, y):
        return {"nothing": keras.ops.sum(x) * 0}

    weights = loop.model.get_weights()
    history = loop.fit(*data, batch_size=8, verbose=0).history
    assert history["nothing"] == [0.0]
    for was, now in zip(weights, loop.model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert loop.step == 20


def test_a_decorated_step_is_still_the_function_it_was():
    loop = small_loop()

    def train_step(x, y):
        return x

    assert loop.train_step(train_step) is train_step
    assert loop.test_step(train_step) is train_step
    assert loop.predict_step(train_step) is train_step


def test_python_branches_on_tensors_work_in_an_own_step_on_tensorflow():
    if not TENSORFLOW:
        pytest.skip("autograph is TensorFlow's")
    x, y = blobs(16)
    loop = small_loop("graph")

    @loop.train_step
    def train_step(x, y):
        loss = Loop.train_step(loop, x, y)
        if loss > 0:  # noqa: SIM108 - autograph turns this into a condition
            sign = loss
        else:
            sign = -loss
        return {"loss": loss, "sign": sign}

    history = loop.fit(x, y, batch_size=8, verbose=0).history
    assert history["sign"] == pytest.approx(history["loss"])


def test_the_seed_of_a_loop_without_one_comes_from_keras():
    seeds = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        seeds.append(small_loop(seed=None).seed)
    assert seeds[0] == seeds[1]
    assert small_loop(seed=None).seed != seeds[0]


def test_a_loop_can_be_made_from_the_words_of_keras(data):
    loop = Loop(
        small_model(), "rmsprop", "sparse_categorical_crossentropy", ["accuracy"]
    )
    assert isinstance(loop.model.optimizer, keras.optimizers.RMSprop)
    assert loop.model.loss == "sparse_categorical_crossentropy"


def test_a_compiled_model_keeps_its_parts():
    model = small_model()
    model.compile("sgd", "mse", metrics=["mae"])
    optimizer = model.optimizer
    loop = Loop(model)
    assert loop.model.optimizer is optimizer
    assert loop.model.loss == "mse"
