"""A feed: arrays on the device and the way to cut one step's batch out of them.

Every source, in memory or streamed, ends in a feed, so that a program needs
one loop and no knowledge of where data come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of an array; the batch axis included."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def placed(spec: Spec, place: Callable[[Any], Any]) -> Spec:
    """The spec as it is on the device: JAX, for one, keeps int64 as int32."""
    if spec.dtype not in ("int64", "uint64", "float64"):
        return spec
    dtype = place(np.empty(0, spec.dtype)).dtype
    return Spec(spec.shape, str(getattr(dtype, "name", dtype)))


@dataclass(frozen=True, eq=False)
class Feed:
    """Some steps' data.

    Attributes:
        kind: `"take"`: step i is `array[order[i * B : (i + 1) * B]]`.
            `"slice"`: step i is `array[i * B : (i + 1) * B]`.
        arrays: A tuple (x, y, ...) of trees of device arrays; `None` leaves are
            not allowed, a missing y is a shorter tuple.
        order: int32 device array of row numbers for `"take"`, else `None`.
        batch_size: B, the rows of one step.
        specs: `arrays` with the `Spec` of one step's batch at each leaf.
        signature: Hashable; feeds of equal signature run on one compiled program.
    """

    kind: Literal["take", "slice"]
    arrays: tuple[Any, ...]
    order: Any | None
    batch_size: int
    specs: tuple[Any, ...]
    signature: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive steps of one feed: positions `start` to `stop`, not included."""

    feed: Feed
    start: int
    stop: int

    @property
    def steps(self) -> int:
        """How many steps."""
        return self.stop - self.start
