"""An array in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 20
"""Of a histogram."""


@dataclass(frozen=True)
class Stats:
    """What an array holds. Numbers are those of its finite values.

    Attributes:
        mean: `None` where no value is finite, as the next three.
        std: Population standard deviation.
        min: The smallest.
        max: The largest.
        norm: The Euclidean norm of all values, in float64; not finite if one is not.
        zeros: The share of exact zeros, 0 to 1.
        finite: Whether all values are.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    norm: float
    zeros: float
    finite: bool


def stats(values: np.ndarray) -> Stats:
    """Sum up an array of numbers of any shape.

    Cost: about ten passes over the values, in float64.
    """
    flat = as_float(values).ravel()
    finite = np.isfinite(flat)
    some = flat[finite]
    if not some.size:
        return Stats(None, None, None, None, norm(flat), 0.0, not flat.size)
    return Stats(
        mean=float(some.mean()),
        std=float(some.std()),
        min=float(some.min()),
        max=float(some.max()),
        norm=norm(flat),
        zeros=float(np.mean(flat == 0)),
        finite=bool(finite.all()),
    )


def histogram(values: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Counts of shape `(bins,)` of the finite values, and the `bins + 1` edges."""
    flat = as_float(values).ravel()
    return np.histogram(flat[np.isfinite(flat)], bins)


def as_float(values: np.ndarray) -> np.ndarray:
    """The values as float64: bfloat16 and its like have no arithmetic in NumPy."""
    return np.asarray(values).astype(np.float64)


def is_number(values: Any) -> bool:
    """Whether an array holds numbers: text has no statistics."""
    return values.dtype.kind in "biufV"


def norm(values: np.ndarray) -> float:
    """The Euclidean norm, in float64."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.sum(np.square(as_float(values)))))
