"""MNIST for the tests of the page: short trainings, some of them odd."""

import time
import warnings

import keras

from loopscope import Experiment, Loop
from loopscope.experiments.mnist import data

ODD = 1469
"""It comes at step 60."""

HOSTILE = "<img src=x onerror=window.hurt=1>"


class Warns(keras.callbacks.Callback):
    """Puts markup into the events of a run."""

    def on_train_begin(self, logs=None):
        warnings.warn(HOSTILE, stacklevel=1)


class Slow(keras.callbacks.Callback):
    """Leaves a page time to look."""

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.05)


def spike():
    """A watched training, one row of which is far too bright and wrongly labelled."""
    (x, y), _ = data(scale=True)
    x, y = x[:7_400].copy(), y.copy()
    x[ODD] *= 1_000
    y[ODD] = (y[ODD] + 1) % 10  # Were it right, it would cost nothing.
    return _experiment(x, y, epochs=2, watch=1)


def hostile():
    """A training whose names would be HTML, if anyone took them for such."""
    (x, y), _ = data(scale=True)
    metric = f"acc{HOSTILE}"
    return _experiment(x[:1_640], y, metric=metric, callbacks=[Warns()])


def live():
    """A training that goes on until it is told to stop."""
    (x, y), _ = data(scale=True)
    return _experiment(x[:7_400], y, epochs=500, callbacks=[Slow()])


def _experiment(x, y, *, epochs=1, watch=None, metric="accuracy", callbacks=()):
    model = keras.Sequential(
        [
            keras.Input((784,), name="digits"),
            keras.layers.Dense(32, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="predictions"),
        ],
        name="mnist",
    )
    loop = Loop(
        model,
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name=metric)],
        gear="graph",
        seed=0,
        watch=watch,
    )
    train = len(x) - 1_000
    return Experiment(
        loop,
        x=x[:train],
        y=y[:train],
        batch_size=64,
        epochs=epochs,
        validation_data=(x[train:], y[train : len(x)]),
        callbacks=list(callbacks),
    )
