"""A checkpoint: everything that the next step reads, in two files.

NAME.safetensors holds the arrays. NAME.json holds the rest, and the size and SHA-256
of the arrays' file; it is renamed into place last, so a checkpoint is there once its
JSON is. A flipped bit in either is found before anything is restored.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loopscope.data.feed import dtype_name
from loopscope.errors import RunError
from loopscope.run import files, tensors
from loopscope.run.tensors import Kind
from loopscope.state import sha256

STATE = "state/"
EXTRA = "extra/"


@dataclass(eq=False)
class Draft:
    """A checkpoint that is yet to be written.

    Attributes:
        name: Of its files.
        step: Steps trained: the next one has this number.
        state: The value of every variable, by path, in order, on the device. It is let
            go of when it is written: in the end nothing is left here.
        extra: As in `Checkpoint`.
        content: As in `Checkpoint`.
        pinned: As in `Checkpoint`.
        to_numpy: From a value to an array.
        moved_bytes: What the disk has taken of it and given back so far.
    """

    name: str
    step: int
    state: dict[str, Any]
    extra: Mapping[str, np.ndarray]
    content: Mapping[str, Any]
    pinned: bool = False
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    moved_bytes: int = 0

    def moved(self, size_bytes: int) -> None:
        """Count."""
        self.moved_bytes += size_bytes


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint says.

    Attributes:
        name: Of its files.
        step: Steps trained: the next one has this number.
        state: The arrays of every variable, by path, in order. They lie in the file,
            and are read when they are looked at.
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


def write(folder: Path, draft: Draft) -> tuple[dict[str, Any], int]:
    """Write a checkpoint, and read it back.

    Variable by variable: no more than one of them is copied to the host at a time.

    Returns:
        What its JSON says, and the bytes of both files: see `entry_of`.

    Raises:
        OSError: It could not be written; no part of it is left.
        RunError: What was read back is not what was written.
    """
    arrays, described = _paths(folder, draft.name)
    order, extra = list(draft.state), draft.extra
    kinds = {STATE + path: _kind(value) for path, value in draft.state.items()}
    kinds |= {EXTRA + name: _kind(array) for name, array in extra.items()}
    try:
        with files.writing(arrays, draft.moved) as file:
            file.write(tensors.head(kinds))
            state_sha256 = sha256(_written(draft, kinds, file))
            for array in extra.values():
                for block in tensors.body(array):
                    file.write(block)
        with arrays.open("rb") as back:
            if files.sha256(back, draft.moved) != file.sha256:
                raise RunError(f"{arrays} is not what was written: the disk lost bits")
        document = {
            "step": draft.step,
            "pinned": draft.pinned,
            "state_sha256": state_sha256,
            "arrays_sha256": file.sha256,
            "arrays_size_bytes": file.size_bytes,
            "order": order,
            "dtypes": {name: dtype for name, (dtype, _) in kinds.items()},
            "content": dict(draft.content),
        }
        sealed = files.seal(document)
        files.write(described, sealed)
    except BaseException:
        # The JSON of the same name from before, if any, no longer has its arrays.
        remove(folder, draft.name)
        raise
    return document, file.size_bytes + len(sealed)


def read(folder: Path, name: str) -> Checkpoint:
    """Open a checkpoint, once its files were held against their checksums.

    Raises:
        RunError: It is damaged or not there; the file is named.
    """
    with _checked(folder, name) as (document, file):
        try:
            named = tensors.mapped(file, document["dtypes"])
            state = {path: named[STATE + path] for path in document["order"]}
            extra = {
                n[len(EXTRA) :]: np.array(a)
                for n, a in named.items()
                if n.startswith(EXTRA)
            }
        except (struct.error, KeyError, ValueError, TypeError) as error:
            raise RunError(f"{file.name} is damaged: {error}") from error
    return Checkpoint(
        name=name,
        step=document["step"],
        state=state,
        extra=extra,
        content=document["content"],
        state_sha256=document["state_sha256"],
        pinned=document["pinned"],
    )


def entries(
    folder: Path, known: dict[tuple[str, int], Entry] | None = None
) -> tuple[list[Entry], list[str]]:
    """The checkpoints in a folder, oldest first, and what is wrong with the others.

    Args:
        folder: Where they lie.
        known: What was read before, by name and time: not read again, and added to.
    """
    found, problems = [], []
    known = {} if known is None else known
    for path in sorted(folder.glob("*.json")):
        try:
            stat = path.stat()
            mark = (path.stem, stat.st_mtime_ns)
            entry = known.get(mark)
            if entry is None:
                document = files.unseal(path.read_bytes(), str(path))
                size_bytes = document["arrays_size_bytes"] + stat.st_size
                entry = known[mark] = entry_of(path.stem, document, size_bytes)
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
    with _checked(folder, name):
        pass


def remove(folder: Path, name: str) -> None:
    """Delete a checkpoint; its JSON first, so that no JSON is without its arrays."""
    arrays, described = _paths(folder, name)
    for path in (described, arrays):
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


@contextmanager
def _checked(folder: Path, name: str) -> Iterator[tuple[dict[str, Any], BinaryIO]]:
    """What the JSON says, and the open file of arrays, both as they were written."""
    arrays, described = _paths(folder, name)
    try:
        document = files.unseal(described.read_bytes(), str(described))
        file = arrays.open("rb")
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror}") from error
    with file:
        size, expected = os.fstat(file.fileno()).st_size, document["arrays_size_bytes"]
        if size != expected:
            raise RunError(
                f"{arrays} is damaged: expected {expected} bytes. Received: {size}"
            )
        try:
            digest = files.sha256(file)
        except OSError as error:
            raise RunError(f"{arrays} cannot be read: {error.strerror}") from error
        if digest != document["arrays_sha256"]:
            raise RunError(f"{arrays} is damaged: its checksum does not match")
        yield document, file


def _written(
    draft: Draft, kinds: Mapping[str, Kind], file: files.Growing
) -> Iterator[tuple[str, np.ndarray]]:
    """Write the variables, and give each one away when it is written."""
    for path in list(draft.state):
        array = draft.to_numpy(draft.state.pop(path))
        if _kind(array) != kinds[STATE + path]:
            raise RunError(f"{path} was not read as what it is: {_kind(array)}")
        for block in tensors.body(array):
            file.write(block)
        yield path, array
        del array


def _kind(value: Any) -> Kind:
    return dtype_name(value), tuple(value.shape)
