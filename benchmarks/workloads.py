"""The five models and their data, written once for everyone who is timed.

Whoever trains a workload gets the same arrays, the same layers, the same initial
weights (drawn by NumPy, so that they do not depend on the backend) and the same
optimizer and loss. How it is trained is left to `ours.py` and the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Data = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """A model to train, and how much of it is one measurement.

    Attributes:
        name: The word on the command line.
        title: The name in tables.
        load: Makes the training data, (x, y).
        layers: Makes an unbuilt model; its last layer gives logits.
        optimizer: Makes the optimizer.
        batch_size: Examples of a step.
        eager_steps: Steps of one measurement of an eager loop.
        horizon: Steps that `auto` is told to expect: a training of some minutes.
        random: Whether the step draws random numbers (Dropout), so that losses of
            two programs agree only on average.
        loss_spread: By how much, relatively, the mean loss of the first epoch may
            differ between two programs that shuffle differently.
    """

    name: str
    title: str
    load: Callable[[], Data]
    layers: Callable[[], Any]
    optimizer: Callable[[], Any]
    batch_size: int
    eager_steps: int
    horizon: int
    random: bool = False
    loss_spread: float = 0.1

    @property
    def data(self) -> Data:
        return _loaded(self.load)

    @property
    def steps(self) -> int:
        """Steps of an epoch, a smaller last one included."""
        return -(-len(self.data[0]) // self.batch_size)

    @property
    def first_batch(self) -> Data:
        x, y = self.data
        return x[: self.batch_size], y[: self.batch_size]


class Training:
    """A workload's model, optimizer, loss and metric, as built by Keras.

    Every program that uses Keras objects starts from one of these.
    """

    def __init__(self, workload: Workload) -> None:
        import keras

        self.workload = workload
        keras.utils.set_random_seed(0)
        self.model = workload.layers()
        draw_weights(self.model)
        self.optimizer = workload.optimizer()
        self.optimizer.build(self.model.trainable_variables)
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.metric = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        self._variables = [*self.model.variables, *self.optimizer.variables]
        self._initial = [
            np.array(keras.ops.convert_to_numpy(v)) for v in self._variables
        ]

    def restore(self) -> None:
        """Set model and optimizer back to where every program starts."""
        for variable, value in zip(self._variables, self._initial, strict=True):
            variable.assign(value)


def draw_weights(model: Any) -> None:
    """Glorot-uniform kernels out of NumPy; other weights keep Keras's constants."""
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        shape = tuple(variable.shape)
        if len(shape) < 2:
            continue
        fan_in, fan_out = int(np.prod(shape[:-1])), shape[-1]
        limit = np.sqrt(6 / (fan_in + fan_out))
        variable.assign(random.uniform(-limit, limit, shape).astype("float32"))


@cache
def _loaded(load: Callable[[], Data]) -> Data:
    return load()


# The tutorial's model: 50,000 images, pixels 0..255 as they come.


def _mnist_rows() -> Data:
    from loopscope.datasets import mnist

    (x, y), _ = mnist()
    return np.ascontiguousarray(x[:50_000].reshape(-1, 784)), y[:50_000].copy()


def mnist_validation() -> Data:
    """The 10,000 images that the tutorial keeps for validation."""
    from loopscope.datasets import mnist

    (x, y), _ = mnist()
    return np.ascontiguousarray(x[50_000:].reshape(-1, 784)), y[50_000:].copy()


def _mlp() -> Any:
    import keras

    # The tutorial's softmax is left to the loss (`from_logits=True`). On TensorFlow
    # that is what Keras does with a softmax output anyway; on JAX it would clip the
    # probabilities instead and train something else (the first losses are near 100).
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


# A small convnet on the same images.


def _mnist_images() -> Data:
    from loopscope.datasets import mnist

    (x, y), _ = mnist()
    rows = 24 * 128
    return (x[:rows, :, :, None] / 255).astype("float32"), y[:rows].copy()


def _convnet() -> Any:
    import keras

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


# A convnet with BatchNorm on random pictures.


def _pictures() -> Data:
    random = np.random.default_rng(1)
    x = random.standard_normal((16 * 64, 32, 32, 3), dtype="float32")
    return x, _labels(x.mean((1, 2)), 10)


def _batchnorm_convnet() -> Any:
    import keras

    layers: list[Any] = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("relu"),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


# Ten times Dense and Dropout on four features.


def _four_features() -> Data:
    random = np.random.default_rng(2)
    x = random.standard_normal((100 * 500, 4), dtype="float32")
    return x, _labels(x, 3)


def _deep_dropout() -> Any:
    import keras

    layers: list[Any] = [keras.Input((4,))]
    for _ in range(10):
        layers.append(keras.layers.Dense(128, activation="relu"))
        layers.append(keras.layers.Dropout(0.1))
    return keras.Sequential([*layers, keras.layers.Dense(3)])


# A transformer of two layers over 64 tokens.

TOKENS, WORDS, WIDTH = 64, 1000, 128


def _sentences() -> Data:
    random = np.random.default_rng(3)
    x = random.integers(0, WORDS, (16 * 32, TOKENS), dtype="int32")
    counts = np.stack([(x % 10 == digit).sum(1) for digit in range(10)], 1)
    return x, counts.argmax(1).astype("int32")


def _transformer() -> Any:
    import keras

    words = keras.Input((TOKENS,), dtype="int32")
    x = keras.layers.Embedding(WORDS, WIDTH)(words)
    for _ in range(2):
        seen = keras.layers.MultiHeadAttention(4, WIDTH // 4)(x, x)
        x = keras.layers.LayerNormalization()(x + seen)
        wide = keras.layers.Dense(4 * WIDTH, activation="gelu")(x)
        x = keras.layers.LayerNormalization()(x + keras.layers.Dense(WIDTH)(wide))
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(words, keras.layers.Dense(10)(x))


def _labels(features: np.ndarray, classes: int) -> np.ndarray:
    """Labels that can be learned: the largest of some random directions."""
    random = np.random.default_rng(4)
    directions = random.standard_normal((features.shape[-1], classes))
    return (features @ directions).argmax(-1).astype("int32")


def _rmsprop() -> Any:
    import keras

    return keras.optimizers.RMSprop(1e-3)


def _adam() -> Any:
    import keras

    return keras.optimizers.Adam(1e-3)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "mlp",
            "tutorial MLP, MNIST 0..255, batch 64",
            _mnist_rows,
            _mlp,
            _rmsprop,
            batch_size=64,
            eager_steps=50,
            horizon=50_000,
            loss_spread=0.25,
        ),
        Workload(
            "convnet",
            "small convnet, MNIST, batch 128",
            _mnist_images,
            _convnet,
            _adam,
            batch_size=128,
            eager_steps=6,
            horizon=5_000,
        ),
        Workload(
            "batchnorm",
            "convnet with BatchNorm, 32x32x3, batch 64",
            _pictures,
            _batchnorm_convnet,
            _adam,
            batch_size=64,
            eager_steps=4,
            horizon=5_000,
        ),
        Workload(
            "dropout",
            "10 x Dense(128)+Dropout, 4 features, batch 500",
            _four_features,
            _deep_dropout,
            _adam,
            batch_size=500,
            eager_steps=10,
            horizon=20_000,
            random=True,
        ),
        Workload(
            "transformer",
            "2-layer transformer, 64 tokens, batch 32",
            _sentences,
            _transformer,
            _adam,
            batch_size=32,
            eager_steps=4,
            horizon=5_000,
        ),
    )
}
