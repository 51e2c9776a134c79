"""A feed: arrays on the device and the way to cut one step's batch out of them.

Every source, in memory or streamed, ends in a feed, so that a program needs
one loop and no knowledge of where data come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of an array; the batch axis included.

    An axis is `None` where one program is to take any length of it.
    """

    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class NativeSpec:
    """The kind of an array that only the framework understands: sparse, ragged, text.

    Attributes:
        text: Says all that a program depends on.
        shape: Of the array; `None` for an axis that varies.
        handle: What the framework calls a spec.
        tensor: What Keras calls one: a `keras.KerasTensor`.
    """

    text: str
    shape: tuple[int | None, ...]
    handle: Any = field(compare=False, repr=False)
    tensor: Any = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Native:
    """An array that only the framework understands, with its spec."""

    value: Any
    spec: NativeSpec

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The array's shape."""
        return self.spec.shape


def placed(spec: Any, place: Callable[[Any], Any]) -> Any:
    """The spec as it is on the device: JAX, for one, keeps int64 as int32."""
    if isinstance(spec, NativeSpec) or spec.dtype not in ("int64", "uint64", "float64"):
        return spec
    return Spec(spec.shape, dtype_name(place(np.empty(0, spec.dtype))))


def on_host(array: Any) -> np.ndarray:
    """An array for NumPy; a tensor may lie on a device that NumPy cannot read."""
    import keras

    tensor = keras.ops.is_tensor(array)
    return np.asarray(keras.ops.convert_to_numpy(array) if tensor else array)


def dtype_name(array: Any) -> str:
    """NumPy's name of an array's dtype; PyTorch calls it `torch.float32`."""
    dtype = array.dtype
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


@dataclass(frozen=True, eq=False)
class Feed:
    """Some steps' data.

    Attributes:
        kind: `"take"`: step i is `array[order[i * B : (i + 1) * B]]`.
            `"slice"`: step i is `array[i * B : (i + 1) * B]`.
            `"stack"`: step i is `array[i]`.
            `"whole"`: the arrays are the batch of the only step.
        arrays: A tuple (x, y, ...) of trees of device arrays; `None` leaves are
            not allowed, a missing y is a shorter tuple.
        order: int32 device array of row numbers for `"take"`, else `None`.
        batch_size: B, the rows of one step.
        specs: `arrays` with the `Spec` of one step's batch at each leaf.
        signature: Hashable; feeds of equal signature run on one compiled program.
        parts: Among how many workers the rows of a step are spread. Where it is more
            than one, `arrays` hold B // parts rows a step: those of this worker.
    """

    kind: Literal["take", "slice", "stack", "whole"]
    arrays: tuple[Any, ...]
    order: Any | None
    batch_size: int
    specs: tuple[Any, ...]
    signature: tuple[Any, ...]
    parts: int = 1

    @property
    def rows(self) -> int:
        """How many rows of `arrays` a step has."""
        return self.batch_size // self.parts


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
