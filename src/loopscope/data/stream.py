"""Sources that can only be iterated: tf.data, generators, any iterable of batches.

A thread collects batches of one shape into a chunk of fixed capacity, so that a
stream too can be run many steps to a call, and a chunk that is not full needs no
program of its own. Batches of another shape (a ragged last one) go alone.
"""

from __future__ import annotations

import contextlib
import math
import queue
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from loopscope.data.adapters import (
    Batches,
    Plain,
    Shuffled,
    caches,
    is_pure,
    random_order,
    shuffles,
)
from loopscope.data.feed import (
    Feed,
    Native,
    NativeSpec,
    Segment,
    Spec,
    on_host,
    placed,
)
from loopscope.errors import DataError

CHUNK_BYTES = 8 * 2**20
CHUNK_STEPS = 256
CHUNK_WAIT_S = 0.2
"""A chunk is handed on when it is full, this large, or has waited this long."""

TIMED, TIMED_S = 8, 0.1
"""What batches take to come is known from so many, or in so many seconds."""

MARK_EVERY = 64
"""Of so many batches one is remembered by its checksum."""

_END = object()


class StreamPass:
    """One pass over an iterator of batches, prefetched on a thread.

    Args:
        batches: The iterator.
        place: Brings an array to the device.
        allowed: How many batches may be read; `allow` allows more. So no batch is
            taken from a generator that is not trained on.
        loosens: Whether a program can leave axes open, so that batches of ever new
            shapes need no program each.
        read: From what the iterator gives to the parts of a batch.
        usual: Specs of the batches that chunks are made for, where the first batch
            may not be one of them.
        mark: Told the place in the pass and the batch, for every `MARK_EVERY`th.
        patient: Whether a chunk waits for all its batches, however slow, so that it
            is cut by their number alone.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        place: Callable[[Any], Any],
        *,
        allowed: float = math.inf,
        loosens: bool = False,
        read: Callable[[Any], tuple[Any, ...]] | None = None,
        usual: tuple[Any, ...] | None = None,
        mark: Callable[[int, tuple[Any, ...]], None] = lambda place, batch: None,
        patient: bool = False,
    ) -> None:
        self.patient = patient
        self._usual, self._mark = usual, mark
        self._place, self._read = place, read or as_batch
        self._shapes = Shapes() if loosens else None
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._allowed, self._may_read = allowed, threading.Condition()
        self._current: Segment | None = None
        self._ended = False
        self.fetched_s: list[float] = []
        """What each of the first batches took to come."""
        self._thread = threading.Thread(
            target=self._collect, args=(batches,), name="loopscope-data", daemon=True
        )
        self._thread.start()

    def allow(self, batches: float) -> None:
        """Allow to read so many batches more."""
        with self._may_read:
            self._allowed += batches
            self._may_read.notify_all()

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
            with self._may_read:
                self._may_read.notify_all()
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._ended, self._current = True, None

    def _segment(
        self, chunk: list[tuple[Any, ...]], capacity: int, loose: Any
    ) -> Segment:
        import keras

        specs = keras.tree.map_structure(
            lambda spec: placed(spec, self._place), loose or _specs(chunk[0])
        )
        rows = int(keras.tree.flatten(chunk[0])[0].shape[0])
        if loose is not None or not _is_dense(chunk[0]):
            (batch,) = chunk
            return Segment(whole(batch, specs, rows, self._place), 0, 1)

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
        loose: Any = None
        usual = current = ""
        capacity = usual_capacity = 1
        since, count = time.monotonic(), 0

        def hand_on() -> None:
            nonlocal chunk
            if chunk:
                self._put((chunk, capacity, loose))
                chunk = []

        try:
            if self._usual is not None:
                usual, usual_capacity = repr(self._usual), _capacity(self._usual)
            while True:
                if count >= self._allowed:
                    hand_on()
                if not self._wait_for_leave(count):
                    return
                began = time.perf_counter()
                raw = next(batches, _END)
                if raw is _END:
                    break
                batch = self._read(raw)
                if count < CHUNK_STEPS:
                    self.fetched_s.append(time.perf_counter() - began)
                if count % MARK_EVERY == 0:
                    self._mark(count, batch)
                count += 1
                specs = _specs(batch)
                key = repr(specs)
                if not usual:
                    usual, usual_capacity = key, _capacity(specs)
                if key != current:
                    hand_on()
                if not chunk:
                    since, current = time.monotonic(), key
                    capacity = usual_capacity if key == usual else 1
                    if self._shapes is not None:
                        loose = self._shapes.loosened(specs)
                chunk.append(batch)
                late = time.monotonic() - since > CHUNK_WAIT_S and not self.patient
                if len(chunk) == capacity or late:
                    hand_on()
        except BaseException as error:
            hand_on()
            self._put(error)
        else:
            hand_on()
            self._put(_END)

    def _wait_for_leave(self, count: int) -> bool:
        """Wait until one more batch may be read; `False` if the pass is closed."""
        with self._may_read:
            while count >= self._allowed and not self._stop.is_set():
                self._may_read.wait()
        return not self._stop.is_set()

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return
            except queue.Full:
                continue


class Shapes:
    """The shapes that batches have had, and one spec for all that are new.

    The first `EXACT` shapes are kept as they are: the usual one, a ragged last one. A
    stream that comes with more (texts padded to the longest of a batch) is given specs
    in which every axis that varies is open.
    """

    EXACT = 3

    def __init__(self) -> None:
        self._exact: dict[str, Any] = {}
        self._loose: Any = None

    def loosened(self, specs: Any) -> Any:
        """The specs with axes left open, or `None` where the exact ones will do."""
        import keras

        leaves = keras.tree.flatten(specs)
        if any(isinstance(leaf, NativeSpec) for leaf in leaves):
            return None
        key = repr(specs)
        if key in self._exact or len(self._exact) < self.EXACT:
            self._exact[key] = specs
            return None
        known = [self._loose] if self._loose is not None else [*self._exact.values()]
        try:
            self._loose = keras.tree.map_structure(_common, specs, *known)
        except (ValueError, TypeError):  # Another structure, another rank.
            return None
        return self._loose


def _common(spec: Spec, *others: Spec) -> Spec:
    if any((s.dtype, len(s.shape)) != (spec.dtype, len(spec.shape)) for s in others):
        raise ValueError("no spec is common to arrays of several dtypes or ranks")
    axes = zip(spec.shape, *(s.shape for s in others), strict=True)
    return Spec(tuple(a[0] if len(set(a)) == 1 else None for a in axes), spec.dtype)


class StreamSource:
    """Batches out of anything that can be iterated.

    Args:
        batches: An iterable of batches: x, (x,), (x, y) or (x, y, sample_weight),
            each a tree of arrays. Iterated anew in every epoch.
        place: Brings an array to the device.
        steps_per_epoch: The steps of an epoch, where not all of `batches`.
        continues: Whether, with `steps_per_epoch`, an epoch goes on where the last
            one stopped.
        loosens: Whether a program can leave axes open.
        read: From what the iterator gives to the parts of a batch; `as_batch`.
    """

    def __init__(
        self,
        batches: Batches | Iterable[Any],
        *,
        place: Callable[[Any], Any],
        steps_per_epoch: int | None = None,
        continues: bool = True,
        loosens: bool = False,
        read: Callable[[Any], tuple[Any, ...]] | None = None,
    ) -> None:
        known = hasattr(batches, "on_epoch_begin") and hasattr(batches, "num_batches")
        self._batches: Batches = batches if known else Plain(batches)  # type: ignore
        self._given = batches
        self._place, self._read, self._loosens = place, read, loosens
        self.ragged = True  # It may be; nobody knows.
        self._asked, self._continues = steps_per_epoch, continues
        self._length = self._batches.num_batches
        self._open: StreamPass | None = None
        self._patient = False
        self._taken = 0
        """Steps taken of the pass that is open."""
        self._untouched = self._within_epoch = False
        self._specs: tuple[Any, ...] | None = None
        self._passes = 0
        """Passes that have been started."""
        self._marks: dict[tuple[int, int], int] = {}
        """Checksums of batches by (pass, place); where all passes are alike, pass 0."""

    @property
    def steps(self) -> int | None:
        """The steps of an epoch; of a stream without a length, once one is through."""
        return self._asked or self._length

    @property
    def specs(self) -> tuple[Any, ...]:
        """The specs of the first batch. Waits for it on the first call.

        Raises:
            DataError: There is no first batch.
        """
        if self._specs is None:
            self._specs = self.sample().feed.specs
        return self._specs

    def shown(self) -> tuple[Any, ...]:
        """Those of the first steps. Waits for them on the first call."""
        return self.sample().feed.arrays

    def sample(self) -> Segment:
        """The first steps, for measuring; they stay where they are."""
        if self._open is None:
            self._start(self._asked or CHUNK_STEPS)
            self._untouched = True
        assert self._open is not None
        first = self._open.peek()
        if first is None:
            raise DataError(
                "The data are empty: the source gave no batch. Expected at least one. "
                f"Received: {type(self._given).__name__}"
            )
        return first

    @property
    def jumps(self) -> bool:
        """Whether any position is reached at once: where batches have numbers."""
        return hasattr(self._batches, "starting_at") and self._asked is None

    @property
    def repeats(self) -> bool:
        """Whether all passes are alike, so that any can be had again."""
        return self._asked is None and (self.jumps or is_pure(self._given))

    def inexact(self) -> str | None:
        """Why the same batches cannot be had again in another process, if so."""
        return random_order(self._given)

    def fetch_s(self) -> float | None:
        """Seconds that a batch takes to come; `None` while hardly any has."""
        if self._open is None or caches(self._given):
            return None  # The first epoch is not like the others.
        first = self._open.peek()
        # Until the first chunk was there, nobody else was at work.
        count = max(4, first.stop if first is not None else 0)
        times = self._open.fetched_s[1:count]
        # A few quick ones say nothing: the machine may have been busy just then.
        enough = len(times) >= TIMED or sum(times) > TIMED_S
        return median(times) if len(times) > 1 and enough else None

    def shuffles(self) -> Sequence[Shuffled]:
        """What shuffles in the data, as far as they show it."""
        return shuffles(self._given)

    def replay(self, passes: Sequence[tuple[int, int]]) -> None:
        """Read these passes, (epoch, steps) each, as training has; drop the batches.

        Whatever the iterable remembers from one pass to the next (an order that is
        shuffled again, a generator's place) is then as it was.
        """
        if self.repeats:
            return  # Every pass is like the first, and begins at its start.
        for epoch, steps in passes:
            data = self.open(epoch)
            try:
                _drop(data, steps)
                if self._asked is None:
                    _drop(data, sys.maxsize)
            finally:
                data.close()

    def marks(self) -> Mapping[str, int]:
        """CRC-32 of every `MARK_EVERY`th batch of the last two passes, by place."""
        recent = (0, self._passes - 1, self._passes)
        # The thread that reads may be adding one.
        known = self._marks.copy()
        for key in known:
            if key[0] not in recent:
                self._marks.pop(key, None)
        marks = {k: v for k, v in known.items() if k[0] in recent}
        return {f"{number}/{place}": crc for (number, place), crc in marks.items()}

    def examples(self, epoch: int, index: int) -> None:
        """None: batches that come have no numbers."""

    def open(self, epoch: int, start: int = 0) -> EpochOfStream:
        """The epoch's data: from the start, or from where the last epoch stopped."""
        starting_at = getattr(self._batches, "starting_at", None)
        if start and self.jumps and starting_at is not None:
            first = self._batches.first()  # type: ignore[attr-defined]
            self._stop()
            self._start(
                math.inf,
                batches=starting_at(start),
                usual=_specs((self._read or as_batch)(first)),
            )
            assert self._open is not None
            self._taken = start
            return EpochOfStream(self._open, self, start)
        data = self._opened()
        _drop(data, start)
        return data

    def _opened(self) -> EpochOfStream:
        if self._untouched:
            self._untouched = False
            assert self._open is not None
            if self._asked is None:
                self._open.allow(math.inf)
        elif self._open is not None and self._asked is not None and self._continues:
            self._begin_epoch()
            self._open.allow(self._asked)
        else:
            self._stop()
            self._start(self._asked or math.inf)
        assert self._open is not None
        return EpochOfStream(self._open, self)

    def close(self) -> None:
        """End prefetching."""
        self._stop()
        self._end_epoch()

    def _start(
        self,
        allowed: float,
        *,
        batches: Iterator[Any] | None = None,
        usual: tuple[Any, ...] | None = None,
    ) -> None:
        self._begin_epoch()
        self._taken = 0
        self._passes += 1
        number = 0 if is_pure(self._given) else self._passes
        jumped = batches is not None

        def mark(place: int, batch: tuple[Any, ...]) -> None:
            if not jumped and _is_dense(batch) and (number, place) not in self._marks:
                self._marks[number, place] = _checksum(batch)

        self._open = StreamPass(
            iter(self._batches) if batches is None else batches,
            self._place,
            allowed=allowed,
            loosens=self._loosens,
            read=self._read,
            usual=usual,
            mark=mark,
            patient=self._patient,
        )

    @property
    def patient(self) -> bool:
        """Whether chunks are cut by the number of batches alone, however slow."""
        return self._patient

    @patient.setter
    def patient(self, value: bool) -> None:
        self._patient = value
        if self._open is not None:
            self._open.patient = value

    def _stop(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open, self._untouched = None, False

    def _begin_epoch(self) -> None:
        if not self._within_epoch:
            self._within_epoch = True
            self._batches.on_epoch_begin()

    def _end_epoch(self) -> None:
        if self._within_epoch:
            self._within_epoch = False
            self._batches.on_epoch_end()

    def took(self, steps: int) -> None:
        """Count steps of the pass that is open. Called by the epoch."""
        self._taken += steps

    def ended(self, steps: int) -> None:
        """Take note that an epoch found the end of the data after so many steps."""
        expected = self.steps
        if expected is None:
            self._length = steps
        elif steps < expected:
            ran_dry(stacklevel=3)
        self._stop()

    def finish(self) -> None:
        """End an epoch: keep the pass only where the next epoch goes on with it."""
        through = self._length is not None and self._taken >= self._length
        if self._asked is None or through or not self._continues:
            self._stop()
        self._end_epoch()


class EpochOfStream:
    """An epoch of a stream: a pass, or the part of one."""

    def __init__(
        self, current: StreamPass, source: StreamSource, start: int = 0
    ) -> None:
        self._pass, self._source = current, source
        self._steps = start
        self._ended = False

    def peek(self) -> Segment | None:
        """What comes next, without taking it; `None` at the end."""
        return None if self._ended else self._pass.peek()

    def take(self, limit: int) -> Segment | None:
        """The next steps, at most `limit`, or `None` at the end."""
        segment = None if self._ended else self._pass.take(limit)
        if segment is not None:
            self._steps += segment.steps
            self._source.took(segment.steps)
        elif not self._ended:
            self._ended = True
            self._source.ended(self._steps)
        return segment

    def close(self) -> None:
        """The epoch is over; whether the pass is, the source knows."""
        self._source.finish()


def _drop(data: EpochOfStream, steps: int) -> None:
    """Read so many steps, and train on none of them."""
    while steps > 0:
        segment = data.take(min(steps, CHUNK_STEPS))
        if segment is None:
            return
        steps -= segment.steps


def _checksum(batch: tuple[Any, ...]) -> int:
    import keras

    value = 0
    for leaf in keras.tree.flatten(batch):
        value = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, value)
    return value


def ran_dry(*, stacklevel: int) -> None:
    """Warn, in Keras's words, that an epoch has fewer steps than it was to have."""
    warnings.warn(
        "Your input ran out of data; interrupting training. Make sure that your "
        "dataset or generator can generate at least `steps_per_epoch * epochs` "
        "batches. You may need to use the `.repeat()` function when building your "
        "dataset.",
        stacklevel=stacklevel + 1,
    )


def whole(
    batch: tuple[Any, ...], specs: Any, rows: int, place: Callable[[Any], Any]
) -> Feed:
    """A feed of one batch that cannot be cut out of a longer array."""
    import keras

    return Feed(
        kind="whole",
        arrays=keras.tree.map_structure(
            lambda leaf: place(leaf) if isinstance(leaf, np.ndarray) else leaf.value,
            batch,
        ),
        order=None,
        batch_size=rows,
        specs=specs,
        signature=("whole", repr(specs)),
    )


def as_batch(
    raw: Any,
    *,
    native: Callable[[Any], Native | None] = lambda leaf: None,
    any_parts: bool = False,
) -> tuple[Any, ...]:
    """A batch as a tuple (x, y, sample_weight) of NumPy trees, cut after the last.

    Args:
        raw: What the iterator gave.
        native: Takes a leaf that is no dense array of numbers as the framework has it.
        any_parts: Whether there may be more parts than three.

    Raises:
        DataError: Something that is not one to three parts of arrays.
    """
    import keras

    parts = tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)
    while parts and parts[-1] is None:
        parts = parts[:-1]
    leaves = keras.tree.flatten(parts)
    right = len(parts) >= 1 and (any_parts or len(parts) <= 3)
    if not right or any(leaf is None for leaf in leaves):
        raise DataError(
            "A batch must be x, (x, y) or (x, y, sample_weight), without None "
            f"in between. Received: {_describe(raw)}"
        )

    def leaf_of(value: Any) -> Any:
        found = native(value)
        return on_host(value) if found is None else found

    batch: tuple[Any, ...] = keras.tree.map_structure(leaf_of, parts)
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
        lambda a: a.spec if isinstance(a, Native) else Spec(a.shape, a.dtype.name),
        batch,
    )
    return specs


def _is_dense(batch: tuple[Any, ...]) -> bool:
    import keras

    return not any(isinstance(leaf, Native) for leaf in keras.tree.flatten(batch))


def _capacity(specs: tuple[Any, ...]) -> int:
    import keras

    leaves = keras.tree.flatten(specs)
    if any(isinstance(leaf, NativeSpec) for leaf in leaves):
        return 1
    size_bytes = sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves
    )
    return int(max(1, min(CHUNK_STEPS, CHUNK_BYTES // max(1, size_bytes))))
