"""One process writes a run.

The kernel holds the lock and lets go of it when the process dies, however it dies;
the file's text says who has it, for whoever is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
import weakref
from pathlib import Path
from typing import Any

from loopscope.errors import RunError

PATIENCE_S = 0.5
"""A reader that asks who writes holds the lock for an instant: try that long."""


class Lock:
    """Holds a run for writing.

    Args:
        path: The lock's file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        _LOCKS.add(self)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunError: Another writer has it; its pid and host are named.
        """
        # Without truncation: what it says belongs to whoever holds it.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file = os.fdopen(descriptor, "r+")
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    held = _read(self._path)
                    self._file.close()
                    self._file = None
                    raise RunError(
                        f"The run {str(self._path.parent)!r} is being written by "
                        f"process {held.get('pid')} on host {held.get('host')!r} since "
                        f"{held.get('since')}. One process writes a run: wait for it, "
                        "stop it, or give this training another folder."
                    ) from None
                time.sleep(0.02)
        said = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(said))
            self._file.flush()
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # Of what a full disk did not take.
                self._file.close()
            self._file = None


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked worker that outlives a killed parent must not go on holding its lock."""
    for lock in _LOCKS:
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)


def writer(path: Path) -> dict[str, Any] | None:
    """Who writes the run now: pid, host, since; or `None`."""
    try:
        file = path.open()
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(path)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
