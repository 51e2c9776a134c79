"""Steps that several devices have to divide with care, each with its data."""

import keras
import tensorflow as tf

import models
from models import BATCH, blobs, clipped


def synchronized():
    """A BatchNorm that exchanges its statistics."""
    make, data = models.convnet_with_batchnorm()

    def under(gear, **options):
        real = keras.layers.BatchNormalization

        class Exchanging(real):
            def __init__(self, **named):
                super().__init__(synchronized=True, **named)

        keras.layers.BatchNormalization = Exchanging
        try:
            return make(gear, **options)
        finally:
            keras.layers.BatchNormalization = real

    return under, data


def with_tape():
    """The tutorial's own step, with a loss of Keras."""

    def make(gear, **options):
        loop = models.small_loop(gear, **options)
        model, optimizer = loop.model, loop.model.optimizer
        loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        seen = keras.metrics.SparseCategoricalAccuracy(name="seen")

        @loop.train_step
        def train_step(x, y):
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                loss = loss_fn(y, logits)
            grads = tape.gradient(loss, model.trainable_weights)
            pairs = zip(grads, model.trainable_weights, strict=True)
            optimizer.apply_gradients(pairs)
            seen.update_state(y, logits)
            return loss

        return loop

    return make, blobs(BATCH)


OWN = {"synchronized": synchronized, "with_tape": with_tape, "clipped": clipped}
