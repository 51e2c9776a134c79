"""Sources over arrays: resident on the device, or too large for that.

A resident source places its arrays on the device once; an epoch is then only an
order of rows. A source over `np.memmap`, or above `RESIDENT_BYTES`, gathers its
batches on the host and streams them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import numpy as np

from loopscope.data.adapters import Shuffled
from loopscope.data.feed import Feed, Segment, Spec, dtype_name, on_host, placed
from loopscope.data.order import permutation
from loopscope.data.stream import StreamPass, ran_dry
from loopscope.errors import DataError

RESIDENT_BYTES = 2 * 2**30
"""Arrays above this size stay on the host and are streamed."""

Place = Callable[[Any], Any]


class ArrayPass:
    """One epoch over resident arrays: its segments, in order."""

    def __init__(self, segments: list[Segment]) -> None:
        self._rest = segments

    def take(self, limit: int) -> Segment | None:
        """The next steps, at most `limit`, or `None` at the end."""
        if not self._rest:
            return None
        segment = self._rest.pop(0)
        if segment.steps > limit:
            cut = segment.start + limit
            self._rest.insert(0, Segment(segment.feed, cut, segment.stop))
            segment = Segment(segment.feed, segment.start, cut)
        return segment

    def close(self) -> None:
        """Nothing to give back."""


class ArraySource:
    """Batches out of arrays of equal length.

    Args:
        arrays: Tuple (x, y, sample_weight), cut short after the last one given;
            each a tree of arrays with the same first axis.
        batch_size: Rows of a step; the last step of an epoch may have fewer.
        shuffle: Whether each epoch has an order of its own, keyed by (seed, epoch);
            `"batch"` shuffles within each batch only.
        seed: The order's seed.
        place: Brings an array to the device.
        steps_per_epoch: The steps of an epoch, where not all. The next epoch goes
            on where the last one stopped; the arrays are shuffled anew once they
            are through.
    """

    def __init__(
        self,
        arrays: tuple[Any, ...],
        *,
        batch_size: int,
        shuffle: bool | str,
        seed: int,
        place: Place,
        steps_per_epoch: int | None = None,
    ) -> None:
        import keras

        self._map = keras.tree.map_structure
        leaves = keras.tree.flatten(arrays)
        self.arrays = arrays
        self._shuffle, self._seed, self._place = shuffle, seed, place
        self.samples = _common_length(leaves)
        self.batch_size = min(batch_size, self.samples)
        self._all_steps = -(-self.samples // self.batch_size)
        self.steps: int | None = steps_per_epoch or self._all_steps
        self.ragged = self.samples % self.batch_size != 0
        self.specs: tuple[Any, ...] = self._specs(self.batch_size)
        size_bytes = sum(int(np.prod(a.shape)) * _itemsize(a) for a in leaves)
        self.resident = size_bytes <= RESIDENT_BYTES and not any(
            isinstance(a, np.memmap) for a in leaves
        )
        self._placed: tuple[Any, ...] | None = None
        self.patient = False

    jumps = True
    """Any position is a function of (seed, epoch, step)."""

    repeats = True

    def inexact(self) -> str | None:
        """Nothing stands in the way: the order depends on (seed, epoch) alone."""
        return None

    def fetch_s(self) -> float | None:
        """Seconds that a batch takes to come; `None` of arrays on the device."""
        if self.resident or self._all_steps < 2:
            return None
        times, batches = [], self._host_batches(0, 0, min(8, self._all_steps))
        for _ in range(min(8, self._all_steps)):
            began = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - began)
        return median(times[1:])

    def shuffles(self) -> Sequence[Shuffled]:
        """None: all rows are drawn from."""
        return ()

    def replay(self, passes: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: any position is reached at once."""

    def marks(self) -> Mapping[str, int]:
        """None: arrays have a fingerprint as a whole."""
        return {}

    def open(self, epoch: int, start: int = 0) -> ArrayPass | StreamPass:
        """The epoch's data, from step `start` on."""
        assert self.steps is not None
        turn, first = self._begin(epoch)
        if first + self.steps > self._all_steps:
            ran_dry(stacklevel=2)
        stop = min(first + self.steps, self._all_steps)
        return self._open(turn, min(first + start, stop), stop)

    def _begin(self, epoch: int) -> tuple[int, int]:
        """Which time the arrays are gone over in an epoch, and from which step on."""
        assert self.steps is not None
        # So many epochs go over the arrays once; the last of them may be shorter.
        turn, part = divmod(epoch, -(-self._all_steps // self.steps))
        return turn, part * self.steps

    def examples(self, epoch: int, index: int) -> np.ndarray:
        """The rows of a step's examples."""
        turn, first = self._begin(epoch)
        at = (first + index) * self.batch_size
        return self._order(turn)[at : at + self.batch_size]

    def close(self) -> None:
        """Nothing to give back: the arrays stay on the device for the next epoch."""

    def _open(self, turn: int, start: int, stop: int) -> ArrayPass | StreamPass:
        if not self.resident:
            return StreamPass(
                self._host_batches(turn, start, stop),
                self._place,
                usual=self._host_specs(),
                patient=self.patient,
            )
        if self._placed is None:
            self._placed = self._map(self._place, self.arrays)
        steps, rest = divmod(self.samples, self.batch_size)
        rows, segments = self._order(turn), []
        if start < min(stop, steps):
            full = self._feed(rows[: steps * self.batch_size], self.batch_size)
            segments.append(Segment(full, start, min(stop, steps)))
        if max(start, steps) < stop:
            tail = self._feed(rows[steps * self.batch_size :], rest)
            segments.append(Segment(tail, 0, 1))
        return ArrayPass(segments)

    def shown(self) -> tuple[Any, ...]:
        """All of them."""
        return self.arrays

    def sample(self) -> Segment:
        """Some steps of the data for measuring; nothing is used up."""
        data = self._open(0, 0, self._all_steps)
        try:
            segment = data.take(256)
        finally:
            data.close()
        assert segment is not None
        return segment

    def _order(self, turn: int) -> np.ndarray:
        if self._shuffle == "batch":
            rows = permutation(self.samples, seed=self._seed, epoch=turn)
            by_batch = np.argsort(rows // self.batch_size, kind="stable")
            return rows[by_batch]
        if self._shuffle:
            return permutation(self.samples, seed=self._seed, epoch=turn)
        return np.arange(self.samples, dtype=np.int32)

    def _feed(self, rows: np.ndarray, batch_size: int) -> Feed:
        specs = self._specs(batch_size)
        assert self._placed is not None
        in_order = not self._shuffle and batch_size == self.batch_size
        kind: Literal["take", "slice"] = "slice" if in_order else "take"
        return Feed(
            kind=kind,
            arrays=self._placed,
            order=None if in_order else self._place(rows),
            batch_size=batch_size,
            specs=specs,
            signature=(kind, len(rows), self.samples, _key(specs)),
        )

    def _specs(self, batch_size: int) -> tuple[Any, ...]:
        def spec(array: Any) -> Spec:
            given = Spec((batch_size, *array.shape[1:]), _dtype_name(array))
            return given if _is_tensor(array) else placed(given, self._place)

        specs: tuple[Any, ...] = self._map(spec, self.arrays)
        return specs

    def _host_specs(self) -> tuple[Any, ...]:
        specs: tuple[Any, ...] = self._map(
            lambda a: Spec((self.batch_size, *a.shape[1:]), _dtype_name(a)), self.arrays
        )
        return specs

    def _host_batches(
        self, turn: int, start: int, stop: int
    ) -> Iterator[tuple[Any, ...]]:
        rows, size = self._order(turn), self.batch_size
        arrays = self._map(lambda a: on_host(a) if _is_tensor(a) else a, self.arrays)
        for step in range(start, stop):
            batch = rows[step * size : (step + 1) * size]
            # Sorted reads are kinder to a disk; then back into the drawn order.
            by_place = np.argsort(batch, kind="stable")
            back = np.argsort(by_place, kind="stable")
            yield self._map(
                lambda a, r=batch[by_place], b=back: np.asarray(
                    a[r], dtype=_dtype_name(a)
                )[b],
                arrays,
            )


def _is_tensor(array: Any) -> bool:
    """Whether an array is a framework's: on the device, and without fancy indexing."""
    return not isinstance(array, np.ndarray)


def _key(specs: tuple[Any, ...]) -> str:
    return repr(specs)


def _dtype_name(array: Any) -> str:
    """The dtype in which an array's batches are given: floats of a file as floatx."""
    if isinstance(array, np.memmap) and array.dtype.kind == "f":
        import keras

        return str(keras.config.floatx())
    return dtype_name(array)


def _itemsize(array: Any) -> int:
    return int(getattr(array.dtype, "itemsize", 0) or array.dtype.size)


def _common_length(leaves: list[Any]) -> int:
    lengths = [int(leaf.shape[0]) if len(leaf.shape) else None for leaf in leaves]
    if None in lengths:
        raise DataError(
            "Every array must have a first axis that counts the examples. "
            f"Received: shapes={[tuple(leaf.shape) for leaf in leaves]}"
        )
    if len(set(lengths)) > 1:
        raise DataError(
            "All arrays must have the same number of examples (first axis). Make "
            "sure that x, y and sample_weight belong together. "
            f"Received: shapes={[tuple(leaf.shape) for leaf in leaves]}"
        )
    if not lengths or lengths[0] == 0:
        raise DataError(
            "The data are empty: expected at least one example. "
            f"Received: shapes={[tuple(leaf.shape) for leaf in leaves]}"
        )
    return lengths[0] or 0
