"""The processes of JAX that train one model together, and what they say to each other.

Each runs the same programs over the same steps, on devices of its own. What only one
of them does must ask nothing of the others, or it would wait for them forever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from keras.src.backend.jax import distribution_lib

from loopscope.backend import jax_devices as devices
from loopscope.backend.base import Alone, Team
from loopscope.cluster import Place
from loopscope.errors import UsageError

ROUND_BYTES = 1024
"""What fits into the first round of a message, its length included."""

LENGTH_BYTES = 8

SIGNS = ("Gloo", "coordination service", "heartbeat")
"""What JAX says where another process is gone."""


class Workers:
    """The processes that have devices in a mesh; the first of them is the chief.

    Attributes:
        rank: Of this process.
        size: How many.
    """

    def __init__(self, mesh: Mesh) -> None:
        firsts: dict[int, Any] = {}
        for device in mesh.devices.flat:
            firsts.setdefault(device.process_index, device)
        ranks = sorted(firsts)
        self.rank, self.size = ranks.index(jax.process_index()), len(ranks)
        among = Mesh(np.array([firsts[index] for index in ranks]), ("worker",))
        self._each = NamedSharding(among, PartitionSpec("worker"))
        self._of_chief = jax.jit(
            lambda rows: rows[0], out_shardings=devices.whole(among)
        )
        self._of_all = jax.jit(lambda rows: rows, out_shardings=devices.whole(among))

    def agree(self, message: bytes) -> bytes:
        """What the chief has given, on every worker.

        A message that does not fit into the first round takes a second one, of a power
        of two of bytes, so that few programs are made.
        """
        start = len(message).to_bytes(LENGTH_BYTES, "little") + message
        first = self._said(start[:ROUND_BYTES], ROUND_BYTES)
        length = int.from_bytes(first[:LENGTH_BYTES], "little")
        said, rest = first[LENGTH_BYTES:], length + LENGTH_BYTES - ROUND_BYTES
        if rest > 0:
            size = 1 << (rest - 1).bit_length()
            # Who is not the chief has nothing to say, but maybe a longer message.
            said += self._said(start[ROUND_BYTES:][:size], size)
        return said[:length]

    def gather(self, data: bytes) -> list[bytes]:
        """What each has given, by rank. A program is made for every length."""
        row = np.frombuffer(data, np.uint8)[None]
        rows = jax.make_array_from_process_local_data(self._each, row)
        return [found.tobytes() for found in np.asarray(self._of_all(rows))]

    def lost(self, error: Exception) -> bool:
        """Whether this is what JAX says when a worker is gone."""
        # What a compiled step raises is a ValueError where its status is unknown.
        known = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
        return known and any(sign in str(error) for sign in SIGNS)

    def _said(self, part: bytes, size: int) -> bytes:
        row = np.zeros((1, size), np.uint8)
        row[0, : len(part)] = np.frombuffer(part, np.uint8)
        rows = jax.make_array_from_process_local_data(self._each, row)
        return np.asarray(self._of_chief(rows)).tobytes()


def team() -> Team:
    """The processes that the distribution which is set is over."""
    if not several():
        return Alone()
    _assign_without_asking()
    return _workers(devices.mesh_of(devices.current()))


_workers = cache(Workers)


def several() -> bool:
    """Whether the distribution that is set is over several processes."""
    distribution = devices.current()
    if distribution is None:
        return False
    there = devices.mesh_of(distribution).devices.flat
    return len({device.process_index for device in there}) > 1


@cache
def _assign_without_asking() -> None:
    """Let a process assign a variable alone, as a callback of the chief does.

    Keras brings the value to the devices by `jax.device_put`, which asks all processes
    whether they have given the same.
    """
    real: Callable[[Any, Any], Any] = distribution_lib.distribute_tensor

    def distribute(tensor: Any, layout: Any) -> Any:
        at = getattr(layout, "backend_layout", layout)
        if isinstance(tensor, jax.core.Tracer) or at.is_fully_addressable:
            return real(tensor, layout)
        if isinstance(tensor, jax.Array) and not tensor.is_fully_addressable:
            return real(tensor, layout)
        host = np.asarray(tensor)
        return jax.make_array_from_callback(host.shape, at, lambda index: host[index])

    distribution_lib.distribute_tensor = distribute


HEARTBEAT_S = 30
"""A process that is not heard of for so long is gone."""


@contextmanager
def joined(place: Place) -> Iterator[None]:
    """A block in which all processes divide rows; the distribution stays set.

    Raises:
        UsageError: JAX has begun to compute already.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            # Not the coordinator: where torchrun says to meet, it listens itself.
            place.addresses[0],
            place.size,
            place.rank,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        raise UsageError(
            "JAX joins other processes only before it computes anything. Enter "
            f"`loopscope.join()` first, before arrays are made. It says: {error}"
        ) from error
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    with _silent():
        team().agree(b"")
    yield


@contextmanager
def _silent() -> Iterator[None]:
    """Gloo says on standard output whom it has met, where it is first used."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


__all__ = ["Workers", "joined", "several", "team"]
