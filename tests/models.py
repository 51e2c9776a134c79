"""Small models of every kind that the loop has to train, each with its data.

A builder returns `(make, data)`: `make(gear, **options)` gives a new `Loop` around a
new model, and `data` are the `x` and `y` of `fit`, one batch of them.
"""

import contextlib
import inspect
import re
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import loopscope
from loopscope import Loop, backend

TENSORFLOW = keras.backend.backend() == "tensorflow"
JAX = keras.backend.backend() == "jax"
TORCH = keras.backend.backend() == "torch"
GEARS = [gear.name for gear in backend.current().gears]
COMPILED = [name for name in GEARS if name != "eager"]
FUSED = "fused-graph" if TENSORFLOW else "eager" if TORCH else "fused-xla"
"""The fused gear that compiles fastest: for tests of what is the same in all.

PyTorch has none.
"""

BRIEF = [
    pytest.param(gear, marks=pytest.mark.slow) if TENSORFLOW and "xla" in gear else gear
    for gear in GEARS
]
"""All gears; those that compile for seconds on TensorFlow are left to `test-slow`."""


def quick_on_jax(test):
    """A test that trains too often to be quick on more than one backend."""
    test = pytest.mark.divided(test)
    return test if JAX else pytest.mark.slow(test)


ONE_GEAR = [
    gear if gear == FUSED else pytest.param(gear, marks=pytest.mark.slow)
    for gear in GEARS
]
"""All gears; all but one are left to `test-slow`."""


def thinned(values, every, *, ids=str):
    """All values, as parameters; on JAX all but every so many are slow tests.

    Running one small operation for the first time takes JAX far longer.
    """
    return _marked(values, lambda i: TENSORFLOW or i % every == 0, ids)


def some_of(values, on_tensorflow, on_jax, every=4, *, ids=lambda v: v.__name__):
    """All values, as parameters: in the quick suite one in so many, from these on."""
    if TORCH:  # Half as many: what is the same in all, the others have.
        return _marked(values, lambda i: i % (2 * every) == 0, ids)
    first = on_tensorflow if TENSORFLOW else on_jax
    return _marked(values, lambda i: i % every == first, ids)


def halved(values, *, ids=str):
    """All values, as parameters: in the quick suite each on one of the backends."""
    return some_of(values, 0, 1, every=2, ids=ids)


def _marked(values, quick, ids):
    mark, slow = pytest.mark.divided, pytest.mark.slow
    return [
        pytest.param(value, id=ids(value), marks=[mark] if quick(i) else [mark, slow])
        for i, value in enumerate(values)
    ]


STEP = "graph" if TENSORFLOW or TORCH else "xla"
"""The gear that compiles one step."""

BATCH = 8


def fresh(make, gear, *, seed=0, **options):
    """A loop whose names and initial weights depend on nothing but the seed."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    return make(gear, **options)


def reference(loop):
    """The loop's model, to be trained by Keras itself, without waiting for compilers.

    Eager and graph give the same bits on TensorFlow; on JAX compiling is faster.
    """
    loop.model.run_eagerly = TENSORFLOW
    return loop.model


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def classes(rows, count, seed=2):
    return np.random.default_rng(seed).integers(0, count, rows).astype("int32")


@contextlib.contextmanager
def warned(match):
    """A warning that matches has to come; others, such as Keras's own, may."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(w.message) for w in caught]
    assert any(re.search(match, message) for message in found), found


def blobs(rows=64, features=4, count=3, seed=3):
    """A task that can be learnt: x of `features` numbers, y of `count` classes."""
    y = classes(rows, count, seed)
    centres = 2 * numbers(count, features, seed=seed + 1)
    return centres[y] + 0.5 * numbers(rows, features, seed=seed + 2), y


class Batches:
    """An iterable of batches: a stream that can be had again."""

    def __init__(self, batches):
        self.batches = list(batches)
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        yield from self.batches


def small_model(features=4, count=3):
    return keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(count),
        ]
    )


def small_loop(gear=FUSED, *, model=None, **options):
    """The loop of the tests that are not about models: three classes."""
    optimizer = options.pop(
        "optimizer", lambda: keras.optimizers.SGD(0.1, momentum=0.9)
    )
    return Loop(
        model or small_model(),
        # A function where a test makes more than one loop: each has its own.
        optimizer=optimizer() if inspect.isfunction(optimizer) else optimizer,
        loss=options.pop(
            "loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        ),
        metrics=options.pop("metrics", ["accuracy"]),
        gear=gear,
        seed=options.pop("seed", 0),
        **options,
    )


def all_kinds_model():
    """Convolution, BatchNorm and Dropout in one."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def all_kinds_loop(gear=FUSED, **options):
    return small_loop(gear, model=all_kinds_model(), **options)


def mixed_loop(gear=FUSED, **options):
    """BatchNorm and Dropout, where convolutions would be too slow to compile."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    return small_loop(gear, model=model, **options)


def tutorial_mlp():
    def make(gear, **options):
        model = keras.Sequential(
            [
                keras.Input((784,)),
                layers.Dense(64, activation="relu"),
                layers.Dense(64, activation="relu"),
                layers.Dense(10, activation="softmax"),
            ]
        )
        return Loop(
            model,
            optimizer=keras.optimizers.RMSprop(1e-3),
            loss="sparse_categorical_crossentropy",
            metrics=["sparse_categorical_accuracy"],
            gear=gear,
            seed=0,
            **options,
        )

    return make, (numbers(BATCH, 784), classes(BATCH, 10))


def convnet_with_batchnorm():
    def make(gear, **options):
        model = keras.Sequential(
            [
                keras.Input((8, 8, 2)),
                # BatchNorm takes a bias away: its gradient would be rounding noise.
                layers.Conv2D(4, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.Activation("gelu"),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(5),
            ]
        )
        return Loop(
            model,
            optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            gear=gear,
            seed=0,
            **options,
        )

    return make, (numbers(BATCH, 8, 8, 2), classes(BATCH, 5))


class GivenDropout(layers.Layer):
    """Dropout with a mask that comes with the batch: the same in every gear."""

    def __init__(self, rate, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs, mask_of_batch, training=False):
        if not training:
            return inputs
        keep = keras.ops.cast(mask_of_batch > self.rate, inputs.dtype)
        return inputs * keep / (1 - self.rate)


def dropout_mlp():
    def make(gear, **options):
        x = keras.Input((6,), name="features")
        uniform = keras.Input((16,), name="uniform")
        hidden = x
        for _ in range(3):
            hidden = layers.Dense(16, activation="relu")(hidden)
            hidden = GivenDropout(0.4)(hidden, uniform)
        model = keras.Model(
            {"features": x, "uniform": uniform}, layers.Dense(1)(hidden)
        )
        return Loop(
            model,
            optimizer=keras.optimizers.Adam(1e-2, clipnorm=1.0),
            loss="mse",
            metrics=["mae"],
            gear=gear,
            seed=0,
            **options,
        )

    uniform = np.random.default_rng(5).uniform(size=(BATCH, 16)).astype("float32")
    x = {"features": numbers(BATCH, 6), "uniform": uniform}
    # Away from zero, so that the gradient of the last bias is no small difference.
    return make, (x, 2 + numbers(BATCH, 1, seed=7))


def transformer_block():
    def make(gear, **options):
        x = keras.Input((5, 8))
        # Softmax takes the bias of a key away: its gradient would be noise.
        attended = layers.MultiHeadAttention(2, 4, use_bias=False)(x, x)
        hidden = layers.LayerNormalization()(x + attended)
        forward = layers.Dense(8)(layers.Dense(16, activation="gelu")(hidden))
        hidden = layers.LayerNormalization()(hidden + forward)
        model = keras.Model(x, layers.Dense(4)(layers.GlobalAveragePooling1D()(hidden)))
        return Loop(
            model,
            optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            gear=gear,
            seed=0,
            **options,
        )

    return make, (numbers(BATCH, 5, 8), classes(BATCH, 4))


def lstm():
    def make(gear, **options):
        model = keras.Sequential([keras.Input((4, 3)), layers.LSTM(6), layers.Dense(1)])
        return Loop(
            model,
            optimizer=keras.optimizers.Adam(1e-2),
            loss="mse",
            gear=gear,
            seed=0,
            **options,
        )

    return make, (numbers(BATCH, 4, 3), 2 + numbers(BATCH, 1, seed=7))


def embedding_with_mixed_outputs():
    """Two inputs in a dict, two outputs in a dict, two losses with weights."""

    def make(gear, **options):
        ids = keras.Input((5,), dtype="int32", name="ids")
        extra = keras.Input((3,), name="extra")
        words = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8)(ids))
        hidden = layers.Dense(12, activation="tanh")(
            layers.Concatenate()([words, extra])
        )
        outputs = {
            "kind": layers.Dense(4, activation="softmax", name="kind")(hidden),
            "amount": layers.Dense(1, name="amount")(hidden),
        }
        model = keras.Model({"ids": ids, "extra": extra}, outputs)
        return Loop(
            model,
            optimizer=keras.optimizers.Adam(1e-2),
            loss={"kind": "sparse_categorical_crossentropy", "amount": "mse"},
            loss_weights={"kind": 1.0, "amount": 0.5},
            metrics={"kind": ["accuracy"], "amount": ["mae"]},
            gear=gear,
            seed=0,
            **options,
        )

    x = {
        "ids": np.random.default_rng(4).integers(0, 20, (BATCH, 5)).astype("int32"),
        "extra": numbers(BATCH, 3),
    }
    y = {"kind": classes(BATCH, 4), "amount": numbers(BATCH, 1, seed=6)}
    return make, (x, y)


def gan():
    """Two models, two optimizers, one portable step, two losses."""

    def make(gear, **options):
        generator = keras.Sequential(
            [keras.Input((3,)), layers.Dense(8, activation="tanh"), layers.Dense(4)],
            name="generator",
        )
        critic = keras.Sequential(
            [keras.Input((4,)), layers.Dense(8, activation="tanh"), layers.Dense(1)],
            name="critic",
        )
        of_generator = keras.optimizers.Adam(1e-3, name="of_generator")
        of_critic = keras.optimizers.RMSprop(1e-3, name="of_critic")
        loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
        tracker = keras.metrics.Mean(name="critic_loss_mean")
        gradients = zeros_like(critic.trainable_variables, "critic")
        gradients += zeros_like(generator.trainable_variables, "generator")
        loop = Loop(generator, gear=gear, seed=0, **options)

        @loop.train_step
        def train_step(real, noise):
            def critic_loss():
                fake = generator(noise, training=True)
                logits = critic(keras.ops.concatenate([real, fake]), training=True)
                ones = keras.ops.ones((real.shape[0], 1))
                truth = keras.ops.concatenate([ones, 0 * ones])
                return loss_fn(truth, logits)

            def generator_loss():
                logits = critic(generator(noise, training=True), training=True)
                return loss_fn(keras.ops.ones_like(logits), logits)

            value, first = loopscope.value_and_grad(
                critic_loss, critic.trainable_variables
            )
            of_critic.apply(first, critic.trainable_variables)
            other, second = loopscope.value_and_grad(
                generator_loss, generator.trainable_variables
            )
            of_generator.apply(second, generator.trainable_variables)
            keep(gradients, [*first, *second])
            tracker.update_state(value)
            return {"critic_loss": value, "generator_loss": other}

        return loop

    return make, (numbers(BATCH, 4), numbers(BATCH, 3, seed=9))


class Residual(keras.Model):
    """A subclassed model with layers of its own, an inner loss and a branch."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(8, activation="tanh")
        self.blocks = [
            layers.Dense(8, activation="tanh", kernel_regularizer="l2")
            for _ in range(2)
        ]
        self.last = layers.Dense(2)

    def call(self, inputs, training=False):
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        if training:
            self.add_loss(1e-3 * keras.ops.mean(keras.ops.square(hidden)))
        return self.last(hidden)


def subclassed():
    def make(gear, **options):
        return Loop(
            Residual(),
            optimizer=keras.optimizers.Adam(1e-2),
            loss="mse",
            metrics=["mae"],
            gear=gear,
            seed=0,
            **options,
        )

    return make, (numbers(BATCH, 3), 2 + numbers(BATCH, 2, seed=8))


ALL = [
    tutorial_mlp,
    convnet_with_batchnorm,
    dropout_mlp,
    transformer_block,
    lstm,
    embedding_with_mixed_outputs,
    gan,
    subclassed,
]


def zeros_like(variables, prefix):
    """Variables that hold gradients between a step and the test that looks at them."""
    return [
        keras.Variable(np.zeros(v.shape, "float32"), name=f"gradient_{prefix}_{i}")
        for i, v in enumerate(variables)
    ]


def keep(kept, gradients):
    for variable, gradient in zip(kept, gradients, strict=True):
        # The sum makes a dense array out of TensorFlow's sparse rows.
        variable.assign(keras.ops.zeros(variable.shape) + gradient)


def built_in_by_hand(model, x, y, look=lambda gradients: None):
    """What the built-in step does, for own steps that do more; the loss."""

    def compute_loss():
        y_pred = model(x, training=True)
        return model.compute_loss(x, y, y_pred, training=True), y_pred

    (loss, y_pred), gradients = loopscope.value_and_grad(
        compute_loss, model.trainable_variables, has_aux=True
    )
    look(gradients)
    model.optimizer.apply(gradients, model.trainable_variables)
    model.compute_metrics(x, y, y_pred)
    return loss


def record_gradients(loop, x):
    """Put an own step in the place of the built-in one that keeps its gradients."""
    model = loop.model
    model(x)
    kept = zeros_like(model.trainable_variables, "model")

    @loop.train_step
    def train_step(x, y):
        return built_in_by_hand(model, x, y, lambda found: keep(kept, found))


def relative(was, now):
    """The largest difference, relative to the largest number: of one variable."""
    was, now = np.asarray(was, "float64"), np.asarray(now, "float64")
    if not was.size:
        return 0.0
    return np.abs(was - now).max() / max(np.abs(was).max(), 1e-30)


def differences(was, now):
    """`relative` by path, for two states as dicts of arrays."""
    assert list(was) == list(now)
    return {path: relative(was[path], now[path]) for path in was}


def apart(one, other):
    """The largest relative difference of two trainings' variables and histories."""
    (history, state, _), (others, other_state, _) = one, other
    logs = {name: relative(history[name], others[name]) for name in sorted(history)}
    found = {**differences(state, other_state), **logs}
    worst = max(found, key=found.get)
    return {"path": worst, "difference": float(found[worst])}


def clipped():
    """Gradients are summed before they are clipped."""

    def make(gear, **options):
        optimizer = keras.optimizers.Adam(1e-2, global_clipnorm=0.1)
        return small_loop(gear, optimizer=optimizer, **options)

    return make, blobs(BATCH)


def left_and_not(make, gear, data):
    """Where a run ends, and one that was left in the middle of an epoch and gone on."""

    class Leave(Exception):
        pass

    def at(step):
        def listener(event):
            if type(event).__name__ == "ChunkEnd" and loop.step == step:
                raise Leave

        return listener

    arguments = {"batch_size": BATCH, "epochs": 3, "verbose": 0}
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for name, leave in (("whole", None), ("left", 8)):
            loop = fresh(make, gear)
            if leave:
                listener = at(leave)
                loop.subscribe(listener, chunk_steps={"train": 1})
                try:
                    loop.fit(*data, run=Path(folder, name), **arguments)
                except Leave:
                    loop = fresh(make, gear)
            run = {"run": Path(folder, name), "resume": bool(leave)}
            loop.fit(*data, **run, **arguments)
            ends.append((loop.step, loop.state.sha256()))
    return ends
