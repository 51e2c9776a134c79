"""Data of which each worker reads its own part.

Without it every worker reads all data and takes its rows of each batch, which is simple
and reads a file as often as there are workers. How a batch whose rows do not come out
even is trained on, and how workers agree upon it, is here; what is read, the user says.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope.data import source
from loopscope.data.feed import Feed, Native, Segment, Spec, on_host, placed
from loopscope.data.source import Pass, Source
from loopscope.data.stream import EpochOfStream, StreamSource, whole
from loopscope.errors import DataError

if TYPE_CHECKING:
    from loopscope.backend.base import Backend
    from loopscope.data.adapters import Shuffled
    from loopscope.together import Together


class Sharded:
    """Data that each worker reads a part of: data by worker.

    Give it wherever `fit` takes a dataset of batches. Of each batch a worker has its
    own rows; together they are the batch of the step. With one process the part is all.

    Example:
        ```python
        import loopscope
        import tensorflow as tf


        def part(index, count):
            examples = tf.data.Dataset.range(640).shuffle(640, seed=0)
            return examples.shard(count, index).batch(64 // count)


        data = loopscope.Sharded(part)
        ```

    Each example is trained on once an epoch, on one of the workers, an uneven end
    included: a batch of which workers do not have equally many rows is exchanged among
    them, whole. That costs a copy of its rows to every worker, and is meant for the end
    of an epoch. To get the same batches with any number of workers, take every
    `count`th example after shuffling and before batching, as above.

    Args:
        part: `part(index, count)` gives the batches of worker `index` of `count`: a
            tf.data dataset, a Grain dataset, a torch DataLoader, a `PyDataset`, or any
            iterable of batches that can be iterated anew in each epoch. A batch has the
            rows of this worker, dense arrays, `B / count` where B are those of a step.
            Called once in each process.
    """

    def __init__(self, part: Callable[[int, int], Any]) -> None:
        if not callable(part):
            raise DataError(
                "Expected a function `part(index, count)` that gives the batches of "
                f"one worker. Received: {type(part).__name__}"
            )
        self.part = part


def as_source(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    backend: Backend,
    together: Together,
    **options: Any,
) -> Source:
    """A source over whatever `fit` takes, or over this worker's part of it.

    All workers call it; where data come by worker, they wait for each other.

    Raises:
        DataError: Data that no step could be run on.
    """
    if isinstance(x, ShardedSource):
        return x
    if not isinstance(x, Sharded):
        return source.as_source(x, y, sample_weight, backend=backend, **options)
    mine = x.part(together.rank, together.size)
    place = np.asarray if together.several else None
    found = source.as_source(
        mine, y, sample_weight, backend=backend, place=place, **options
    )
    if not isinstance(found, StreamSource):
        raise DataError(
            "Data by worker have to be batches already: a dataset or an iterable of "
            "tuples (x, y), each of this worker's rows. "
            f"Received: {type(mine).__name__}"
        )
    if not together.several:
        return found
    return ShardedSource(found, backend, together)


class ShardedSource:
    """Batches of which each worker has its own rows.

    Args:
        part: This worker's, whose arrays stay on the host.
        backend: Makes a feed of all of them.
        together: The workers.
    """

    def __init__(
        self, part: StreamSource, backend: Backend, together: Together
    ) -> None:
        self._part, self._backend, self._together = part, backend, together
        self.ragged = True
        self._steps = self._longest(part.steps)
        self._specs: tuple[Any, ...] | None = None
        self._last: tuple[Feed, Feed] | None = None
        """A feed of this worker and the one of all that was made of it."""

    def _longest(self, steps: int | None) -> int | None:
        """The most steps that a worker has; `None` where one does not know."""
        known = [n for (n,) in self._together.numbers(-1 if steps is None else steps)]
        return None if min(known) < 0 else max(known)

    @property
    def steps(self) -> int | None:
        """The steps of an epoch on the worker that has most of them."""
        return self._steps

    @property
    def specs(self) -> tuple[Any, ...]:
        """`Spec`s of a full batch, of all workers.

        Raises:
            DataError: There is none, or workers have batches of other kinds.
        """
        if self._specs is None:
            mine = self._part.specs
            said = [pickle.loads(d) for d in self._together.collected(_told(mine))]
            other = next(
                (i for i, theirs in enumerate(said) if theirs != said[0]), None
            )
            if other is not None:
                raise DataError(
                    "Data by worker: expected batches of the same shapes and dtypes on "
                    f"every worker. Received: {said[0]} on worker 0, {said[other]} on "
                    f"worker {other}"
                )
            self._specs = self._scaled(mine)
        return self._specs

    def _scaled(self, specs: tuple[Any, ...]) -> tuple[Any, ...]:
        import keras

        def of_all(spec: Any) -> Spec:
            rows, *rest = spec.shape
            if not isinstance(spec, Spec) or rows is None:
                raise DataError(
                    "Data by worker have to be dense arrays of a known number of rows. "
                    f"Received: {spec}"
                )
            everyone = Spec((rows * self._together.size, *rest), spec.dtype)
            found: Spec = placed(everyone, self._backend.place)
            return found

        found: tuple[Any, ...] = keras.tree.map_structure(of_all, specs)
        return found

    @property
    def jumps(self) -> bool:
        """As this worker's part."""
        return self._part.jumps

    @property
    def repeats(self) -> bool:
        """As this worker's part."""
        return self._part.repeats

    @property
    def patient(self) -> bool:
        """As this worker's part."""
        return self._part.patient

    @patient.setter
    def patient(self, value: bool) -> None:
        self._part.patient = value

    def inexact(self) -> str | None:
        """As this worker's part."""
        return self._part.inexact()

    def fetch_s(self) -> float | None:
        """As this worker's part."""
        return self._part.fetch_s()

    def shuffles(self) -> Sequence[Shuffled]:
        """As this worker's part."""
        return self._part.shuffles()

    def examples(self, epoch: int, index: int) -> None:
        """None: batches that come have no numbers."""

    def marks(self) -> Mapping[str, int]:
        """Those of this worker's part, which only the same worker of as many has."""
        who = f"{self._together.rank} of {self._together.size}"
        return {f"{key} on {who}": crc for key, crc in self._part.marks().items()}

    def replay(self, passes: Sequence[tuple[int, int]]) -> None:
        """Stand where these passes have led, with this worker's part."""
        self._part.replay(passes)

    def open(self, epoch: int, start: int = 0) -> Pass:
        """The data of an epoch, from step `start` on."""
        return _EpochOfWorkers(self, self._part.open(epoch, start), start)

    def shown(self) -> tuple[Any, ...]:
        """This worker's first rows."""
        return self._part.shown()

    def sample(self) -> Segment:
        """Some steps for measuring; nothing is used up. All workers ask."""
        segment = self._part.sample()
        steps = self.common(segment)
        if steps:
            feed = self.of_all(segment.feed)
            return Segment(feed, segment.start, segment.start + steps)
        return self.exchanged(segment)

    def close(self) -> None:
        """End what prefetches."""
        self._part.close()

    # What a pass asks of it.

    def common(self, segment: Segment | None) -> int | None:
        """How many steps all workers can go on with, each with its own rows.

        0 where a batch has to be exchanged, `None` where nobody has any. All of them
        ask, each with what it has next.
        """
        usual = _first_axis(self.specs) // self._together.size
        steps = 0
        if segment is not None and segment.feed.kind == "slice":
            steps = segment.steps if segment.feed.batch_size == usual else 0
        everyone = self._together.numbers(int(segment is not None), steps)
        if not any(there for there, _ in everyone):
            return None
        return min(steps for _, steps in everyone)

    def of_all(self, feed: Feed) -> Feed:
        """The feed of all workers that this one's is a part of."""
        if self._last is None or self._last[0] is not feed:
            size = self._together.size
            made = self._backend.of_workers(
                replace(
                    feed,
                    batch_size=feed.batch_size * size,
                    specs=self._scaled(feed.specs),
                    signature=("workers", size, *feed.signature),
                    parts=size,
                )
            )
            self._last = feed, made
        return self._last[1]

    def exchanged(self, segment: Segment | None) -> Segment:
        """The next batch with the rows that all workers have of it, on each of them."""
        import keras

        rows = None if segment is None else _leaves(segment)
        said = self._together.collected(pickle.dumps(rows))
        parts = [leaves for leaves in map(pickle.loads, said) if leaves is not None]
        arrays = [np.concatenate(leaves) for leaves in zip(*parts, strict=True)]
        specs = keras.tree.pack_sequence_as(
            self.specs,
            [placed(Spec(a.shape, a.dtype.name), self._backend.place) for a in arrays],
        )
        batch = keras.tree.pack_sequence_as(self.specs, arrays)
        feed = whole(batch, specs, len(arrays[0]), self._backend.place)
        return Segment(feed, 0, 1)

    def ended(self, steps: int) -> None:
        """Take note of how many steps an epoch had, where nobody knew."""
        if self._steps is None:
            self._steps = steps


class _EpochOfWorkers:
    """An epoch of all workers, as one of them goes through its part."""

    def __init__(self, all_of: ShardedSource, part: EpochOfStream, start: int) -> None:
        self._source, self._part, self._steps = all_of, part, start

    def take(self, limit: int) -> Segment | None:
        """The next steps, at most `limit`, equally many on all workers."""
        segment = self._part.peek()
        steps = self._source.common(segment)
        if steps is None:
            self._part.take(limit)
            self._source.ended(self._steps)
            return None
        steps = min(steps, limit)
        if steps:
            taken = self._part.take(steps)
            assert taken is not None
            found = Segment(self._source.of_all(taken.feed), taken.start, taken.stop)
        else:
            found = self._source.exchanged(segment)
            if segment is not None:
                self._part.take(1)
        self._steps += found.steps
        return found

    def close(self) -> None:
        """The epoch is over."""
        self._part.close()


def _first_axis(specs: tuple[Any, ...]) -> int:
    import keras

    return int(keras.tree.flatten(specs)[0].shape[0])


def _leaves(segment: Segment) -> list[np.ndarray]:
    """The arrays of a segment's first batch, on the host."""
    import keras

    leaves = keras.tree.flatten(segment.feed.arrays)
    if any(isinstance(leaf, Native) or not hasattr(leaf, "dtype") for leaf in leaves):
        raise DataError(
            f"Data by worker have to be dense arrays. Received: {segment.feed.specs}"
        )
    if segment.feed.kind == "whole":
        return [on_host(leaf) for leaf in leaves]
    start = segment.start * segment.feed.rows
    return [leaf[start : start + segment.feed.rows] for leaf in leaves]


def _told(specs: tuple[Any, ...]) -> bytes:
    import keras

    return pickle.dumps([str(spec) for spec in keras.tree.flatten(specs)])


__all__ = ["Sharded", "as_source"]
