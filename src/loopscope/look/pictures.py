"""Examples as pictures, where they are some."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np

from loopscope.look.stats import as_float

FAR = 4
"""How many times the usual range an example may span before it is cut off."""

LEAST = 14
"""The least side of a flattened picture: shorter rows are taken for plain numbers."""


def pictures(x: object) -> np.ndarray | None:
    """Examples as pictures, uint8 of shape `(B, height, width, channels)`.

    Taken for pictures: shapes `(B, h, w)`, `(B, h, w, 1)`, `(B, h, w, 3)`, and rows of
    numbers whose count is a square, as of flattened MNIST. Each batch is scaled from
    its smallest value to its largest; where an example reaches `FAR` times as far as
    half of them do, it is cut off, for it would leave the others black.

    Args:
        x: An input of a batch.

    Returns:
        The pictures, or `None` if these are none.
    """
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biufV":
        return None
    values = as_float(x)
    if values.ndim == 2:
        side = math.isqrt(values.shape[1])
        if side < LEAST or side * side != values.shape[1]:
            return None
        values = values.reshape(-1, side, side)
    if values.ndim == 3 and min(values.shape[1:]) > 1:
        values = values[..., None]
    if values.ndim != 4 or values.shape[-1] not in (1, 3):
        return None
    low, high = _range(values)
    scaled = (np.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0)
    return np.asarray(np.clip(255 * scaled, 0, 255).astype(np.uint8))


def _range(values: np.ndarray) -> tuple[float, float]:
    """From where to where a batch of pictures is shown."""
    finite = np.isfinite(values)
    if not finite.any():
        return 0.0, 0.0
    axes = (1, 2, 3)
    lows = np.where(finite, values, np.inf).min(axis=axes)
    highs = np.where(finite, values, -np.inf).max(axis=axes)
    some = np.isfinite(lows)
    usual_low, usual_high = np.median(lows[some]), np.median(highs[some])
    reach = FAR * (usual_high - usual_low)
    low, high = lows[some].min(), highs[some].max()
    if reach and high > usual_high + reach:
        high = usual_high
    if reach and low < usual_low - reach:
        low = usual_low
    return float(low), float(high)


def png(picture: np.ndarray) -> bytes:
    """A picture of shape `(height, width, 1 or 3)`, uint8, as a PNG file.

    Source: the format is W3C's Portable Network Graphics, https://www.w3.org/TR/png/.
    """
    height, width, channels = picture.shape
    rows = picture.reshape(height, width * channels)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    colour = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", _crc(kind, data))
        for kind, data in parts
    )


def data_uri(picture: np.ndarray) -> str:
    """A picture as the `src` of an `<img>`."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _crc(kind: bytes, data: bytes) -> int:
    return zlib.crc32(kind + data)
