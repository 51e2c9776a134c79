"""What callbacks remember: their attributes, as far as they are plain data.

Keras's stateful callbacks keep their counters, best values and best weights in
attributes; so do most people's. What is not plain data (functions, open files, the
model) stays as the callback itself makes it. `CSVLogger` also has a place in its file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import RunError
from loopscope.run import files
from loopscope.run.plain import Arrays, NotPlain, decode, encode

_NEVER = frozenset({"model", "_model", "params", "validation_data"})
_OF_FILE = frozenset({"filename", "append_header"})


def capture(callbacks: Sequence[Any], arrays: Arrays) -> list[dict[str, Any]]:
    """The memory of each callback, as plain data; arrays go into `arrays`."""
    return [_of(c, arrays, f"callbacks/{i}") for i, c in enumerate(callbacks)]


def _of(callback: Any, arrays: Arrays, name: str) -> dict[str, Any]:
    attributes, operations, left_out = {}, {}, []
    for key, value in vars(callback).items():
        if key in _NEVER:
            continue
        found: Arrays = {}
        try:
            attributes[key] = encode(value, found, f"{name}/{key}")
        except NotPlain:
            operation = _operation_name(value)
            if operation is None:
                left_out.append(key)
            else:
                operations[key] = operation
        else:
            arrays.update(found)
    memory: dict[str, Any] = {
        "kind": kind_of(callback),
        "attributes": attributes,
        "operations": operations,
        "left_out": sorted(left_out),
    }
    place = _place_in_file(callback)
    if place is not None:
        memory["place"] = place
    return memory


def kind_of(callback: Any) -> str:
    """The name of a callback's class."""
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def before_training(
    callbacks: Sequence[Any],
    memories: Sequence[Mapping[str, Any]],
    move_to: Path | None,
    *,
    over: bool,
) -> None:
    """Prepare what callbacks do when training begins: files go on, none is emptied.

    Args:
        callbacks: The callbacks.
        memories: What `capture` gave.
        move_to: A folder for files that another run goes on writing, if there is one.
        over: Whether training is over, so that files are left as they are.

    Raises:
        RunError: A file is shorter than what had been written to it.
    """
    for callback, memory in zip(callbacks, memories, strict=True):
        if "place" not in memory:
            continue
        callback.append = True
        if over:
            continue
        path, place = Path(callback.filename), memory["place"]
        if move_to is not None and (move_to / path.name).exists():
            path = move_to / path.name
        size = path.stat().st_size if path.exists() else 0
        if size < place:
            raise RunError(
                f"The log {str(path)!r} of {type(callback).__name__} has {size} bytes; "
                f"{place} had been written when the checkpoint was made. Put it back."
            )
        if move_to is not None:
            with path.open("rb") as file:
                kept = file.read(place)
            path = move_to / path.name
            callback.filename = str(path)
            files.write(path, kept)
        elif size > place:
            os.truncate(path, place)  # At no instant is it shorter than that.


def restore(
    callbacks: Sequence[Any], memories: Sequence[Mapping[str, Any]], arrays: Arrays
) -> None:
    """Set the attributes back, after training has begun."""
    for callback, memory in zip(callbacks, memories, strict=True):
        # A log that goes on has its header already, and maybe another place.
        kept = _OF_FILE if memory.get("place") else ()
        for key, value in memory["attributes"].items():
            if key not in kept:
                setattr(callback, key, decode(value, arrays))
        for key, name in memory["operations"].items():
            setattr(callback, key, _operation(name))


def _operation_name(value: Any) -> str | None:
    """The name of one of Keras's or NumPy's comparisons, with which others count.

    `EarlyStopping` and its like choose theirs while they train, and change their
    `min_delta` for it.
    """
    import keras

    for place, home in _HOMES.items():
        for name in _COMPARISONS:
            if value is getattr(keras.ops if home is None else home, name):
                return f"{place}.{name}"
    return None


def _operation(name: str) -> Any:
    import keras

    place, _, comparison = name.rpartition(".")
    if place not in _HOMES or comparison not in _COMPARISONS:
        raise RunError(f"A callback is said to compare by {name!r}, which is unknown")
    home = _HOMES[place]
    return getattr(keras.ops if home is None else home, comparison)


_HOMES = {"keras.ops": None, "numpy": np}
_COMPARISONS = ("less", "less_equal", "greater", "greater_equal")


def fill_history(
    callbacks: Sequence[Any], epochs: Sequence[tuple[int, Mapping[str, Any]]]
) -> None:
    """Let Keras's `History` know of epochs that it was not there for."""
    import keras

    for callback in callbacks:
        if isinstance(callback, keras.callbacks.History):
            callback.epoch = [number for number, _ in epochs]
            callback.history = {}
            for _, logs in epochs:
                for name, value in logs.items():
                    callback.history.setdefault(name, []).append(value)


def _place_in_file(callback: Any) -> int | None:
    """How far a `CSVLogger`, or what is made after it, has written."""
    file = getattr(callback, "csv_file", None)
    if file is None or not hasattr(callback, "append"):
        return None
    if file.closed:
        return Path(callback.filename).stat().st_size
    file.flush()
    place: int = file.tell()
    return place
