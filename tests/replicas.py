"""Trains on one device and on two replicas; run in a process of its own.

TensorFlow divides a CPU into logical devices before anything else is done with it.
"""

import json
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf

REPLICAS = 2
(CPU,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    CPU, [tf.config.LogicalDeviceConfiguration()] * REPLICAS
)
STRATEGY = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])

import models  # noqa: E402
import replicas_cases as cases  # noqa: E402
from models import BATCH, apart, blobs, fresh  # noqa: E402


def divided(make):
    """The same loop, made for the replicas."""

    def under(gear, **options):
        with STRATEGY.scope():
            return make(gear, **options)

    return under


def both(make, gear, *data, **options):
    """Histories and states: on one device, and on the replicas."""
    found = []
    for way in (make, divided(make)):
        loop = fresh(way, gear)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
        history = loop.fit(*data, **options).history
        found.append((history, loop.state.numpy(), loop))
    return found


def agrees(name, gear):
    """Two steps, the second one of five rows: one replica has two, the other three."""
    build = cases.OWN.get(name) or getattr(models, name)
    make, data = build()
    rows = keras.tree.map_structure(
        lambda a: np.concatenate([a] * 2)[: BATCH + 5], data
    )
    return apart(*both(make, gear, *rows))


def copies(gear):
    """After training, every replica has the same bits, BatchNorm's statistics too."""
    make, data = models.convnet_with_batchnorm()
    _, (_, _, loop) = both(make, gear, *data)
    variables = [*loop.model.variables, *loop.model.optimizer.variables]
    native = [v.value for v in variables]
    return {
        "copies": min(len(v.values) for v in native),
        "alike": all(
            np.array_equal(v.values[0].numpy(), other.numpy())
            for v in native
            for other in v.values[1:]
        ),
    }


def uses(gear):
    """Validation, prediction and a batch with fewer rows than replicas."""
    make = models.small_loop
    x, y = blobs(2 * BATCH + 1)
    options = {"validation_data": blobs(13, seed=8)}
    found = both(make, gear, x, y, **options)
    loops = [loop for _, _, loop in found]
    predicted = [loop.predict(x, batch_size=5, verbose=0) for loop in loops]
    return {
        **apart(*found),
        "predicted": float(models.relative(*predicted)),
        "order": [bool(len(p) == len(x)) for p in predicted],
    }


def resumed(gear):
    """A run left in the middle of an epoch, and one that was not: do they end alike?"""
    return {"ends": models.left_and_not(divided(models.mixed_loop), gear, blobs(45))}


def refusals():
    """What is refused, each with its message."""
    x, y = blobs(BATCH)
    said = []
    for gear, options in (("xla", {}), ("fused-xla", {}), ("graph", {"watch": 10})):
        loop = fresh(divided(models.small_loop), gear, **options)
        try:
            loop.fit(x, y, batch_size=BATCH, verbose=0)
        except ValueError as error:
            said.append(str(error))
    return said


def adopted(gear):
    """A model that was made for one device, and is given to the replicas."""
    ends = []
    x, y = blobs(3 * BATCH + 5)
    for make, options in ((divided(models.mixed_loop), {}), (models.mixed_loop, GIVEN)):
        loop = fresh(make, gear, **options)
        loop.fit(x, y, batch_size=BATCH, epochs=2, verbose=0)
        values = [v.value for v in loop.model.optimizer.variables]
        assert all(len(v.values) == REPLICAS for v in values)
        ends.append(loop.state.sha256())
    return ends


GIVEN = {"strategy": STRATEGY}


def with_loss(loss_of):
    """A loop whose own step differentiates this loss."""

    def make(gear):
        loop = models.small_loop(gear)
        model, optimizer = loop.model, loop.model.optimizer

        @loop.train_step
        def train_step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            grads = tape.gradient(loss, model.trainable_weights)
            pairs = zip(grads, model.trainable_weights, strict=True)
            optimizer.apply_gradients(pairs)
            return loss

        return loop

    return make


def examined():
    """What the doctor says of a loss that is scaled, and of one that is not."""
    scaled = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = blobs(2 * BATCH)
    said = []
    for loss_of in (scaled, unscaled):
        loop = fresh(divided(with_loss(loss_of)), "graph")
        before = loop.state.numpy()
        found = loop.doctor(x, y, batch_size=BATCH, checks=["replicas"])
        said.append([f.measured["factor"] for f in found.findings])
        after = loop.state.numpy()
        assert all(np.array_equal(after[path], before[path]) for path in before)
    return said


def unscaled(y, logits):
    return tf.reduce_mean(
        keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
    )


def messages():
    """How often a replica asks for a sum in a step of `fit`, metrics and all."""
    asked, real = [], tf.distribute.ReplicaContext.all_reduce

    def counted(context, *rest, **named):
        if tf.executing_eagerly():  # Not while the step is traced.
            asked.append(context)
        return real(context, *rest, **named)

    x, y = blobs(3 * BATCH)
    loop = fresh(divided(models.small_loop), "eager")
    tf.distribute.ReplicaContext.all_reduce = counted
    try:
        loop.fit(x, y, batch_size=BATCH, verbose=0)
    finally:
        tf.distribute.ReplicaContext.all_reduce = real
    return len(asked) / (loop.step * STRATEGY.num_replicas_in_sync)


def chosen():
    """The gear that `auto` takes for a long training."""
    x, y = blobs(BATCH)
    loop = fresh(divided(models.small_loop), "auto", cache=False)
    source = loop.source(x, y, batch_size=BATCH)
    return loop.prepare("train", source, epochs_left=100_000).name


def quick():
    """What the quick suite asks, in one process."""
    gear = "fused-graph"
    return {
        "agrees": {name: agrees(name, gear) for name in ("with_tape", "clipped")},
        "uses": uses(gear),
        "refusals": refusals(),
        "examined": examined(),
        "messages": messages(),
        "adopted": adopted(gear),
    }


def slow():
    """What the slow suite asks besides, in one process."""
    gear = "fused-graph"
    return {
        "agrees": {name: agrees(name, gear) for name in ("subclassed", "synchronized")},
        "copies": copies(gear),
        "resumed": resumed(gear),
        "chosen": chosen(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *arguments = sys.argv[1:]
    print(json.dumps(globals()[what](*arguments)))
