"""What a JAX user could train with instead, each written at its best.

Keras's `fit`, and loops by hand: one `jit` call a step, and `lax.scan` over the
whole epoch. The data lie on the device in both. The MLP by hand is pure JAX; the
other models go through Keras's stateless calls, as Keras's guides show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peer import KerasFit, Peer
from workloads import Training, Workload

State = Any
"""A tree of arrays: all that a step reads and writes."""

Step = Callable[[State, Any, Any], tuple[State, Any]]


class ByHand:
    """A loop by hand around a pure step.

    Args:
        workload: What to train.
        scan: One `lax.scan` over the epoch, or one `jit` call a step.
    """

    def __init__(self, workload: Workload, *, scan: bool) -> None:
        self.steps = workload.steps
        self._workload, self._scan = workload, scan
        step, self._initial = (_mlp if workload.name == "mlp" else _keras)(workload)
        self._x, self._y = (jnp.array(array) for array in workload.data)
        self._order = np.random.default_rng(0)

        def one(state: State, x: Any, y: Any, rows: Any) -> tuple[State, Any]:
            # Row numbers are known to be in range: no clamping.
            batch = (a.at[rows].get(mode="promise_in_bounds") for a in (x, y))
            return step(state, *batch)

        def many(state: State, x: Any, y: Any, rows: Any) -> tuple[State, Any]:
            return jax.lax.scan(lambda s, r: one(s, x, y, r), state, rows)

        self._one = jax.jit(one, donate_argnums=0)
        self._many = jax.jit(many, donate_argnums=0)
        self.restore()

    def first_loss(self) -> float:
        self.restore()
        rows = jnp.arange(self._workload.batch_size)
        self._state, loss = self._one(self._state, self._x, self._y, rows)
        return float(loss)

    def epoch(self) -> float:
        self._state["hits"] = jnp.zeros_like(self._state["hits"])
        count, size = len(self._x), self._workload.batch_size
        rows = self._order.permutation(count).astype("int32")
        steps, rest = divmod(count, size)
        batches = rows[: steps * size].reshape(steps, size)
        if self._scan:
            self._state, losses = self._many(self._state, self._x, self._y, batches)
            losses = [losses]
        else:
            losses = []
            for batch in batches:
                self._state, loss = self._one(self._state, self._x, self._y, batch)
                losses.append(loss)
        if rest:
            tail = rows[-rest:]
            self._state, loss = self._one(self._state, self._x, self._y, tail)
            losses.append(loss)
        return float(np.concatenate([np.ravel(loss) for loss in losses]).mean())

    def restore(self) -> None:
        self._state = jax.tree.map(jnp.array, self._initial)

    def about(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to stop."""


def _mlp(workload: Workload) -> tuple[Step, State]:
    """The MLP, its loss, RMSprop and the accuracy in pure JAX."""

    def loss_of(weights: Any, x: Any, y: Any) -> tuple[Any, Any]:
        (w1, b1), (w2, b2), (w3, b3) = weights
        hidden = jax.nn.relu(x.astype(jnp.float32) @ w1 + b1)
        hidden = jax.nn.relu(hidden @ w2 + b2)
        logits = hidden @ w3 + b3
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        return -chosen.mean(), logits

    def step(state: State, x: Any, y: Any) -> tuple[State, Any]:
        y = y.astype(jnp.int32)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, logits), grads = value_and_grad(state["weights"], x, y)
        squares = jax.tree.map(
            lambda s, g: 0.9 * s + 0.1 * g * g, state["squares"], grads
        )
        weights = jax.tree.map(
            lambda w, s, g: w - 1e-3 * g / jnp.sqrt(s + 1e-7),
            state["weights"],
            squares,
            grads,
        )
        hits = state["hits"] + (logits.argmax(-1) == y).sum()
        return {"weights": weights, "squares": squares, "hits": hits}, loss

    flat = Training(workload).model.get_weights()
    weights = [(flat[i], flat[i + 1]) for i in (0, 2, 4)]
    squares = jax.tree.map(np.zeros_like, weights)
    return step, {"weights": weights, "squares": squares, "hits": np.int32(0)}


def _keras(workload: Workload) -> tuple[Step, State]:
    """Any model through `stateless_call` and `stateless_apply`."""
    training = Training(workload)
    model, optimizer = training.model, training.optimizer

    def loss_of(trainable: Any, rest: Any, x: Any, y: Any) -> tuple[Any, Any]:
        logits, rest = model.stateless_call(trainable, rest, x, training=True)
        return training.loss(y, logits), (logits, rest)

    def step(state: State, x: Any, y: Any) -> tuple[State, Any]:
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (logits, rest)), grads = value_and_grad(
            state["trainable"], state["rest"], x, y
        )
        trainable, slots = optimizer.stateless_apply(
            state["slots"], grads, state["trainable"]
        )
        hits = state["hits"] + (logits.argmax(-1) == y).sum()
        return (
            {"trainable": trainable, "rest": rest, "slots": slots, "hits": hits},
            loss,
        )

    return step, {
        "trainable": [np.array(v.value) for v in model.trainable_variables],
        "rest": [np.array(v.value) for v in model.non_trainable_variables],
        "slots": [np.array(v.value) for v in optimizer.variables],
        "hits": np.int32(0),
    }


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "keras.fit": lambda w: KerasFit(w, [(1, "auto")]),
    "keras.fit, best setting": lambda w: KerasFit(w, [(5, "auto"), (20, "auto")]),
    "jit by hand": lambda w: ByHand(w, scan=False),
    "lax.scan by hand": lambda w: ByHand(w, scan=True),
}
"""For every workload."""
