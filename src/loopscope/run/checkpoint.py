"""A checkpoint: everything that the next step reads, in two files.

NAME.safetensors holds the arrays. NAME.json holds the rest, and the size and SHA-256
of the arrays' file; it is renamed into place last, so a checkpoint is there once its
JSON is. A flipped bit in either is found before anything is restored.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import RunError
from loopscope.run import files
from loopscope.run.plain import numpy_dtype

PLAIN_DTYPES = frozenset(
    [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + ["bool", "float16", "float32", "float64"]
)
"""What safetensors stores under its own name from NumPy; the rest goes as bytes."""

STATE = "state/"
EXTRA = "extra/"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint says.

    Attributes:
        name: Of its files.
        step: Steps trained: the next one has this number.
        state: The arrays of every variable, by path, in order.
        extra: Arrays that `content` refers to (callbacks' best weights).
        content: Plain data: cursor, gear, metrics, callbacks, History (see
            recorder.py).
        state_sha256: As `State.sha256`.
        pinned: Whether it must stay: steps before it cannot be replayed up to it.
    """

    name: str
    step: int
    state: Mapping[str, np.ndarray]
    extra: Mapping[str, np.ndarray]
    content: Mapping[str, Any]
    state_sha256: str
    pinned: bool = False


@dataclass(frozen=True)
class Entry:
    """A checkpoint as its JSON describes it; its arrays were not read.

    Attributes:
        name: Of its files.
        step: Steps trained.
        turn: Of the writes between steps that precede it, how many it has seen.
        run_s: Seconds that these steps have taken, all processes together.
        size_bytes: Of both files.
        pinned: As in `Checkpoint`.
        content: As in `Checkpoint`.
        state_sha256: As in `Checkpoint`.
        sha256: Of the arrays' file.
    """

    name: str
    step: int
    turn: int
    run_s: float
    size_bytes: int
    pinned: bool
    content: Mapping[str, Any] = field(compare=False, repr=False)
    state_sha256: str
    sha256: str


def name_of(step: int, turn: int, *, finished: bool = False) -> str:
    """The name of the checkpoint before a step, or of the one at the end."""
    return f"{step:012d}-{'end' if finished else turn}"


def write(folder: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], int]:
    """Write a checkpoint, and read it back.

    Holds one more copy of the arrays in memory meanwhile.

    Returns:
        What its JSON says, and the bytes of both files: see `entry_of`.

    Raises:
        OSError: It could not be written; no part of it is left.
        RunError: What was read back is not what was written.
    """
    from safetensors.numpy import save

    arrays, dtypes = {}, {}
    for prefix, group in ((STATE, checkpoint.state), (EXTRA, checkpoint.extra)):
        for path, array in group.items():
            dtypes[prefix + path] = array.dtype.name
            arrays[prefix + path] = _storable(array)
    data = save(arrays)
    digest = hashlib.sha256(data).hexdigest()
    document = {
        "step": checkpoint.step,
        "pinned": checkpoint.pinned,
        "state_sha256": checkpoint.state_sha256,
        "arrays_sha256": digest,
        "arrays_size_bytes": len(data),
        "order": list(checkpoint.state),
        "dtypes": dtypes,
        "content": dict(checkpoint.content),
    }
    tensors, described = _paths(folder, checkpoint.name)
    sealed = files.seal(document)
    try:
        files.write(tensors, data)
        if _digest(tensors) != digest:
            raise RunError(f"{tensors} is not what was written: the disk lost bits")
        files.write(described, sealed)
    except BaseException:
        # The JSON of the same name from before, if any, no longer has its arrays.
        remove(folder, checkpoint.name)
        raise
    return document, len(data) + len(sealed)


def read(folder: Path, name: str) -> Checkpoint:
    """Read a checkpoint and hold it against its checksums.

    Raises:
        RunError: It is damaged or not there; the file is named.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    document, data = _checked(folder, name)
    tensors, _ = _paths(folder, name)
    try:
        arrays = load(data)
        dtypes = document["dtypes"]
        named = {n: _restored(a, dtypes[n]) for n, a in arrays.items()}
        state = {path: named[STATE + path] for path in document["order"]}
        extra = {n[len(EXTRA) :]: a for n, a in named.items() if n.startswith(EXTRA)}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{tensors} is damaged: {error}") from error
    return Checkpoint(
        name=name,
        step=document["step"],
        state=state,
        extra=extra,
        content=document["content"],
        state_sha256=document["state_sha256"],
        pinned=document["pinned"],
    )


def entries(folder: Path) -> tuple[list[Entry], list[str]]:
    """The checkpoints in a folder, oldest first, and what is wrong with the others."""
    found, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            document = files.unseal(path.read_bytes(), str(path))
            size_bytes = document["arrays_size_bytes"] + path.stat().st_size
            entry = entry_of(path.stem, document, size_bytes)
        except FileNotFoundError:
            continue  # It was let go just now.
        except (RunError, OSError, KeyError, TypeError) as error:
            problems.append(str(error))
        else:
            found.append(entry)
    return sorted(found, key=lambda e: (e.step, e.turn)), problems


def entry_of(name: str, document: Mapping[str, Any], size_bytes: int) -> Entry:
    """A checkpoint as its JSON describes it."""
    content = document["content"]
    return Entry(
        name=name,
        step=document["step"],
        turn=content["turn"],
        run_s=content["run_s"],
        size_bytes=size_bytes,
        pinned=document["pinned"],
        content=content,
        state_sha256=document["state_sha256"],
        sha256=document["arrays_sha256"],
    )


def check(folder: Path, name: str) -> None:
    """Read a checkpoint's files and hold them against their checksums.

    Raises:
        RunError: Something is damaged; the file is named.
    """
    _checked(folder, name)


def remove(folder: Path, name: str) -> None:
    """Delete a checkpoint; its JSON first, so that no JSON is without its arrays."""
    tensors, described = _paths(folder, name)
    for path in (described, tensors):
        with contextlib.suppress(OSError):
            path.unlink()


def cut(folder: Path, last: Checkpoint) -> None:
    """Delete every checkpoint that came after `last`."""
    found, _ = entries(folder)
    turn = last.content["turn"]
    for entry in found:
        later = (entry.step, entry.turn) > (last.step, turn)
        if later or entry.content["finished"]:
            remove(folder, entry.name)


def clean(folder: Path) -> None:
    """Delete what a killed process has left half written."""
    for path in folder.glob(f"*{files.TEMPORARY}"):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.safetensors"):
        if not path.with_suffix(".json").exists():
            path.unlink(missing_ok=True)


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _checked(folder: Path, name: str) -> tuple[dict[str, Any], bytes]:
    tensors, described = _paths(folder, name)
    try:
        document = files.unseal(described.read_bytes(), str(described))
        data = tensors.read_bytes()
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror}") from error
    size, digest = document["arrays_size_bytes"], document["arrays_sha256"]
    if len(data) != size:
        raise RunError(
            f"{tensors} is damaged: expected {size} bytes. Received: {len(data)}"
        )
    if hashlib.sha256(data).hexdigest() != digest:
        raise RunError(f"{tensors} is damaged: its checksum does not match")
    return document, data


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storable(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name in PLAIN_DTYPES:
        return array
    return np.frombuffer(array.tobytes(), np.uint8).reshape(
        *array.shape, array.dtype.itemsize
    )


def _restored(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in PLAIN_DTYPES:
        return array
    return np.frombuffer(array.tobytes(), numpy_dtype(dtype)).reshape(array.shape[:-1])
