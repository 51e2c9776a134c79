"""`fit`, `evaluate` and `predict` beside Keras's own, for every kind of model."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from models import BRIEF, GEARS, TENSORFLOW, blobs, classes, halved, numbers
from parity import assert_alike, both

ROWS = 22
OPTIONS = {"epochs": 2, "batch_size": 8, "shuffle": False}


def dense(*, loss="sparse_categorical_crossentropy", **options):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    options.setdefault("optimizer", keras.optimizers.SGD(0.1, momentum=0.9))
    model.compile(loss=loss, **options)
    return model


def two_outputs(**options):
    x = keras.Input((4,), name="x")
    hidden = layers.Dense(6, activation="relu")(x)
    a = layers.Dense(3, activation="softmax", name="a")(hidden)
    b = layers.Dense(1, name="b")(hidden)
    model = keras.Model(x, options.pop("outputs", lambda a, b: [a, b])(a, b))
    model.compile(optimizer="sgd", **options)
    return model


def one_hot(y, count=3):
    return np.eye(count, dtype="float32")[y]


X, Y = blobs(ROWS)
B = numbers(ROWS, 1, seed=5)
WEIGHT = np.linspace(0.1, 2, ROWS, dtype="float32")


class OwnTrainStep(keras.Model):
    """A model whose `train_step` is its own, in the words of the backend."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, activation="softmax")
        self.tracker = keras.metrics.Mean(name="own_loss")

    def call(self, x, training=None):
        return self.dense(x)

    @property
    def metrics(self):
        return [self.tracker]

    if TENSORFLOW:

        def train_step(self, data):
            import tensorflow as tf

            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred))
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(
                zip(grads, self.trainable_variables, strict=True)
            )
            self.tracker.update_state(loss)
            return {"own_loss": self.tracker.result(), "last": loss}

    else:

        def train_step(self, state, data):
            import jax

            trainable, rest, slots, metrics = state
            x, y = data

            def loss_of(trainable, rest):
                y_pred, rest = self.stateless_call(trainable, rest, x, training=True)
                loss = keras.losses.sparse_categorical_crossentropy(y, y_pred)
                return ops.mean(loss), rest

            grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, rest), grads = grad(trainable, rest)
            trainable, slots = self.optimizer.stateless_apply(slots, grads, trainable)
            metrics = self.tracker.stateless_update_state(metrics, loss)
            logs = {"own_loss": self.tracker.stateless_result(metrics), "last": loss}
            return logs, (trainable, rest, slots, metrics)


class OwnParts(keras.Model):
    """`compute_loss` and `compute_metrics` of its own, and a metric that it owns."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, activation="softmax")
        self.seen = keras.metrics.Sum(name="seen")

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x, y, y_pred, sample_weight=None):
        loss = keras.losses.sparse_categorical_crossentropy(y, y_pred)
        return ops.mean(loss) + 0.01 * ops.mean(ops.square(y_pred))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.seen.update_state(ops.ones((3,)))
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**results, "largest": ops.max(y_pred)}


class AddsLoss(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, activation="softmax", kernel_regularizer="l2")
        self.mean = keras.metrics.Mean(name="mean_out")

    def call(self, x):
        y = self.dense(x)
        self.add_loss(1e-2 * ops.mean(ops.square(y)))
        if TENSORFLOW:  # On JAX, Keras's own `fit` cannot update a metric here.
            self.mean.update_state(y)
        return y


class OwnTestAndPredict(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.dense(x)

    if TENSORFLOW:

        def test_step(self, data):
            logs = super().test_step(data)
            return {**logs, "twice": 2.0 * ops.convert_to_tensor(logs["loss"])}

        def predict_step(self, data):
            return 10.0 * super().predict_step(data)

    else:

        def test_step(self, state, data):
            logs, state = super().test_step(state, data)
            return {**logs, "twice": 2.0 * logs["loss"]}, state

        def predict_step(self, state, data):
            outputs, state = super().predict_step(state, data)
            return 10.0 * outputs, state


def compiled(make, **options):
    def build():
        model = make()
        options.setdefault("loss", "sparse_categorical_crossentropy")
        model.compile(optimizer=keras.optimizers.SGD(0.1), **options)
        return model

    return build


def with_dropout():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.4, seed=3),
            layers.BatchNormalization(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def constrained():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, kernel_constraint="max_norm", kernel_regularizer="l1"),
            layers.Dense(3, activation="softmax", bias_constraint="non_neg"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(1.0, clipnorm=0.5, weight_decay=0.01),
        "sparse_categorical_crossentropy",
    )
    return model


def nested_trainer():
    inner = dense(metrics=["mae"])
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def compiled_twice():
    model = dense(metrics=["accuracy"])
    again = keras.metrics.SparseCategoricalCrossentropy(name="ce")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=[again])
    return model


XY = (X, Y)
TWO = (X, [Y, B])
CASES = {
    "strings": (lambda: dense(metrics=["accuracy"]), XY, {}),
    "one hot, by shape": (
        lambda: dense(loss="categorical_crossentropy", metrics=["acc"]),
        (X, one_hot(Y)),
        {},
    ),
    "metric objects": (
        lambda: dense(
            metrics=[
                keras.metrics.SparseCategoricalAccuracy(name="a"),
                keras.metrics.SparseTopKCategoricalAccuracy(2, name="top"),
            ]
        ),
        XY,
        {},
    ),
    "a function as metric and loss": (
        lambda: dense(
            loss=lambda y, p: ops.mean(ops.square(ops.one_hot(y, 3) - p), axis=-1),
            metrics=[lambda y, p: ops.max(p, axis=-1)],
        ),
        XY,
        {},
    ),
    "a metric that gives a vector": (
        lambda: dense(
            loss="categorical_crossentropy",
            metrics=[keras.metrics.F1Score(name="f1")],
        ),
        (X, one_hot(Y)),
        {},
    ),
    "weighted metrics": (
        lambda: dense(metrics=["accuracy"], weighted_metrics=["accuracy"]),
        XY,
        {"sample_weight": WEIGHT},
    ),
    "no metrics": (dense, XY, {}),
    "dropout and batch norm": (with_dropout, XY, {}),
    "two losses": (
        lambda: two_outputs(loss=["sparse_categorical_crossentropy", "mse"]),
        TWO,
        {},
    ),
    "loss weights and metrics by output": (
        lambda: two_outputs(
            loss={"a": "sparse_categorical_crossentropy", "b": "mse"},
            loss_weights={"a": 0.3, "b": 2.0},
            metrics={"a": ["accuracy"], "b": "mae"},
            outputs=lambda a, b: {"a": a, "b": b},
        ),
        (X, {"a": Y, "b": B}),
        {},
    ),
    "weights for two outputs": (
        lambda: two_outputs(
            loss=["sparse_categorical_crossentropy", "mse"],
            weighted_metrics=[["accuracy"], ["mae"]],
        ),
        TWO,
        {"sample_weight": [WEIGHT, WEIGHT[::-1].copy()]},
    ),
    "one weight for two outputs": (
        lambda: two_outputs(loss=["sparse_categorical_crossentropy", "mse"]),
        TWO,
        {"sample_weight": WEIGHT},
    ),
    "a nested structure": (
        lambda: two_outputs(
            loss=("sparse_categorical_crossentropy", {"deep": "mse"}),
            outputs=lambda a, b: (a, {"deep": b}),
        ),
        (X, (Y, {"deep": B})),
        {},
    ),
    "an own train_step": (compiled(OwnTrainStep), XY, {}),
    "own compute_loss and compute_metrics": (
        compiled(OwnParts, metrics=["accuracy"]),
        XY,
        {},
    ),
    "add_loss and an owned metric": (compiled(AddsLoss), XY, {}),
    "own test_step and predict_step": (compiled(OwnTestAndPredict), XY, {}),
    "steps_per_execution": (
        lambda: dense(metrics=["accuracy"], steps_per_execution=2),
        XY,
        {},
    ),
    "steps_per_execution above an epoch": (
        lambda: dense(metrics=["accuracy"], steps_per_execution=5),
        XY,
        {},
    ),
    "steps_per_execution and steps_per_epoch": (
        lambda: dense(metrics=["accuracy"], steps_per_execution=2),
        XY,
        {"batch_size": 2, "steps_per_epoch": 3},
    ),
    "a loss for one of two outputs": (
        lambda: two_outputs(loss=["sparse_categorical_crossentropy", None]),
        TWO,
        {},
    ),
    "constraints and regularizers": (constrained, XY, {}),
    "a compiled model inside of another": (nested_trainer, XY, {}),
    "compiled twice": (compiled_twice, XY, {}),
    "run_eagerly": (lambda: dense(metrics=["accuracy"], run_eagerly=True), XY, {}),
    "a schedule": (
        lambda: dense(
            optimizer=keras.optimizers.Adam(
                keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
            )
        ),
        XY,
        {},
    ),
    "an average of the weights": (
        lambda: dense(
            optimizer=keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        ),
        XY,
        {},
    ),
}


@pytest.mark.parametrize("name", halved(CASES))
def test_fit_with_validation_is_that_of_keras(name):
    build, (x, y), extra = CASES[name]

    def call(model):
        return (x, y), {**OPTIONS, **extra, "validation_split": 0.3}

    assert_alike(*both(build, call))


@pytest.mark.parametrize("name", halved(CASES))
def test_evaluate_is_that_of_keras(name):
    build, (x, y), extra = CASES[name]
    as_dict = list(CASES).index(name) % 2 == 0

    extra = {k: v for k, v in extra.items() if k == "sample_weight"}

    def call(model):
        return (x, y), {**extra, "batch_size": 8, "return_dict": as_dict}

    assert_alike(*both(build, call, method="evaluate"))


PREDICTED = [
    "strings",
    "loss weights and metrics by output",
    "a nested structure",
    "own test_step and predict_step",
    "steps_per_execution",
    "dropout and batch norm",
]


@pytest.mark.parametrize("name", PREDICTED)
def test_predict_is_that_of_keras(name):
    build, (x, _), _ = CASES[name]
    assert_alike(*both(build, lambda m: ((x,), {"batch_size": 8}), method="predict"))


class OnlyTrainer:
    """Keras's Trainer mixed into a layer: no `keras.Model`."""

    def __new__(cls):
        trainer = next(c for c in keras.Model.__mro__ if c.__name__.endswith("Trainer"))

        class Trained(trainer, layers.Layer):
            def __init__(self):
                layers.Layer.__init__(self)
                trainer.__init__(self)
                self.dense = layers.Dense(3, activation="softmax")

            def call(self, x, training=False):
                return self.dense(x)

        return Trained()


def test_a_trainer_that_is_no_model_is_trained_too():
    build = compiled(OnlyTrainer, metrics=["accuracy"])
    assert_alike(*both(build, lambda model: (XY, dict(OPTIONS))))


def test_a_model_with_nothing_to_train_still_has_metrics():
    def build():
        model = dense(metrics=["accuracy"])
        model.trainable = False
        return model

    theirs, ours = both(build, lambda model: (XY, dict(OPTIONS)))
    assert "does not have any trainable weights" in ours.warned[0]
    theirs.warned = ours.warned = []  # Keras warns on TensorFlow only.
    assert_alike(theirs, ours)


def test_predict_joins_outputs_that_have_no_batch_axis_in_common():
    model = keras.Sequential([keras.Input((None,)), layers.Embedding(9, 4)])
    x = classes(20, 9).reshape(10, 2)
    assert_alike(
        *both(
            lambda: compiled(lambda: keras.models.clone_model(model))(),
            lambda m: ((x,), {"batch_size": 4}),
            method="predict",
        )
    )


def test_random_numbers_go_on_in_predict():
    class Noisy(keras.Model):
        def __init__(self):
            super().__init__()
            self.drop = layers.Dropout(0.5, seed=1)

        def call(self, x):
            return self.drop(x, training=True)

    build = compiled(Noisy, loss="mse")
    for gear in GEARS if not TENSORFLOW else ("eager", "graph", "fused-graph"):
        theirs, ours = both(
            build, lambda m: ((X,), {"batch_size": 8}), method="predict", gear=gear
        )
        assert_alike(theirs, ours)
        again = ours.model.predict(X, batch_size=8, verbose=0)
        assert not np.array_equal(ours.value, again)


@pytest.mark.parametrize("gear", GEARS)
def test_an_own_train_step_is_that_of_keras_in_every_gear(gear):
    build, data, _ = CASES["an own train_step"]
    theirs, ours = both(build, lambda model: (data, dict(OPTIONS)), gear=gear)
    assert_alike(theirs, ours, tolerance=1e-5)


@pytest.mark.parametrize("gear", BRIEF)
def test_an_own_compute_loss_is_that_of_keras_in_every_gear(gear):
    build, data, _ = CASES["own compute_loss and compute_metrics"]
    theirs, ours = both(build, lambda model: (data, dict(OPTIONS)), gear=gear)
    assert_alike(theirs, ours, tolerance=1e-5)


def test_an_own_train_step_may_take_data_of_any_structure():
    class Four(OwnTrainStep):
        if TENSORFLOW:

            def train_step(self, data):
                x, y, extra, _ = data
                return super().train_step((x + 0.0 * extra, y))

        else:

            def train_step(self, state, data):
                x, y, extra, _ = data
                return super().train_step(state, (x + 0.0 * extra, y))

    parts = [(X[i : i + 8], Y[i : i + 8], X[i : i + 8], Y[i : i + 8]) for i in (0, 8)]

    def call(_):
        return ((p for p in parts * 9),), {"steps_per_epoch": 2, "epochs": 2}

    def build():
        made = compiled(Four)()
        made(X[:2])
        return made

    theirs, ours = both(build, call)
    if TENSORFLOW:
        assert_alike(theirs, ours)
    else:  # Keras on JAX takes no more than three parts.
        assert ours.error is None
        assert int(ours.model.optimizer.iterations) == 4
