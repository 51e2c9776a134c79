"""Sources that can only be iterated: tf.data, generators, any iterable of batches.

A thread collects batches of one shape into a chunk of fixed capacity, so that a
stream too can be run many steps to a call, and a chunk that is not full needs no
program of its own. Batches of another shape (a ragged last one) go alone.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from loopscope.data.feed import Feed, Segment, Spec, placed
from loopscope.errors import DataError

CHUNK_BYTES = 8 * 2**20
CHUNK_STEPS = 256
CHUNK_WAIT_S = 0.2
"""A chunk is handed on when it is full, this large, or has waited this long."""

_END = object()


class StreamPass:
    """One pass over an iterator of batches, prefetched on a thread."""

    def __init__(self, batches: Iterator[Any], place: Callable[[Any], Any]) -> None:
        self._place = place
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._current: Segment | None = None
        self._ended = False
        self._thread = threading.Thread(
            target=self._collect, args=(batches,), name="loopscope-data", daemon=True
        )
        self._thread.start()

    def take(self, limit: int) -> Segment | None:
        """The next steps, at most `limit`, or `None` at the end.

        Raises what the iterator raised, after every batch before it was taken.
        """
        segment = self.peek()
        if segment is None:
            return None
        cut = min(segment.stop, segment.start + limit)
        rest = Segment(segment.feed, cut, segment.stop)
        self._current = rest if rest.steps else None
        return Segment(segment.feed, segment.start, cut)

    def peek(self) -> Segment | None:
        """What comes next, without taking it."""
        if self._current is None and not self._ended:
            item = self._ready.get()
            if item is _END:
                self._ended = True
            elif isinstance(item, BaseException):
                self._ended = True
                raise item
            else:
                self._current = self._segment(*item)
        return self._current

    def close(self) -> None:
        """End the thread. Batches that were prefetched are dropped."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._ended, self._current = True, None

    def _segment(self, chunk: list[tuple[Any, ...]], capacity: int) -> Segment:
        import keras

        specs = keras.tree.map_structure(
            lambda spec: placed(spec, self._place), _specs(chunk[0])
        )
        rows = keras.tree.flatten(chunk[0])[0].shape[0]

        def stack(*leaves: np.ndarray) -> Any:
            array = np.empty((capacity * rows, *leaves[0].shape[1:]), leaves[0].dtype)
            for index, leaf in enumerate(leaves):
                array[index * rows : (index + 1) * rows] = leaf
            array[len(leaves) * rows :] = 0
            return self._place(array)

        feed = Feed(
            kind="slice",
            arrays=keras.tree.map_structure(stack, *chunk),
            order=None,
            batch_size=rows,
            specs=specs,
            signature=("slice", capacity, repr(specs)),
        )
        return Segment(feed, 0, len(chunk))

    def _collect(self, batches: Iterator[Any]) -> None:
        chunk: list[tuple[Any, ...]] = []
        usual = current = ""
        capacity = usual_capacity = 1
        since = time.monotonic()
        try:
            for raw in batches:
                batch = as_batch(raw)
                key = repr(_specs(batch))
                if not usual:
                    usual, usual_capacity = key, _capacity(batch)
                if chunk and key != current:
                    self._put((chunk, capacity))
                    chunk = []
                if not chunk:
                    since, current = time.monotonic(), key
                    capacity = usual_capacity if key == usual else 1
                chunk.append(batch)
                late = time.monotonic() - since > CHUNK_WAIT_S
                if len(chunk) == capacity or late:
                    self._put((chunk, capacity))
                    chunk = []
                if self._stop.is_set():
                    return
        except BaseException as error:
            if chunk:
                self._put((chunk, capacity))
            self._put(error)
        else:
            if chunk:
                self._put((chunk, capacity))
            self._put(_END)
        finally:
            close = getattr(batches, "close", None)
            if callable(close) and self._stop.is_set():
                close()

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return
            except queue.Full:
                continue


class StreamSource:
    """Batches out of anything that can be iterated.

    Args:
        batches: An iterable of batches: x, (x,), (x, y) or (x, y, sample_weight),
            each a tree of arrays. Iterated anew in every epoch; with
            `steps_per_epoch`, an epoch goes on where the last one stopped.
        place: Brings an array to the device.
        steps_per_epoch: The steps of an epoch, where not all of `batches`.
        transform: Applied to each batch tuple (class weights).
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        place: Callable[[Any], Any],
        steps_per_epoch: int | None = None,
        transform: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    ) -> None:
        self._batches, self._place, self._transform = batches, place, transform
        self.ragged = True  # It may be; nobody knows.
        self._continues = steps_per_epoch is not None
        self._is_iterator = iter(batches) is batches
        self.steps = steps_per_epoch or _length(batches)
        self._open: StreamPass | None = None
        self._specs: tuple[Any, ...] | None = None

    @property
    def specs(self) -> tuple[Any, ...]:
        """The specs of the first batch. Waits for it on the first call.

        Raises:
            DataError: There is no first batch.
        """
        if self._specs is None:
            self._specs = self.sample().feed.specs
        return self._specs

    def sample(self) -> Segment:
        """The first steps, for measuring; they stay where they are."""
        if self._open is None:
            self._open = self._start()
        first = self._open.peek()
        if first is None:
            raise DataError(
                "The data are empty: the source gave no batch. Expected at least one. "
                f"Received: {type(self._batches).__name__}"
            )
        return first

    def open(self, epoch: int) -> _Continued | StreamPass:
        """The epoch's data: from the start, or from where the last epoch stopped."""
        current, self._open = self._open, None
        current = current or self._start()
        if self._continues:
            self._open = current
            return _Continued(current, self)
        return current

    def close(self) -> None:
        """End prefetching."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _start(self) -> StreamPass:
        iterator: Iterator[Any] = iter(self._batches)
        if self._transform is not None:
            iterator = map(self._transform, map(as_batch, iterator))
        return StreamPass(iterator, self._place)


class _Continued:
    """An epoch of a pass that goes on after it; a dry source starts again."""

    def __init__(self, current: StreamPass, source: StreamSource) -> None:
        self._pass, self._source = current, source

    def take(self, limit: int) -> Segment | None:
        segment = self._pass.take(limit)
        if segment is None:
            self._source.close()
            assert self._source.steps is not None
            ran_dry(self._source.steps, stacklevel=2)
        return segment

    def close(self) -> None:
        """The pass stays open for the next epoch."""


def ran_dry(steps_per_epoch: int, *, stacklevel: int) -> None:
    """Warn that an epoch has fewer steps than it was asked to have."""
    warnings.warn(
        "The source ran out of data before the epoch had its "
        f"steps_per_epoch={steps_per_epoch} steps; the epoch ends here. "
        "Give a source that lasts, or a smaller `steps_per_epoch`.",
        stacklevel=stacklevel + 1,
    )


def as_batch(raw: Any) -> tuple[Any, ...]:
    """A batch as a tuple (x, y, sample_weight) of NumPy trees, cut after the last.

    Raises:
        DataError: Something that is not one to three parts of arrays.
    """
    import keras

    parts = tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)
    while parts and parts[-1] is None:
        parts = parts[:-1]
    leaves = keras.tree.flatten(parts)
    if not 1 <= len(parts) <= 3 or any(leaf is None for leaf in leaves):
        raise DataError(
            "A batch must be x, (x, y) or (x, y, sample_weight), without None "
            f"in between. Received: {_describe(raw)}"
        )
    batch: tuple[Any, ...] = keras.tree.map_structure(np.asarray, parts)
    shapes = [leaf.shape for leaf in keras.tree.flatten(batch)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise DataError(
            "Every array of a batch must have the same first axis, which counts its "
            f"examples. Received: shapes={shapes}"
        )
    return batch


def _describe(raw: Any) -> str:
    if isinstance(raw, (tuple, list)):
        return f"{type(raw).__name__} of {len(raw)}: {[type(p).__name__ for p in raw]}"
    return type(raw).__name__


def _specs(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    import keras

    specs: tuple[Any, ...] = keras.tree.map_structure(
        lambda a: Spec(a.shape, a.dtype.name), batch
    )
    return specs


def _capacity(batch: tuple[Any, ...]) -> int:
    import keras

    size_bytes = sum(leaf.nbytes for leaf in keras.tree.flatten(batch))
    return int(max(1, min(CHUNK_STEPS, CHUNK_BYTES // max(1, size_bytes))))


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None
