"""What the manifest says: what is run, by what code, on what data, where."""

from __future__ import annotations

import inspect
import math
import os
import platform
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loopscope.cpu import cpu_line
from loopscope.run import identity, memory
from loopscope.run.recording import Recording

if TYPE_CHECKING:
    from loopscope.data.source import Source
    from loopscope.loop import Loop


def manifest(
    loop: Loop,
    how: Recording,
    source: Source | None,
    callbacks: Sequence[Any] | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of run.json for a training that is about to begin."""
    return {
        **birth(),
        "origin": readable(loop.origin),
        "script": [os.path.abspath(sys.argv[0]), *sys.argv[1:]] if sys.argv else [],
        "working_folder": os.getcwd(),
        "arguments": readable(arguments),
        "recording": {k: v for k, v in asdict(how).items() if k != "path"},
        "seed": loop.seed,
        "first_step": loop.step,
        "identity": of(loop),
        "callbacks": (
            None if callbacks is None else [memory.kind_of(c) for c in callbacks]
        ),
        "configuration": readable(identity.configuration(loop.model)),
        "code": [
            [e.text, e.role, e.note, dict(e.about)] for e in loop.lines(callbacks)
        ],
        "source": described(source),
        "machine": machine(),
    }


def birth() -> dict[str, str]:
    """What makes a run another one than all before."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"id": uuid.uuid4().hex, "created": created}


def of(loop: Loop) -> dict[str, Any]:
    """The identity of a loop in this process, data apart."""
    gear = loop.gear
    return identity.identity(
        loop.backend,
        loop.model,
        gear=gear.name if gear is not None else None,
        watched=loop.watch is not None,
        workers=loop.together.size,
        code=identity.code_of(*loop.code()),
    )


def described(source: Source | None) -> dict[str, Any] | None:
    """A source in words."""
    if source is None:
        return None
    return {
        "kind": type(source).__name__,
        "steps": source.steps,
        "specs": [str(spec) for spec in _leaves(source.specs)],
        "jumps": source.jumps,
        "inexact": source.inexact(),
    }


def shapes(loop: Loop) -> dict[str, str]:
    """What flows out of the parts of a step, as far as it is known without running it.

    Only while the loop trains.
    """
    found: dict[str, str] = {}
    source, model = loop.data, loop.model
    if source is None:
        return found
    specs = [s for s in _leaves(source.specs) if hasattr(s, "dtype")]
    found["data"] = ", ".join(_shape(spec.shape, spec.dtype) for spec in specs)
    rows = specs[0].shape[0] if specs and specs[0].shape else None
    # A subclassed model does not know what it returns.
    outputs = getattr(model, "outputs", None) or []
    found["forward"] = ", ".join(_shape((rows, *t.shape[1:]), t.dtype) for t in outputs)
    variables = model.trainable_variables
    count = sum(math.prod(v.shape) for v in variables)
    found["backward"] = f"{count:,} numbers in {len(variables)} variables"
    return {role: text for role, text in found.items() if text}


def machine() -> dict[str, Any]:
    """Where a run is made; for people, nothing is compared with it."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": cpu_line("model name").partition(":")[2].strip()
        or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def readable(value: Any) -> Any:
    """A value as JSON for people: what is no plain data by the name of its type."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if isinstance(value, Mapping):
        return {str(k): readable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [readable(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} {getattr(value, 'dtype', '')}{list(shape)}"
    return value.__name__ if inspect.isroutine(value) else type(value).__name__


def _shape(shape: Sequence[int | None], dtype: Any) -> str:
    sizes = ", ".join("?" if n is None else str(n) for n in shape)
    return f"({sizes}{',' if len(shape) == 1 else ''}) {dtype}"


def _leaves(specs: Any) -> list[Any]:
    import keras

    leaves: list[Any] = keras.tree.flatten(specs)
    return leaves
