"""A file of arrays as safetensors defines it, written and read one array at a time.

Eight bytes say how long the header is; the header is JSON and says of each array its
dtype, shape and place; then come the arrays, one after the other. The functions of
the package `safetensors` that write take all arrays at once, as arrays of the host,
and give no checksum. So the few lines that this takes are here.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from loopscope.run.plain import numpy_dtype

Kind = tuple[str, tuple[int, ...]]
"""The name of an array's dtype, and its shape."""

BLOCK_BYTES = 2**22
"""So much is hashed and written at a time."""

TAGS = {
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
"""What safetensors reads into NumPy under its own name; the rest goes as bytes."""

DTYPES = {tag: np.dtype(name) for name, tag in TAGS.items()}


def head(kinds: Mapping[str, Kind]) -> bytes:
    """What comes before the arrays, which must follow in this order."""
    header, begin = {}, 0
    for name, (dtype, given) in kinds.items():
        itemsize, shape = numpy_dtype(dtype).itemsize, list(given)
        end = begin + math.prod(shape) * itemsize
        if dtype not in TAGS:
            shape.append(itemsize)
        header[name] = {
            "dtype": TAGS.get(dtype, "U8"),
            "shape": shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def body(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array, block by block; copies nothing that is contiguous."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for begin in range(0, len(data), BLOCK_BYTES):
        yield data[begin : begin + BLOCK_BYTES]


def mapped(file: BinaryIO, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays of a file, where they lie: what is not looked at is not read.

    Args:
        file: Open for reading; it may be closed, and removed, before the arrays are
            looked at.
        dtypes: The dtype of each, which those that went as bytes get back.

    Raises:
        ValueError, KeyError, struct.error: It is no such file.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack_from("<Q", data)
    first = 8 + length
    arrays = {}
    for name, about in json.loads(data[8:first]).items():
        if name == "__metadata__":
            continue
        (begin, end), tag = about["data_offsets"], DTYPES[about["dtype"]]
        count = (end - begin) // tag.itemsize
        array = np.frombuffer(data, tag, count, first + begin).reshape(about["shape"])
        if dtypes[name] not in TAGS:
            array = array.view(numpy_dtype(dtypes[name])).reshape(array.shape[:-1])
        arrays[name] = array
    return arrays
