"""Transfer learning: what was learnt from the digits 0 to 4 helps with 5 to 9.

What it shows: a training in stages, each a loop of its own over the same layers. First
a convnet learns 0 to 4, of which there are many examples. Its lower part, the backbone,
is frozen, and a new head learns 5 to 9 from a few hundred examples. Then the backbone
is let go as well. Freezing is Keras's `trainable`, set before a `Loop` is made, since
that also says what the optimizer keeps; so each stage can be a run of its own, which is
recorded, resumed and rewound.

    python transfer_learning.py
    loopscope train transfer_learning.py:experiment
    loopscope train transfer_learning.py:fine_tuning
"""

import keras
from keras import layers

import loopscope


def build_backbone():
    """From a picture to 64 features of it."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(16, 5, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
        ],
        name="backbone",
    )


def with_head(backbone, name):
    """The backbone and five classes."""
    head = layers.Dense(5, name=name)
    return keras.Sequential([keras.Input((28, 28, 1)), backbone, head])


def loop_of(model, rate, gear):
    """A loop over what is trainable in the model now."""
    return loopscope.Loop(
        model,
        optimizer=keras.optimizers.Adam(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        gear=gear,
        seed=0,
    )


def digits(first):
    """MNIST's pictures of five digits from `first` on, numbered from 0."""
    for x, y in loopscope.datasets.mnist():
        chosen = (y >= first) & (y < first + 5)
        yield x[chosen][..., None], y[chosen] - first


def pretrained(examples, gear):
    """A backbone that has learnt to tell 0 to 4 apart."""
    (x, y), _ = digits(0)
    backbone = build_backbone()
    loop = loop_of(with_head(backbone, "zero_to_four"), 1e-3, gear)
    loop.fit(x[:examples], y[:examples], batch_size=64, epochs=2, verbose=0)
    return backbone


def stage(model, rate, epochs, few, gear):
    """One stage on the digits 5 to 9."""
    (x, y), (x_test, y_test) = digits(5)
    return loopscope.Experiment(
        loop_of(model, rate, gear),
        x=x[:few],
        y=y[:few],
        batch_size=32,
        epochs=epochs,
        validation_data=(x_test, y_test),
        validation_batch_size=500,
    )


def experiment(epochs=20, few=300, examples=30_000, gear="auto"):
    """A new head on a frozen backbone.

    Args:
        epochs: Passes over the few examples.
        few: How many examples of 5 to 9 there are.
        examples: How many examples of 0 to 4 the backbone has learnt from.
        gear: As in `loopscope.Loop`, of all stages.
    """
    keras.utils.set_random_seed(0)
    backbone = pretrained(examples, gear)
    backbone.trainable = False
    return stage(with_head(backbone, "five_to_nine"), 3e-3, epochs, few, gear)


def fine_tuning(epochs=20, few=300, examples=30_000, gear="auto", frozen=None):
    """The head and the backbone, after `experiment`.

    Args:
        epochs: Passes over the few examples.
        few: As in `experiment`.
        examples: As in `experiment`.
        gear: As in `experiment`.
        frozen: What `experiment` has made, trained already; `None`: it comes first.
    """
    if frozen is None:
        frozen = experiment(few=few, examples=examples, gear=gear)
        frozen.fit(verbose=0)
    model = frozen.loop.model
    model.get_layer("backbone").trainable = True
    return stage(model, 3e-4, epochs, few, gear)


def main():
    """The stages, and beside them a convnet that has seen the few examples only."""
    scratch = stage(with_head(build_backbone(), "five_to_nine"), 1e-3, 40, 300, "auto")
    logs = scratch.fit(verbose=0).history
    print(f"from scratch, 300 examples: accuracy {logs['val_accuracy'][-1]:.4f}")
    made = experiment()
    logs = made.fit(verbose=0).history
    print(f"new head, frozen backbone:  accuracy {logs['val_accuracy'][-1]:.4f}")
    logs = fine_tuning(frozen=made).fit(verbose=0).history
    print(f"backbone let go as well:    accuracy {logs['val_accuracy'][-1]:.4f}")


if __name__ == "__main__":
    main()
