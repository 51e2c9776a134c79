"""An own step that TensorFlow cannot trace to its end runs eagerly, as if untried."""

import keras
import numpy as np
import pytest

from models import BATCH, TENSORFLOW, blobs, fresh, small_loop, warned

pytestmark = pytest.mark.skipif(
    not TENSORFLOW, reason="on JAX nothing is left of a trace that fails"
)

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.3),
    "averaged": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


def reads_its_loss(loop, optimizer):
    """What many a loop does at its end, when everything has been made."""
    import tensorflow as tf

    model = loop.model

    @loop.train_step
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_weights
        gradients = tape.gradient(scaled, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss.numpy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_failed_trace_has_made_has_its_first_values(name):
    x, y = blobs(rows=BATCH * 6)
    ends = []
    for gear in ("eager", "auto"):
        loop = fresh(small_loop, gear)
        optimizer = OPTIMIZERS[name]()
        reads_its_loss(loop, optimizer)
        arguments = {"batch_size": BATCH, "epochs": 2, "verbose": 0}
        if gear == "auto":
            with warned("the step cannot be traced"):
                history = loop.fit(x, y, **arguments).history
        else:
            history = loop.fit(x, y, **arguments).history
        assert loop.gear.name == "eager"
        slots = [np.asarray(v) for v in optimizer.variables]
        ends.append((history["loss"], slots))
    (losses, slots), (losses_auto, slots_auto) = ends
    assert losses_auto == losses
    assert len(slots_auto) == len(slots) > 2
    assert all(map(np.array_equal, slots, slots_auto))
