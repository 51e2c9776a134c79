"""The processes of a `tf.distribute.MultiWorkerMirroredStrategy`, and what they say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from loopscope.cluster import TF_CONFIG, Place, tf_config
from loopscope.errors import UsageError

SIZE, MUCH = 1024, 2**20
"""Bytes of one message, and of one for data; longer ones are sent in several."""

LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
)
SIGNS = ("heartbeat", "Collective ops is aborted", "coordination", "Connection reset")
"""What TensorFlow says where another task is gone, whatever the kind of error."""


class Workers:
    """The workers of a strategy.

    Args:
        strategy: A `tf.distribute.MultiWorkerMirroredStrategy`.
    """

    def __init__(self, strategy: Any) -> None:
        extended = strategy.extended
        resolver = strategy.cluster_resolver
        chief = bool(extended.should_checkpoint)
        workers = len(resolver.cluster_spec().as_dict().get("worker", ()))
        chiefs = len(resolver.cluster_spec().as_dict().get("chief", ()))
        self.size = workers + chiefs
        first = 0 if resolver.task_type == "chief" else chiefs
        self.rank = 0 if chief else first + int(resolver.task_id)

        def add(message: Any) -> Any:
            def on_one() -> Any:
                context = tf.distribute.get_replica_context()
                index = tf.get_static_value(context.replica_id_in_sync_group)
                first = index % max(1, strategy.extended._num_devices_per_worker) == 0
                # Where it lies on a device of the replica it can be sent.
                mine = tf.identity(message) if first else tf.zeros_like(message)
                return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

            return strategy.experimental_local_results(strategy.run(on_one))[0]

        self._adds = {
            size: tf.function(
                add, [tf.TensorSpec([size // 4], "int32")], autograph=False
            )
            for size in (SIZE, MUCH)
        }

    def agree(self, message: bytes) -> bytes:
        """What the chief has given, on every worker: a sum to which others add none."""
        given = len(message).to_bytes(8, "little") + message
        found = self._sent(given[:SIZE])
        size = 8 + int.from_bytes(found[:8], "little")
        for start in range(SIZE, size, SIZE):
            found += self._sent(given[start : start + SIZE])
        return found[8:size]

    def gather(self, data: bytes) -> list[bytes]:
        """What each has given: a sum to which each adds in a place of its own."""
        size = len(data)
        if size > SIZE:
            return [self._of(rank, data) for rank in range(self.size)]
        found = b""
        for first in range(0, self.size, SIZE // size):
            here = min(SIZE // size, self.size - first)
            place = self.rank - first
            mine = data.rjust((place + 1) * size, b"\0") if 0 <= place < here else b""
            found += self._added(mine)[: here * size]
        return [found[i * size : (i + 1) * size] for i in range(self.size)]

    def _sent(self, part: bytes) -> bytes:
        return self._added(part if self.rank == 0 else b"")

    def _of(self, rank: int, data: bytes) -> bytes:
        """What one of them has given, which others know the length of."""
        found = bytearray()
        for start in range(0, len(data), MUCH):
            mine = data[start : start + MUCH] if rank == self.rank else b""
            found += self._added(mine, MUCH)
        return bytes(found[: len(data)])

    def _added(self, part: bytes, size: int = SIZE) -> bytes:
        numbers = np.frombuffer(part.ljust(size, b"\0"), np.int32)
        found: bytes = self._adds[size](tf.constant(numbers)).numpy().tobytes()
        return found

    def lost(self, error: Exception) -> bool:
        """Whether this is what TensorFlow says when a worker is gone."""
        if isinstance(error, LOST):
            return True
        known = isinstance(error, tf.errors.OpError)
        return known and any(sign in str(error) for sign in SIGNS)


def workers_of(strategy: Any) -> Workers | None:
    """The workers of a strategy, or `None` where it is of one process."""
    if strategy is None or not strategy.extended._in_multi_worker_mode():
        return None
    workers = Workers(strategy)
    return workers if workers.size > 1 else None


@contextmanager
def joined(place: Place) -> Iterator[None]:
    """A block under a strategy of all workers, which TensorFlow finds by `TF_CONFIG`.

    Raises:
        UsageError: TensorFlow has begun to compute already.
    """
    os.environ[TF_CONFIG] = tf_config(place)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        if "program startup" not in str(error):
            raise
        raise UsageError(
            "TensorFlow joins other processes only before it computes anything. Enter "
            f"`loopscope.join()` first, before tensors are made. It says: {error}"
        ) from error
    with strategy.scope():
        yield


__all__ = ["Workers", "joined", "workers_of"]
