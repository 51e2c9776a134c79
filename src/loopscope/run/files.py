"""Writing a file so that it is there whole, or not at all.

Temporary name, fsync, rename, fsync of the directory: a process killed at any
instant leaves the old file or the new one. JSON files are sealed: they carry the
SHA-256 of what they say.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from loopscope.errors import RunError

TEMPORARY = ".tmp"

SYNC_BYTES = 2**26
"""So much is written before the disk is waited for: the wait at the end is short, and
a disk that hangs can be told from one that is slow."""

BLOCK_BYTES = 2**22
"""So much is read at a time."""


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, durably; any file that was there is replaced.

    Raises:
        OSError: The disk is full, the folder gone, ...; what was there is untouched.
    """
    with writing(path) as file:
        file.write(data)


def copy(source: Path, path: Path) -> None:
    """Write what is in `source` to `path`, as `write`, block by block."""
    with source.open("rb") as original, writing(path) as file:
        while block := original.read(BLOCK_BYTES):
            file.write(block)


@contextmanager
def writing(path: Path, told: Callable[[int], None] | None = None) -> Iterator[Growing]:
    """A file that is at `path`, durably, once the block has ended.

    Args:
        path: Where; any file that was there is replaced.
        told: Called with a number of bytes when the disk has taken them.

    Raises:
        OSError: The disk is full, the folder gone, ...; what was there is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            growing = Growing(file, told)
            yield growing
            growing.sync()
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


class Growing:
    """A file while it is written: its size, and the SHA-256 of all that is in it."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None] | None) -> None:
        self._file, self._told = file, told
        self._digest = hashlib.sha256()
        self._synced_bytes = 0
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Add to its end."""
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)
        if self.size_bytes - self._synced_bytes >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._told is not None:
            self._told(self.size_bytes - self._synced_bytes)
        self._synced_bytes = self.size_bytes

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal."""
        return self._digest.hexdigest()


def sha256(file: BinaryIO, told: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file from where it stands, in hexadecimal, read block by block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    while size := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:size])
        if told is not None:
            told(size)
    return digest.hexdigest()


class HeldFolder:
    """A folder that stays the one it was, whatever is put at its path later.

    Where the system has `/proc/self/fd`; elsewhere it is its path.

    Raises:
        OSError: It is not there.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        through = Path(f"/proc/self/fd/{self._descriptor}")
        self.path = through if through.is_dir() else path
        """Leads to the folder; nowhere, once that is removed."""

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(document: Any) -> bytes:
    """A JSON file: the document, and the SHA-256 of its canonical text."""
    digest = hashlib.sha256(_canonical(document)).hexdigest()
    sealed = {"sha256": digest, "content": document}
    return (json.dumps(sealed, indent=1, allow_nan=False) + "\n").encode()


def unseal(data: bytes, name: str) -> Any:
    """The document of a sealed file.

    Raises:
        RunError: It is not JSON, or not what was written.
    """
    try:
        sealed = json.loads(data.decode())
        document, digest = sealed["content"], sealed["sha256"]
        right = hashlib.sha256(_canonical(document)).hexdigest() == digest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{name} is damaged: expected JSON with a checksum ({error})"
        ) from error
    if not right:
        raise RunError(f"{name} is damaged: its checksum does not match its content")
    return document


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
