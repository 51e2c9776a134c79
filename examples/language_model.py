"""A language model: a small transformer writes Python's manual, letter by letter.

What it shows: a model of Keras's layers with causal attention, a target at each place
of a text, and a callback that lets the model write at the end of each epoch, while it
trains. The text is `pydoc_data.topics`, which comes with Python. What the callback
draws depends on the epoch only, so a run that was killed goes on to write the same.

    python language_model.py
    loopscope train language_model.py:experiment
"""

from pydoc_data.topics import topics

import keras
import numpy as np
from keras import layers

import loopscope

LENGTH = 64
"""How many characters the model sees at once."""


class Positions(layers.Layer):
    """Adds a learnt vector for each place."""

    def build(self, shape):
        """One row a place."""
        self.rows = self.add_weight(shape=shape[1:], initializer="normal", name="rows")

    def call(self, inputs):
        """Shape `(B, LENGTH, D)`, in and out."""
        return inputs + self.rows


def block(inputs, width, heads, number):
    """Attention to what came before, then a perceptron at each place."""
    normal = layers.LayerNormalization(name=f"norm_{number}a")(inputs)
    attend = layers.MultiHeadAttention(
        # Softmax takes the bias of a key away: it would be trained on noise.
        heads,
        width // heads,
        use_bias=False,
        name=f"attend_{number}",
    )
    inputs = inputs + attend(normal, normal, use_causal_mask=True)
    normal = layers.LayerNormalization(name=f"norm_{number}b")(inputs)
    hidden = layers.Dense(4 * width, activation="gelu", name=f"wide_{number}")(normal)
    return inputs + layers.Dense(width, name=f"narrow_{number}")(hidden)


def build_model(characters, width=64, heads=4, blocks=2):
    """From characters to logits of the next one, at each place."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    hidden = layers.Embedding(characters, width, name="embed")(tokens)
    hidden = Positions(name="positions")(hidden)
    for number in range(blocks):
        hidden = block(hidden, width, heads, number)
    hidden = layers.LayerNormalization(name="norm")(hidden)
    return keras.Model(tokens, layers.Dense(characters, name="next")(hidden))


class Text:
    """A text as numbers, one a character."""

    def __init__(self, text):
        self.alphabet = np.array(sorted(set(text)))
        self.numbers = np.searchsorted(self.alphabet, np.array(list(text)))

    def windows(self, every):
        """Windows that begin `every` characters apart, and the same one place on."""
        cut = np.lib.stride_tricks.sliding_window_view(self.numbers, LENGTH + 1)[
            ::every
        ]
        return cut[:, :-1].astype("int32"), cut[:, 1:].astype("int32")

    def read(self, numbers):
        """Numbers as text again."""
        return "".join(self.alphabet[numbers])


class Write(keras.callbacks.Callback):
    """Lets the model go on with a text, at the end of each epoch."""

    def __init__(self, loop, text, length):
        super().__init__()
        self.loop, self.text, self.length = loop, text, length
        self.written = []

    def on_epoch_end(self, epoch, logs=None):
        """Draw one character after the other, the likely ones more often."""
        draw = np.random.default_rng(epoch)
        numbers = list(self.text.numbers[:LENGTH])
        for _ in range(self.length):
            seen = np.array([numbers[-LENGTH:]], "int32")
            logits = self.loop.predict(seen, verbose=0)[0, -1].astype("float64") / 0.7
            chances = np.exp(logits - logits.max())
            numbers.append(draw.choice(len(chances), p=chances / chances.sum()))
        self.written.append(self.text.read(numbers[LENGTH:]))


def experiment(epochs=4, examples=250_000, write=200, blocks=2, gear="auto"):
    """The training.

    Args:
        epochs: Passes over the text.
        examples: How many characters of the text are trained on.
        write: How many characters the model writes after an epoch.
        blocks: How many blocks the model has.
        gear: As in `loopscope.Loop`.
    """
    keras.utils.set_random_seed(0)
    text = Text("\n".join(topics[name] for name in sorted(topics)))
    x, y = text.windows(every=LENGTH // 2)
    cut = 2 * examples // LENGTH
    loop = loopscope.Loop(
        build_model(len(text.alphabet), blocks=blocks),
        optimizer=keras.optimizers.AdamW(2e-3, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        gear=gear,
        seed=0,
    )
    return loopscope.Experiment(
        loop,
        x=x[:cut],
        y=y[:cut],
        batch_size=32,
        epochs=epochs,
        # The end of the text, which no window of the training reaches into.
        validation_data=(x[-1000:], y[-1000:]),
        callbacks=[Write(loop, text, write)],
    )


def main():
    """Train, and print what it writes."""
    made = experiment()
    (write,) = made.arguments["callbacks"]
    logs = made.fit(verbose=2).history
    for epoch, written in enumerate(write.written):
        bits = logs["val_loss"][epoch] / np.log(2)
        print(f"\n-- epoch {epoch + 1}: {bits:.2f} bits a character\n{written}")


if __name__ == "__main__":
    main()
