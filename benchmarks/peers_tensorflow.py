"""What a TensorFlow user could train with instead, each written at its best.

The tutorial's loop, eager and as a `tf.function`; Keras's `fit`; and the fastest
loop that could be written by hand: a whole epoch in one compiled function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from peer import KerasFit, Peer
from workloads import Training, Workload


class TutorialLoop:
    """The tutorial's loop: `for step, (x, y) in enumerate(dataset)`.

    Args:
        workload: What to train.
        function: Whether the step is a `tf.function`.
        jit_compile: Whether XLA compiles it.
        prefetch: Whether the dataset prepares batches ahead, as the tutorial's
            does not.
        steps: Stop an epoch after so many.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        function: bool,
        jit_compile: bool = False,
        prefetch: bool = False,
        steps: int | None = None,
    ) -> None:
        self._training = training = Training(workload)
        self.steps = steps or workload.steps
        model, optimizer = training.model, training.optimizer

        def train_step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                loss_value = training.loss(y, logits)
            grads = tape.gradient(loss_value, model.trainable_weights)
            optimizer.apply_gradients(zip(grads, model.trainable_weights, strict=True))
            training.metric.update_state(y, logits)
            return loss_value

        self._step = train_step
        if function:
            self._step = tf.function(train_step, jit_compile=jit_compile or None)
        data = tf.data.Dataset.from_tensor_slices(workload.data)
        data = data.shuffle(1024).batch(workload.batch_size)
        data = data.prefetch(2) if prefetch else data
        self._data = data.with_options(_without_autotune())

    def first_loss(self) -> float:
        self.restore()
        x, y = self._training.workload.first_batch
        return float(self._step(tf.constant(x), tf.constant(y)))

    def epoch(self) -> float:
        self._training.metric.reset_state()
        losses = []
        for step, (x, y) in enumerate(self._data.take(self.steps)):
            losses.append(self._step(x, y))
            if step % 200 == 0:  # The tutorial prints the loss here.
                float(losses[-1])
        float(self._training.metric.result())
        return float(np.mean([float(loss) for loss in losses]))

    def restore(self) -> None:
        self._training.restore()

    def about(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to stop."""


class WholeEpoch:
    """A whole epoch in one `tf.function`, batches gathered from tensors.

    Args:
        workload: What to train.
        jit_compile: Whether XLA compiles it.
        keras_objects: Whether model, loss, optimizer and metric are Keras's; if
            not, the step is written in TensorFlow's own operations (MLP only).
    """

    def __init__(
        self, workload: Workload, *, jit_compile: bool, keras_objects: bool = True
    ) -> None:
        self.steps = workload.steps
        self._workload = workload
        self._step = _KerasStep(workload) if keras_objects else _RawStep(workload)
        self._x, self._y = (tf.constant(array) for array in workload.data)
        self._order = np.random.default_rng(0)

        def run(order: Any, first: Any, last: Any, size: int) -> Any:
            step, total = first, tf.constant(0.0)
            while step < last:
                rows = tf.slice(order, [step * size], [size])
                total += self._step(tf.gather(self._x, rows), tf.gather(self._y, rows))
                step += 1
            return total

        self._run = tf.function(run, jit_compile=jit_compile or None)

    def first_loss(self) -> float:
        self.restore()
        rows = tf.range(len(self._x), dtype=tf.int32)
        return float(self._call(rows, 0, 1, self._workload.batch_size))

    def epoch(self) -> float:
        self._step.reset_metric()
        count, size = len(self._x), self._workload.batch_size
        rows = tf.constant(self._order.permutation(count).astype("int32"))
        steps, rest = divmod(count, size)
        total = self._call(rows, 0, steps, size)
        if rest:
            total += self._call(rows[-rest:], 0, 1, rest)
        return float(total) / self.steps

    def _call(self, rows: Any, first: int, last: int, size: int) -> Any:
        return self._run(rows, tf.constant(first), tf.constant(last), size)

    def restore(self) -> None:
        self._step.restore()

    def about(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to stop."""


class _KerasStep:
    def __init__(self, workload: Workload) -> None:
        self._training = Training(workload)
        self.restore = self._training.restore
        self.reset_metric = self._training.metric.reset_state

    def __call__(self, x: Any, y: Any) -> Any:
        training = self._training
        with tf.GradientTape() as tape:
            logits = training.model(x, training=True)
            loss = training.loss(y, logits)
        variables = training.model.trainable_variables
        training.optimizer.apply(tape.gradient(loss, variables), variables)
        training.metric.update_state(y, logits)
        return loss


class _RawStep:
    """The MLP's step and RMSprop in TensorFlow's own operations."""

    def __init__(self, workload: Workload) -> None:
        weights = Training(workload).model.get_weights()
        self._initial = weights
        self._weights = [tf.Variable(w) for w in weights]
        self._squares = [tf.Variable(tf.zeros_like(w)) for w in weights]
        self._hits = tf.Variable(0.0)

    def __call__(self, x: Any, y: Any) -> Any:
        w1, b1, w2, b2, w3, b3 = self._weights
        labels = tf.cast(y, tf.int32)
        with tf.GradientTape() as tape:
            hidden = tf.nn.relu(tf.cast(x, tf.float32) @ w1 + b1)
            hidden = tf.nn.relu(hidden @ w2 + b2)
            logits = hidden @ w3 + b3
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            )
        grads = tape.gradient(loss, self._weights)
        for w, square, grad in zip(self._weights, self._squares, grads, strict=True):
            square.assign(0.9 * square + 0.1 * tf.square(grad))
            w.assign_sub(1e-3 * grad / tf.sqrt(square + 1e-7))
        right = tf.argmax(logits, 1, tf.int32) == labels
        self._hits.assign_add(tf.reduce_sum(tf.cast(right, tf.float32)))
        return loss

    def reset_metric(self) -> None:
        self._hits.assign(0.0)

    def restore(self) -> None:
        for weight, initial in zip(self._weights, self._initial, strict=True):
            weight.assign(initial)
        for square in self._squares:
            square.assign(tf.zeros_like(square))


def _without_autotune() -> Any:
    """No autotuning: there is nothing to tune here, and it costs a pause.

    The end of an epoch waits for its thread, which sleeps for 10 ms, 20 ms, 40 ms and
    so on (TensorFlow 2.21): epochs of 1.6 s took 2.55 s. A `fit` that is held between
    rounds would wait for up to a minute, through no fault of its own.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def shuffled_batches(workload: Workload) -> Any:
    """What Keras makes of arrays in `fit`, and as fast; without autotuning."""
    x, y = (tf.constant(array) for array in workload.data)
    order = tf.data.Dataset.range(1).map(
        lambda _: tf.random.shuffle(tf.range(len(x), dtype=tf.int32))
    )
    rows = order.flat_map(
        lambda o: tf.data.Dataset.from_tensor_slices(o).batch(workload.batch_size)
    )
    batches = rows.map(lambda r: (tf.gather(x, r), tf.gather(y, r))).prefetch(2)
    batches = batches.apply(tf.data.experimental.assert_cardinality(workload.steps))
    return batches.with_options(_without_autotune())


def _fit_settings(workload: Workload) -> list[tuple[int, Any]]:
    whole = workload.steps
    if workload.name == "mlp":
        return [(whole, "auto"), (20, True)]
    if workload.name == "dropout":
        return [(20, "auto"), (whole, "auto"), (1, True)]
    return [(4, "auto"), (whole, "auto"), (1, True)]


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "eager loop": lambda w: TutorialLoop(w, function=False, steps=w.eager_steps),
    "tf.function loop": lambda w: TutorialLoop(w, function=True),
    "tf.function loop, XLA, prefetch": lambda w: TutorialLoop(
        w, function=True, jit_compile=True, prefetch=True
    ),
    "keras.fit": lambda w: KerasFit(w, [(1, "auto")], dataset=shuffled_batches),
    "keras.fit, best setting": lambda w: KerasFit(
        w, _fit_settings(w), dataset=shuffled_batches
    ),
    "whole epoch by hand": lambda w: WholeEpoch(w, jit_compile=w.name == "mlp"),
}
"""For every workload."""

MLP_PEERS: dict[str, Callable[[Workload], Peer]] = {
    "whole epoch by hand, TensorFlow operations only": lambda w: WholeEpoch(
        w, jit_compile=True, keras_objects=False
    ),
}
"""For the MLP only."""
