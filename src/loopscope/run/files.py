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
from pathlib import Path
from typing import Any

from loopscope.errors import RunError

TEMPORARY = ".tmp"


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, durably; any file that was there is replaced.

    Raises:
        OSError: The disk is full, the folder gone, ...; what was there is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


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
