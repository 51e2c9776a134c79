"""The processes that train one model together on PyTorch: a team.

What they say to each other are `torch.distributed`'s own collectives, over gloo, in
the form that has a place in a graph. What a step says is in torch_parts.py.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from loopscope.cluster import TORCHRUN, Place
from loopscope.errors import UsageError, WorkerError

TIMEOUT = timedelta(minutes=10)
"""How long a worker waits for the others, where loopscope makes the process group."""

HEAD = 1024
"""Bytes of the first message of `agree`; most need no second one."""


def joined() -> Workers | None:
    """The team that this process belongs to; `None` where it is alone.

    Makes the process group that a launcher has described, if nobody has made one.
    """
    global _TEAM
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        told = all(name in os.environ for name in TORCHRUN)
        if not told or int(os.environ["WORLD_SIZE"]) < 2:
            return None
        dist.init_process_group("gloo", timeout=TIMEOUT)
    group = dist.group.WORLD
    if dist.get_world_size(group) < 2:
        return None
    if _TEAM is None or _TEAM.group is not group:
        _TEAM = Workers(group)
    return _TEAM


@contextmanager
def join(place: Place) -> Iterator[None]:
    """A block in which this process is a worker; the group stays.

    Where a launcher, such as Ray's, has made the group already, it is taken.
    """
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{place.coordinator}",
            rank=place.rank,
            world_size=place.size,
            timeout=TIMEOUT,
        )
    yield


_TEAM: Workers | None = None


class Workers:
    """All processes of a group, as one of them sees them.

    Args:
        group: A process group that has gloo.

    Raises:
        UsageError: It has not.
    """

    def __init__(self, group: Any) -> None:
        kind = str(dist.get_backend_config(group))
        if "gloo" not in kind:
            raise UsageError(
                "Steps are divided among the workers of a process group that has gloo. "
                f"Received: a group of {kind!r}. Make it with "
                '`torch.distributed.init_process_group("gloo")`.'
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._lost: str | None = None

    def agree(self, message: bytes) -> bytes:
        """What the chief has given, on every worker: one message, or two if long."""
        told = len(message).to_bytes(8, "little") + message
        with self.waiting():
            head = self._told(told[:HEAD], HEAD)
            length = int.from_bytes(head[:8], "little") + 8
            if length > HEAD:
                head += self._told(told[HEAD:], length - HEAD)
        return head[8:length]

    def gather(self, data: bytes) -> list[bytes]:
        """What each has given, by rank."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.waiting():
            dist.all_gather(found, mine, self.group)
        return [bytes(theirs.numpy()) for theirs in found]

    def lost(self, error: Exception) -> bool:
        """Never: `waiting` has said it already."""
        return False

    def _told(self, data: bytes, length: int) -> bytes:
        """Some of what the chief has, on every worker."""
        buffer = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, 0, self.group)
        return bytes(buffer.numpy())

    def sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each tensor summed over all workers, in one message for each dtype."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for place, tensor in enumerate(tensors):
            by_dtype.setdefault(tensor.dtype, []).append(place)
        sums = list(tensors)
        for places in by_dtype.values():
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
            total = OPS.wait_tensor(OPS.all_reduce(flat, "sum", self.group.group_name))
            parts = total.split([tensors[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                sums[i] = part.reshape(tensors[i].shape)
        return sums

    def concat(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The rows of all workers in order; `rows` says how many each has."""
        most = max(rows)
        padding = tensor.new_zeros((most - len(tensor), *tensor.shape[1:]))
        gathered = OPS.wait_tensor(
            OPS.all_gather_into_tensor(
                torch.cat([tensor.detach(), padding]), self.size, self.group.group_name
            )
        )
        parts = [gathered[i * most :][:count] for i, count in enumerate(rows)]
        return torch.cat(parts)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which workers wait for each other.

        Raises:
            WorkerError: Another one is gone, or was not heard of in time.
        """
        if self._lost is not None:
            raise WorkerError(self._lost)
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if "gloo" not in str(error).lower():
                raise
            waited_s = time.monotonic() - began
            self._lost = (
                f"Worker {self.rank} of {self.size} has lost another one, "
                f"{waited_s:.1f} s after it began to wait: it has ended, or was not "
                "heard of in time. What each worker has printed last says why. Start "
                "all of them again: a training with `run=` goes on from its last "
                f"checkpoint with `resume=True`. PyTorch says: {_first(error)}"
            )
            raise WorkerError(self._lost) from error


OPS: Any = torch.ops._c10d_functional


def _first(error: BaseException) -> str:
    """The first sentence of an error of gloo's, without its line of source."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]


__all__ = ["TIMEOUT", "Workers", "join", "joined"]
