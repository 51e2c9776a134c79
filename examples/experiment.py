"""MNIST: one experiment for one machine and for many. Nothing in it knows which."""

import keras

import loopscope


def experiment():
    """A small perceptron, with what stops and saves it."""
    keras.utils.set_random_seed(0)
    (x, y), _ = loopscope.datasets.mnist()
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loop = loopscope.Loop(
        model,
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        seed=0,
    )
    return loopscope.Experiment(
        loop,
        x=x[:50_000],
        y=y[:50_000],
        batch_size=256,
        epochs=3,
        validation_data=(x[50_000:], y[50_000:]),
        callbacks=[keras.callbacks.EarlyStopping(patience=2)],
    )
