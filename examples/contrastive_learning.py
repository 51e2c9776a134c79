"""Contrastive learning: features of digits, learnt without a single label.

What it shows: a step of one's own that makes its own task. Each picture of a batch is
changed at random, twice. For each changed picture the encoder has to find its other
version among all pictures of the batch (SimCLR, https://arxiv.org/abs/2002.05709). The
loss is a function of the whole batch, not a mean over examples. Labels are used only
afterwards, to measure what the features know.

    python contrastive_learning.py
    loopscope train contrastive_learning.py:experiment
"""

import keras
import numpy as np
from keras import layers, ops

import loopscope


def build_augmenter():
    """Shifts and resizes each picture by itself, then hides a part of its pixels."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.RandomTranslation(0.12, 0.12, fill_mode="constant", seed=1),
            layers.RandomZoom(0.25, fill_mode="constant", seed=2),
            layers.RandomRotation(0.06, fill_mode="constant", seed=3),
            layers.Dropout(0.15, seed=4),
        ],
        name="augmenter",
    )


def build_encoder():
    """From a picture to 64 features."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 5, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
        ],
        name="encoder",
    )


def nt_xent(one, other, temperature=0.2):
    """How hard it is to find each row's partner among all, and how often it is found.

    Args:
        one: Shape `(B, D)`.
        other: Shape `(B, D)`: row `i` is the partner of row `i` of `one`.
        temperature: Smaller: the nearest of the wrong ones count more.

    Returns:
        The normalized cross entropy, and the part of rows whose nearest is the partner.
    """
    size = one.shape[0]
    rows = ops.concatenate([one, other])
    rows = rows / ops.maximum(ops.norm(rows, axis=-1, keepdims=True), 1e-6)
    near = ops.matmul(rows, ops.transpose(rows)) / temperature
    near = near - 1e9 * ops.eye(2 * size)  # No row is its own partner.
    partner = ops.concatenate([ops.arange(size) + size, ops.arange(size)])
    loss = keras.losses.sparse_categorical_crossentropy(partner, near, from_logits=True)
    found = ops.cast(ops.argmax(near, axis=-1), partner.dtype) == partner
    return ops.mean(loss), ops.mean(ops.cast(found, "float32"))


def experiment(epochs=4, examples=50_000, batch_size=128, gear="auto"):
    """The training of the encoder.

    Args:
        epochs: Passes over the data.
        examples: How many of MNIST's first 50,000 are seen.
        batch_size: Examples of a step: each is told from 2 B - 2 others.
        gear: As in `loopscope.Loop`.
    """
    keras.utils.set_random_seed(0)
    (x, _), _ = loopscope.datasets.mnist()
    augmenter, encoder = build_augmenter(), build_encoder()
    # Only for the training: what the loss makes blind to, the features still know.
    projector = keras.Sequential(
        [keras.Input((64,)), layers.Dense(32)], name="projector"
    )
    optimizer = keras.optimizers.Adam(1e-3)
    loop = loopscope.Loop(encoder, gear=gear, seed=0)

    @loop.train_step
    def train_step(pictures):
        views = augmenter(pictures, training=True), augmenter(pictures, training=True)
        variables = encoder.trainable_variables + projector.trainable_variables

        def compute_loss():
            one, other = (projector(encoder(v, training=True)) for v in views)
            return nt_xent(one, other)

        (loss, found), gradients = loopscope.value_and_grad(
            compute_loss, variables, has_aux=True
        )
        optimizer.apply(gradients, variables)
        return {"loss": loss, "found": found}

    return loopscope.Experiment(
        loop, x=x[:examples, :, :, None], batch_size=batch_size, epochs=epochs
    )


def probe(loop, labels=1000):
    """How many test digits a linear map of the features gets right, from few labels."""
    (x, y), (x_test, y_test) = loopscope.datasets.mnist()

    def features(pictures):
        found = loop.predict(pictures[..., None] / 255.0, batch_size=500, verbose=0)
        return np.pad(found, ((0, 0), (0, 1)), constant_values=1.0).astype("float64")

    known = features(x[50_000 : 50_000 + labels])
    targets = np.eye(10)[y[50_000 : 50_000 + labels]]
    scale = np.trace(known.T @ known) / known.shape[1]
    square = known.T @ known + 1e-3 * scale * np.eye(known.shape[1])
    weights = np.linalg.solve(square, known.T @ targets)
    return float(np.mean((features(x_test) @ weights).argmax(-1) == y_test))


def main():
    """Train, and ask after each epoch what the features know."""
    made = experiment()
    print(f"untrained: {probe(made.loop):.4f} of the test digits")
    for epoch in made.loop.epochs(made.arguments["epochs"]):
        for step in epoch.train(made.train_source(), every=100):
            print(f"step {step.number:5d}  loss {step.loss:.4f}")
        print(
            f"epoch {epoch.index + 1}: {epoch.seconds:.1f} s, partner found "
            f"{epoch.metrics['found']:.4f}, probe {probe(made.loop):.4f}"
        )


if __name__ == "__main__":
    main()
