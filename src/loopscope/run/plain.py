"""Python values as JSON and arrays, and back: no pickle, nothing to execute.

What JSON cannot say is a dict with one key that begins with `$`: a tuple, a set, a
dict whose keys are not text, bytes, a float that is not finite, a NumPy array (which
goes among the arrays) or NumPy number.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from loopscope.data.feed import Spec

Arrays = dict[str, np.ndarray]


class NotPlain(TypeError):
    """A value that is code, an open file or an object: not plain data."""


def encode(value: Any, arrays: Arrays, name: str) -> Any:
    """The value as JSON; arrays in it are put into `arrays`, under names from `name`.

    Raises:
        NotPlain: There is something in it that is not plain data.
    """
    try:
        return _encode(value, arrays, name)
    except RecursionError as error:
        raise NotPlain(f"{name}: it holds itself, or is nested too deep") from error


def readable(value: Any) -> Any:
    """A value for those who only read it: JSON that every reader takes.

    Numbers that are not finite are text, and so is what is not plain data.
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {str(k): readable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [readable(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # A NumPy number or array.
        return readable(value.tolist())
    return str(value)


def inert(document: Any) -> str:
    """JSON for those who only read it, in which nothing can be taken for markup.

    Whatever names a run has, it may stand within HTML.
    """
    try:
        text = _dumped(document)
    except (ValueError, TypeError):  # Few documents are not plain: try it first.
        text = _dumped(readable(document))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _dumped(document: Any) -> str:
    return json.dumps(document, allow_nan=False, separators=(",", ":"))


def _encode(value: Any, arrays: Arrays, name: str) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind in (list, tuple, set, frozenset):
        items = sorted(value, key=repr) if kind in (set, frozenset) else value
        parts = [_encode(v, arrays, f"{name}/{i}") for i, v in enumerate(items)]
        return parts if kind is list else {f"${kind.__name__}": parts}
    if kind is dict:
        if all(type(k) is str and not k.startswith("$") for k in value):
            return {k: _encode(v, arrays, f"{name}/{k}") for k, v in value.items()}
        pairs = [
            [_encode(k, arrays, f"{name}/key"), _encode(v, arrays, f"{name}/{k}")]
            for k, v in value.items()
        ]
        return {"$dict": pairs}
    if kind is bytes:
        return {"$bytes": value.hex()}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"$number": [value.dtype.name, value.tobytes().hex()]}
    if kind is np.ndarray and (value.dtype.kind in "biufc" or _is_narrow(value.dtype)):
        free, count = name, 1
        while free in arrays:
            count += 1
            free = f"{name}#{count}"
        arrays[free] = value
        return {"$array": free}
    raise NotPlain(f"{name}: {kind.__name__}")


def _is_narrow(dtype: np.dtype[Any]) -> bool:
    """Whether it is bfloat16 or one of its like, which NumPy itself does not know."""
    return dtype.kind == "V" and dtype.type.__module__ == "ml_dtypes"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """A dtype by name, those that NumPy does not know by itself included."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def encode_specs(specs: Any) -> Any:
    """Specs of a batch as JSON; `None` where only a framework can say what they are."""
    if isinstance(specs, Spec):
        return {"$spec": [list(specs.shape), specs.dtype]}
    if isinstance(specs, dict):
        parts = {k: encode_specs(v) for k, v in specs.items()}
        return None if None in parts.values() else parts
    if isinstance(specs, (list, tuple)):
        listed = [encode_specs(part) for part in specs]
        if None in listed:
            return None
        return listed if isinstance(specs, list) else {"$tuple": listed}
    return None


def decode(document: Any, arrays: Arrays) -> Any:
    """The value that `encode` was given.

    Raises:
        ValueError: Not a document of `encode`'s.
    """
    if isinstance(document, list):
        return [decode(part, arrays) for part in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if len(document) != 1 or not tag.startswith("$"):
        return {key: decode(part, arrays) for key, part in document.items()}
    content = document[tag]
    if tag == "$array":
        return arrays[content]
    if tag == "$float":
        return float(content)
    if tag == "$bytes":
        return bytes.fromhex(content)
    if tag == "$spec":
        shape, dtype = content
        return Spec(tuple(shape), dtype)
    if tag == "$number":
        dtype, hexadecimal = content
        return np.frombuffer(bytes.fromhex(hexadecimal), dtype)[0]
    parts = decode(content, arrays)
    if tag == "$dict":
        return dict(parts)
    kinds = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
    if tag not in kinds:
        raise ValueError(f"unknown kind of value: {tag}")
    return kinds[tag](parts)
