"""What was assigned to variables between two steps, by callbacks and the like.

Steps alone do not make the next state: metrics are reset, a callback lowers the
learning rate. Recorded, such writes let steps be run again without the callbacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from loopscope.backend.base import Backend
from loopscope.run.plain import numpy_dtype
from loopscope.state import changed

WRITE_BYTES = 2**20
"""Writes between two steps are recorded up to this size in all; above it, steps are
replayed from a checkpoint that is made there."""

BARRIER = ""
"""The path of a write that was too large to record."""

Write = tuple[str, str, str, bytes | None]
"""Path, dtype, shape as JSON, and bytes; a barrier has none."""


def writes(
    before: Mapping[str, Any], now: Mapping[str, Any], backend: Backend
) -> list[Write]:
    """What has changed from one look at all variables to another."""
    if before.keys() != now.keys():
        return [(BARRIER, "", "[]", None)]
    found: list[Write] = []
    size = 0
    for path, value in changed(before, now, backend):
        shape = json.dumps(list(value.shape))
        found.append((path, value.dtype.name, shape, value.tobytes()))
        size += value.nbytes
    return found if size <= WRITE_BYTES else [(BARRIER, "", "[]", None)]


def value_of(dtype: str, shape: str, data: bytes) -> np.ndarray:
    """The array of a recorded write."""
    return np.frombuffer(data, numpy_dtype(dtype)).reshape(json.loads(shape))
