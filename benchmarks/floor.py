"""The floor: only the matrix products of the MLP's epoch.

Forward x@w1, h@w2, h@w3; backward the three weight gradients and the two input
gradients that are needed (none for the pixels). No bias, no activation, no loss, no
optimizer, no metric, no conversion of pixels, and batches that stay in the cache:
nothing that trains this model with these products can be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peer import Peer
from workloads import Workload

RING = 8
"""Distinct batches, taken in turn: few enough to stay in the cache."""


class _Floor:
    def __init__(self, workload: Workload) -> None:
        self.steps = workload.steps
        x, _ = workload.data
        size = workload.batch_size
        pixels = x[: RING * size].reshape(RING, size, -1) / 255
        self.batches = np.ascontiguousarray(pixels, "float32")
        random = np.random.default_rng(0)
        self.weights = [
            random.uniform(-0.1, 0.1, shape).astype("float32")
            for shape in ((784, 64), (64, 64), (64, 10))
        ]

    def first_loss(self) -> None:
        self.epoch()

    def epoch(self) -> None:
        raise NotImplementedError

    def restore(self) -> None:
        """Nothing is trained."""

    def about(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to stop."""


class NumpyFloor(_Floor):
    """In NumPy's BLAS; how many threads is set by the process (see run.py)."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        size = workload.batch_size
        self._wide = [np.empty((size, n), "float32") for n in (64, 64, 10, 64, 64)]
        self._grads = [np.empty_like(w) for w in self.weights]

    def epoch(self) -> None:
        (w1, w2, w3), (g1, g2, g3) = self.weights, self._grads
        h1, h2, h3, d2, d1 = self._wide
        product = np.matmul
        for step in range(self.steps):
            x = self.batches[step % RING]
            product(x, w1, out=h1)
            product(h1, w2, out=h2)
            product(h2, w3, out=h3)
            product(h2.T, h3, out=g3)
            product(h3, w3.T, out=d2)
            product(h1.T, d2, out=g2)
            product(d2, w2.T, out=d1)
            product(x.T, d1, out=g1)


class XlaFloor(_Floor):
    """As one XLA program: a loop over the steps, the gradients carried along."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        import jax
        import jax.numpy as jnp

        def run(batches: Any, weights: Any) -> Any:
            w1, w2, w3 = weights

            def body(step: Any, _: Any) -> Any:
                x = jax.lax.dynamic_index_in_dim(batches, step % RING, keepdims=False)
                h1 = x @ w1
                h2 = h1 @ w2
                h3 = h2 @ w3
                d2 = h3 @ w3.T
                d1 = d2 @ w2.T
                return [x.T @ d1, h1.T @ d2, h2.T @ h3]

            grads = [jnp.zeros_like(w) for w in weights]
            return jax.lax.fori_loop(0, self.steps, body, grads)

        self._run = jax.jit(run)
        self._arguments = jnp.array(self.batches), [jnp.array(w) for w in self.weights]

    def epoch(self) -> None:
        for grad in self._run(*self._arguments):
            grad.block_until_ready()


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "floor, NumPy": NumpyFloor,
    "floor, XLA": XlaFloor,
}
