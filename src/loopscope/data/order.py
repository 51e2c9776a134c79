"""The order in which an epoch visits its examples.

A function of (seed, epoch) alone: any position of any epoch can be computed
without replaying the ones before it.
"""

from __future__ import annotations

import numpy as np


def permutation(size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The row numbers 0 to `size - 1`, shuffled; int32 of shape `(size,)`.

    Philox is counter-based: the epoch is put into the counter's upper words, so
    the epochs' streams do not overlap. About 10 ns per row.
    """
    bits = np.random.Philox(key=seed, counter=epoch << 64)
    return np.random.Generator(bits).permutation(size).astype(np.int32)
