"""From what a user gives as data to a source.

The one place that tells arrays from streams and refuses what is neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loopscope.data.arrays import ArraySource
from loopscope.data.feed import Segment
from loopscope.data.stream import StreamSource
from loopscope.errors import DataError

if TYPE_CHECKING:
    from loopscope.backend.base import Backend


class Pass(Protocol):
    """The data of one epoch, in order."""

    def take(self, limit: int) -> Segment | None:
        """The next steps, at most `limit`, or `None` at the end."""
        ...

    def close(self) -> None:
        """Give back threads and buffers."""
        ...


class Source(Protocol):
    """Where batches come from."""

    steps: int | None
    """The steps of an epoch, `None` if unknown."""

    ragged: bool
    """Whether an epoch may end with a smaller batch."""

    @property
    def specs(self) -> tuple[Any, ...]:
        """`Spec`s of a full batch."""
        ...

    def open(self, epoch: int) -> Pass:
        """The data of an epoch."""
        ...

    def sample(self) -> Segment:
        """Some steps for measuring; nothing is used up."""
        ...

    def close(self) -> None:
        """End what prefetches; the next epoch starts it again."""
        ...


def as_source(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    backend: Backend,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    class_weight: dict[int, float] | None = None,
) -> Source:
    """A source over whatever `keras.Model.fit` takes as x, y and sample_weight.

    Raises:
        DataError: Empty data, unequal lengths, a `batch_size` below 1, an
            argument that the kind of data does not take, or no data at all.
    """
    _check_count("batch_size", batch_size)
    _check_count("steps_per_epoch", steps_per_epoch)
    if isinstance(x, (ArraySource, StreamSource)):
        return x
    if x is None:
        raise DataError("Expected data as `x`. Received: x=None")
    if is_arrays(x, backend) and not (y is None and is_batches(x)):
        parts: tuple[Any, ...] = (x, y, sample_weight)
        if sample_weight is not None and y is None:
            raise DataError("`sample_weight` needs `y`. Received: y=None")
        if class_weight is not None:
            parts = _weighted(parts, class_weight)
        while parts[-1] is None:
            parts = parts[:-1]
        return ArraySource(
            tuple(as_arrays(part, backend) for part in parts),
            batch_size=batch_size or 32,
            shuffle=bool(shuffle),
            seed=seed,
            place=backend.place,
            steps_per_epoch=steps_per_epoch,
        )
    if not isinstance(x, Iterable):
        raise DataError(
            "Data must be arrays, a dict or tuple of arrays, or an iterable of "
            f"batches. Received: x of type {type(x).__name__}"
        )
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise DataError(
                f"`{name}` must not be given when `x` is an iterable of batches: each "
                f"batch carries its own. Received: x of type {type(x).__name__}"
            )
    return StreamSource(
        _batches(x),
        place=backend.place,
        steps_per_epoch=steps_per_epoch,
        transform=(lambda b: _weighted(b, class_weight)) if class_weight else None,
    )


def is_arrays(value: Any, backend: Backend) -> bool:
    """Whether `value` is an array or a nest of arrays, rather than a stream."""
    if isinstance(value, dict):
        return bool(value) and all(is_arrays(v, backend) for v in value.values())
    if isinstance(value, (list, tuple)):
        return bool(value) and (
            all(is_arrays(v, backend) for v in value)
            or all(isinstance(v, (int, float)) for v in value)
        )
    return backend.is_tensor(value) or hasattr(value, "__array__")


def is_batches(value: Any) -> bool:
    """Whether `value` is a list of batches: of tuples (x, y) or (x, y, weight)."""
    return isinstance(value, list) and all(
        isinstance(part, tuple) and len(part) in (2, 3) for part in value
    )


def as_arrays(value: Any, backend: Backend) -> Any:
    """A tree of arrays: tensors and memmaps as they are, floats as `floatx`."""
    if isinstance(value, dict):
        return {k: as_arrays(v, backend) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value[0], (int, float)):
        return tuple(as_arrays(v, backend) for v in value)
    if backend.is_tensor(value) or isinstance(value, np.memmap):
        return value
    import keras

    array = np.asarray(value)
    if array.dtype.kind == "f" and array.dtype.name != keras.config.floatx():
        array = array.astype(keras.config.floatx())
    if array.dtype.kind not in "biufc":
        raise DataError(
            "Arrays must hold numbers or booleans. "
            f"Received: dtype={array.dtype} and shape={array.shape}"
        )
    return array


def _batches(x: Iterable[Any]) -> Iterable[Any]:
    import keras

    return _Indexed(x) if isinstance(x, keras.utils.PyDataset) else x


class _Indexed:
    """A `keras.utils.PyDataset` as an iterable of its batches."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        if self._dataset.num_batches is None:
            raise TypeError("unknown length")
        return int(self._dataset.num_batches)

    def __iter__(self) -> Any:
        self._dataset.on_epoch_begin()
        index = 0
        while self._dataset.num_batches is None or index < self._dataset.num_batches:
            yield self._dataset[index]
            index += 1
        self._dataset.on_epoch_end()


def _weighted(
    parts: tuple[Any, ...], class_weight: dict[int, float]
) -> tuple[Any, ...]:
    """The parts with the weight of each example's class as sample_weight."""
    if len(parts) > 2 and parts[2] is not None:
        raise DataError(
            "`class_weight` and `sample_weight` exclude each other. Multiply them "
            "yourself and give the product as `sample_weight`."
        )
    if len(parts) < 2 or parts[1] is None or isinstance(parts[1], (dict, list, tuple)):
        raise DataError("`class_weight` needs a single array of labels as `y`.")
    labels = np.asarray(parts[1])
    if labels.ndim > 1 and labels.shape[-1] > 1:
        labels = labels.argmax(-1)
    labels = labels.reshape(-1).astype(np.int64)
    weights = np.ones(max(int(labels.max()), *class_weight) + 1, "float32")
    for label, weight in class_weight.items():
        weights[label] = weight
    return parts[0], parts[1], weights[labels]


def _check_count(name: str, value: Any) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and (not whole or value < 1):
        raise DataError(
            f"`{name}` must be a whole number of at least 1. Received: {name}={value!r}"
        )
