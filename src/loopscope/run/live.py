"""What a training says of itself while it runs: one small file, over and over.

Written about twice a second by the thread that writes the run, so that it says so even
while a step takes minutes. Nothing depends on it: it is not synced, and no loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopscope.run.files import TEMPORARY
from loopscope.run.folder import Folder

ROLES = ("data", "step", "compiling", "callbacks", "validation", "saving")
"""What a training may be doing."""

SMOOTH_S = 3.0
"""The speed is that of about so many seconds."""

MOST_BYTES = 2**16


class Clock:
    """Where the time of an epoch goes.

    The thread that trains says what it turns to; any other may look.
    """

    def __init__(self) -> None:
        self.role: str | None = None
        self._since = time.perf_counter()
        self._seconds = dict.fromkeys(ROLES, 0.0)

    def turn(self, role: str | None) -> None:
        """Do something else from now on."""
        now = time.perf_counter()
        if self.role is not None:
            self._seconds[self.role] += now - self._since
        self.role, self._since = role, now

    def move(self, seconds: float, role: str, to: str) -> None:
        """Count some seconds of one role to another: it was known only later."""
        self._seconds[role] -= seconds
        self._seconds[to] += seconds

    def reset(self) -> None:
        """Begin anew: an epoch begins."""
        self.turn(self.role)
        self._seconds = dict.fromkeys(ROLES, 0.0)

    def seconds(self) -> dict[str, float]:
        """By role, up to now."""
        found, role, since = dict(self._seconds), self.role, self._since
        if role is not None:
            found[role] += time.perf_counter() - since
        return {name: round(max(0.0, s), 6) for name, s in found.items()}


class Pace:
    """How fast steps come, from how many there were at some moments."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []
        self._speed: float | None = None

    def __call__(self, step: int, *, runs: bool) -> float | None:
        """Steps a second, of the last few seconds; `None` as long as nobody knows.

        Args:
            step: How many there are now.
            runs: Whether they come now; while they do not, the speed is that of before.
        """
        if not runs:
            self._marks.clear()
            return self._speed
        now = time.perf_counter()
        self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[1][0] <= now - SMOOTH_S:
            self._marks.pop(0)
        began, first = self._marks[0]
        if step > first:
            self._speed = (step - first) / (now - began)
        return self._speed


def write(folder: Folder, said: Mapping[str, Any]) -> None:
    """Put it into the folder, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    temporary = folder.live_path.with_name(folder.live_path.name + TEMPORARY)
    temporary.write_text(json.dumps({**said, "time": time.time()}))
    temporary.replace(folder.live_path)


def read(folder: Folder) -> dict[str, Any] | None:
    """What a training has said last; `None` if it never did, or nobody can read it."""
    return _json(folder.live_path)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None
