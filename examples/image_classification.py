"""Image classification: a small convnet that sees every digit a little shifted.

What it shows: the built-in step, with layers that draw random numbers. The augmenting
layers are part of the model, so they run inside of the compiled step; their seeds are
part of the state, so a run that was killed goes on to the same pictures. Validation
sees the pictures as they are. The outer loop is `fit`, or one's own: see `main`.

    python image_classification.py
    loopscope train image_classification.py:experiment
"""

import keras
from keras import layers

import loopscope


def build_model():
    """Some 52,000 weights; the first layers only change the pictures."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.RandomTranslation(0.08, 0.08, fill_mode="constant", seed=1),
            layers.Conv2D(16, 5, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3, seed=2),
            layers.Dense(48, activation="relu"),
            layers.Dense(10),
        ],
        name="classifier",
    )


def experiment(epochs=4, examples=50_000, gear="auto"):
    """The training, with a learning rate that falls to nothing along a cosine.

    Args:
        epochs: Passes over the data.
        examples: How many of MNIST's first 50,000 are trained on.
        gear: As in `loopscope.Loop`.
    """
    keras.utils.set_random_seed(0)
    (x, y), _ = loopscope.datasets.mnist()
    batch_size = 64
    rate = keras.optimizers.schedules.CosineDecay(
        2e-3, decay_steps=epochs * -(-examples // batch_size)
    )
    loop = loopscope.Loop(
        build_model(),
        optimizer=keras.optimizers.Adam(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        gear=gear,
        seed=0,
    )
    return loopscope.Experiment(
        loop,
        x=x[:examples, :, :, None],
        y=y[:examples],
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x[50_000:, :, :, None], y[50_000:]),
        validation_batch_size=500,
    )


def main():
    """Train in an outer loop of one's own, and look at the digits kept for the end."""
    made = experiment()
    loop, validation = made.loop, made.arguments["validation_data"]
    train = made.train_source()
    for epoch in loop.epochs(made.arguments["epochs"]):
        for step in epoch.train(train, every=200):
            print(f"step {step.number:5d}  loss {step.loss:.4f}")
        epoch.validate(validation, batch_size=500)
        print(
            f"epoch {epoch.index + 1}: accuracy {epoch.metrics['accuracy']:.4f}, "
            f"validation {epoch.metrics['val_accuracy']:.4f}, {epoch.seconds:.1f} s"
        )
    _, (x_test, y_test) = loopscope.datasets.mnist()
    found = loop.evaluate(
        x_test[..., None], y_test, batch_size=500, verbose=0, return_dict=True
    )
    print(f"test accuracy {found['accuracy']:.4f} in gear {loop.gear.name}")


if __name__ == "__main__":
    main()
