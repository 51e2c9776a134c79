"""The tutorial's experiment: a small perceptron on full MNIST."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopscope.datasets import mnist as load_mnist
from loopscope.experiment import Experiment
from loopscope.loop import Loop


def mnist(
    *,
    batch_size: int = 64,
    epochs: int = 5,
    scale: bool = False,
    logits: bool = False,
    gear: str = "auto",
    seed: int = 0,
) -> Experiment:
    """784-64-64-10 on 50,000 images, 10,000 kept for validation.

    Args:
        batch_size: Examples of a step.
        epochs: Passes over the data.
        scale: Divide the pixels by 255; the tutorial leaves them at 0..255.
        logits: Drop the softmax and take the loss from logits.
        gear: As in `Loop`.
        seed: Of the order of examples.
    """
    import keras

    (x, y), _ = data(scale=scale)
    model = keras.Sequential(
        [
            keras.Input((784,), name="digits"),
            keras.layers.Dense(64, activation="relu", name="dense_1"),
            keras.layers.Dense(64, activation="relu", name="dense_2"),
            keras.layers.Dense(
                10, activation=None if logits else "softmax", name="predictions"
            ),
        ],
        name="mnist",
    )
    loop = Loop(
        model,
        optimizer=keras.optimizers.RMSprop(learning_rate=1e-3, name="rmsprop"),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=logits),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        gear=gear,
        seed=seed,
    )
    return Experiment(
        loop,
        x=x[:50_000],
        y=y[:50_000],
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x[50_000:], y[50_000:]),
    )


def data(*, scale: bool = False) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """MNIST with its images as rows of 784; uint8, or float32 in 0..1 if scaled."""
    (x_train, y_train), (x_test, y_test) = load_mnist()
    return (_rows(x_train, scale), y_train), (_rows(x_test, scale), y_test)


def _rows(images: np.ndarray, scale: bool) -> np.ndarray:
    rows = images.reshape(-1, 784)
    return rows.astype("float32") / 255 if scale else rows
