"""Taking data apart: x, y and sample_weight, training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope.data.adapters import can_slice, split_sparse
from loopscope.data.source import as_arrays, is_arrays, is_batches
from loopscope.errors import DataError

if TYPE_CHECKING:
    from loopscope.backend.base import Backend


def unpack(data: Any) -> tuple[Any, Any, Any]:
    """(x, y, sample_weight) of `validation_data`; what is missing is `None`."""
    if not isinstance(data, (tuple, list)) or is_batches(data):
        return data, None, None
    if not 1 <= len(data) <= 3:
        raise DataError(
            "`validation_data` must be x, (x, y), (x, y, sample_weight) or an iterable "
            f"of batches. Received: a {type(data).__name__} of {len(data)}"
        )
    x, y, sample_weight = (*data, None, None)[:3]
    return x, y, sample_weight


def split(
    parts: tuple[Any, Any, Any], share: float, backend: Backend
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """The first rows for training and the last `share` of them for validation.

    Raises:
        DataError: A share outside (0, 1), data that are no arrays, or a share that
            leaves one side empty.
    """
    import keras

    given = [p for p in parts if p is not None]
    if not 0 < share < 1:
        raise DataError(
            "`validation_split` must lie between 0 and 1. "
            f"Received: validation_split={share}"
        )
    dense = all(is_arrays(part, backend) for part in given)
    if not dense and can_slice(parts):
        return split_sparse(parts, share)
    if not dense:
        raise DataError(
            "`validation_split` works on arrays only. Give `validation_data` instead. "
            f"Received: x of type {type(parts[0]).__name__}"
        )
    arrays = [None if p is None else as_arrays(p, backend) for p in parts]
    rows = int(keras.tree.flatten(arrays[0])[0].shape[0])
    cut = int(np.floor(rows * (1 - share)))
    if cut in (0, rows):
        raise DataError(
            f"validation_split={share} of {rows} examples leaves one side empty."
        )

    def part(start: int, stop: int) -> tuple[Any, Any, Any]:
        x, y, weight = (
            None if a is None else keras.tree.map_structure(lambda v: v[start:stop], a)
            for a in arrays
        )
        return x, y, weight

    return part(0, cut), part(cut, rows)
