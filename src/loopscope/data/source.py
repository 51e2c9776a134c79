"""From what a user gives as data to a source.

The one place that tells arrays from streams and refuses what is neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loopscope.data.adapters import Batches, Shuffled, adapted, is_sparse_or_ragged
from loopscope.data.arrays import ArraySource
from loopscope.data.feed import Segment
from loopscope.data.stream import StreamSource, as_batch
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

    ragged: bool
    """Whether an epoch may end with a smaller batch."""

    @property
    def steps(self) -> int | None:
        """The steps of an epoch, `None` if unknown."""
        ...

    @property
    def specs(self) -> tuple[Any, ...]:
        """`Spec`s of a full batch."""
        ...

    @property
    def jumps(self) -> bool:
        """Whether any position is reached at once; otherwise by reading up to it."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether any pass can be had again in this process."""
        ...

    patient: bool
    """Whether segments are as long as the data allow, however slowly they come.

    So that each of several workers gets the same ones.
    """

    def inexact(self) -> str | None:
        """Why the same data cannot be had again in another process, if so."""
        ...

    def fetch_s(self) -> float | None:
        """Seconds that a batch takes to come; `None` where all are there."""
        ...

    def shuffles(self) -> Sequence[Shuffled]:
        """What shuffles in the data, as far as they show it."""
        ...

    def open(self, epoch: int, start: int = 0) -> Pass:
        """The data of an epoch, from step `start` on."""
        ...

    def replay(self, passes: Sequence[tuple[int, int]]) -> None:
        """Stand where these passes have led: (epoch, steps) each, from the first on."""
        ...

    def marks(self) -> Mapping[str, int]:
        """Checksums of some batches read so far, to tell whether they come again."""
        ...

    def examples(self, epoch: int, index: int) -> np.ndarray | None:
        """The rows of a step's examples in the arrays given, shape `(B,)`."""
        ...

    def shown(self) -> tuple[Any, ...]:
        """Arrays to check: all, or those of a stream's first steps, as far as here."""
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
    shuffle: bool | str = True,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    class_weight: dict[int, float] | None = None,
    continues: bool = True,
    any_parts: bool = False,
    place: Callable[[Any], Any] | None = None,
) -> Source:
    """A source over whatever `keras.Model.fit` takes as x, y and sample_weight.

    Args:
        x: The data.
        y: Targets, where `x` does not carry them.
        sample_weight: Weights, where `x` does not carry them.
        backend: Where the data go.
        batch_size: Rows of a step, for arrays.
        shuffle: Whether each epoch has an order of its own, for arrays.
        seed: The order's seed.
        steps_per_epoch: The steps of an epoch, where not all.
        class_weight: A weight for the examples of each class.
        continues: Whether, with `steps_per_epoch`, an epoch goes on where the last
            one stopped.
        any_parts: Whether a batch may have more parts than x, y and sample_weight.
        place: Brings an array to the device, where not as the backend does it.

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
    steps_per_epoch = _capped(steps_per_epoch)
    read = partial(as_batch, native=backend.native, any_parts=any_parts)
    given = [part for part in (x, y, sample_weight) if part is not None]
    listed = y is None and is_batches(x)
    if all(is_arrays(part, backend) for part in given) and not listed:
        parts: tuple[Any, ...] = (x, y, sample_weight)
        if sample_weight is not None and y is None:
            raise DataError("`sample_weight` needs `y`. Received: y=None")
        if class_weight is not None:
            parts = _weighted(parts, class_weight)
        while parts[-1] is None:
            parts = parts[:-1]
        arrays = tuple(as_arrays(part, backend) for part in parts)
        return ArraySource(
            _one_weight_each(arrays),
            batch_size=batch_size or _batch_size(arrays, steps_per_epoch),
            shuffle=shuffle,
            seed=seed,
            place=place or backend.place,
            steps_per_epoch=steps_per_epoch,
        )
    batches: Batches | Iterable[Any] | None = None
    if not listed:
        batches = adapted(
            x,
            y,
            sample_weight,
            iterate=backend.batches,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=bool(shuffle),
            class_weight=class_weight,
        )
    if batches is None:
        batches = _iterable(x, y, sample_weight)
        if class_weight is not None:
            weights, plain = class_weight, read
            read = partial(_weighted_batch, plain, weights)
    return StreamSource(
        batches,
        place=place or backend.place,
        steps_per_epoch=steps_per_epoch,
        continues=continues,
        loosens=backend.loosens,
        read=read,
    )


def _iterable(x: Any, y: Any, sample_weight: Any) -> Iterable[Any]:
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
    return x


def _capped(steps_per_epoch: int | None) -> int | None:
    """The steps of an epoch under `keras.config.max_steps_per_epoch`."""
    import keras

    most: int | None = keras.config.max_steps_per_epoch()
    if not most or (steps_per_epoch and steps_per_epoch <= most):
        return steps_per_epoch
    warnings.warn(f"Limiting steps_per_epoch to {most}", stacklevel=4)
    return most


def _batch_size(arrays: tuple[Any, ...], steps: int | None) -> int:
    """What Keras takes where no batch size is given."""
    import keras

    rows = keras.tree.flatten(arrays)[0].shape[:1]
    return max(1, -(-int(rows[0]) // steps)) if steps and rows else 32


def _one_weight_each(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """One array of weights is meant for each of several outputs."""
    import keras

    if len(arrays) < 3 or not keras.tree.is_nested(arrays[1]):
        return arrays
    x, y, weight = arrays
    if keras.tree.is_nested(weight):
        try:
            keras.tree.assert_same_structure(y, weight)
        except ValueError as error:
            raise DataError(
                "You should provide one `sample_weight` array per output in `y`. "
                f"The two structures did not match: {error}"
            ) from error
        return arrays
    if len(weight.shape) != 1 and tuple(weight.shape[1:]) != (1,):
        raise DataError(
            "One `sample_weight` for several outputs must have one number an example, "
            "shape (examples,); or give one array for each output, in the structure of "
            f"`y`. Received: sample_weight of shape {tuple(weight.shape)}"
        )
    return x, y, keras.tree.map_structure(lambda _: weight, y)


def is_arrays(value: Any, backend: Backend) -> bool:
    """Whether `value` is an array or a nest of arrays, rather than a stream."""
    if isinstance(value, dict):
        return bool(value) and all(is_arrays(v, backend) for v in value.values())
    if isinstance(value, (list, tuple)):
        return bool(value) and (
            all(is_arrays(v, backend) for v in value)
            or all(isinstance(v, (int, float)) for v in value)
        )
    if is_sparse_or_ragged(value):
        return False
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
        parts = [as_arrays(v, backend) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    import keras

    if backend.is_tensor(value):
        floats = keras.backend.is_float_dtype(
            str(keras.backend.standardize_dtype(value.dtype))
        )
        return keras.ops.cast(value, keras.config.floatx()) if floats else value
    if isinstance(value, np.memmap):
        return value
    array = _as_numpy(value)
    native = backend.native(array)
    if native is not None:
        return native.value
    if array.dtype.kind == "f" and array.dtype.name != keras.config.floatx():
        array = array.astype(keras.config.floatx())
    if array.dtype.kind not in "biufc":
        raise DataError(
            "Arrays must hold numbers or booleans. "
            f"Received: dtype={array.dtype} and shape={array.shape}"
        )
    return array


def _as_numpy(value: Any) -> np.ndarray:
    """An array of NumPy, pandas, PyTorch or another framework; in Keras's shape."""
    if hasattr(value, "to_frame"):  # A series counts as a table of one column.
        value = value.to_frame()
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def _weighted_batch(
    read: Callable[[Any], tuple[Any, ...]], class_weight: dict[int, float], raw: Any
) -> tuple[Any, ...]:
    return _weighted(read(raw), class_weight)


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
