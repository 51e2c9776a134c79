"""Steering a live run: both ends of `control.jsonl`.

Whoever wants something of a training adds a line to that file; the training looks
whether it has grown, between chunks, and reads what is new. So nobody waits for the
other, and no line is lost where two ask at once. What was done is an event of the
journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from loopscope.run.folder import Folder

ACTIONS = ("pause", "step", "resume", "save", "stop")
"""`stop` is after the epoch that runs, `save` at the end of the chunk that runs."""

ALONE = ("pause", "step")
"""What one process alone can do: others that train with it would wait, and give up."""

LOOK_S = 0.1
"""How often a training looks for what it is asked, at most."""

MOST_BYTES = 2**16
"""Of what was asked, so much is read at a time."""


def ask(folder: Folder, action: str) -> None:
    """Ask the training that writes a run to do something.

    Raises:
        OSError: The folder cannot be written.
    """
    line = json.dumps({"action": action, "time": time.time()}) + "\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(folder.control_path, flags, 0o644)
    try:
        os.write(descriptor, line.encode())  # One call: lines of two do not mix.
    finally:
        os.close(descriptor)


def waiting(folder: Folder, obeyed_bytes: int) -> str | None:
    """The last action that was asked for and not yet looked at; `None` if none is."""
    actions, _ = _after(folder, obeyed_bytes)
    return actions[-1] if actions else None


def refusal(action: str, *, workers: int) -> str:
    """Why a training does not do something; empty if it does."""
    if action in ALONE and workers > 1:
        return (
            f"{workers} processes train this run together: one that waits would keep "
            f"the others waiting until they give up, so there is no `{action}`."
        )
    return ""


class Control:
    """The training's end: what it was asked, and what it is to do about it.

    Args:
        folder: The run.
        workers: How many processes train it.
    """

    def __init__(self, folder: Folder, workers: int) -> None:
        self._folder, self._workers = folder, workers
        self._looked_s = 0.0
        self.obeyed_bytes = 0
        """How much of the file was read."""
        self.paused = False
        """Whether to wait at the end of the chunk that runs."""
        self.stepping = False
        """Whether to run one step, and wait again."""
        self.saving = False
        """Whether to save."""
        self.stopping = False
        """Whether to end after the epoch that runs."""

    def begin(self) -> None:
        """Leave alone what was asked of an earlier training."""
        with contextlib.suppress(OSError):
            self._folder.control_path.unlink(missing_ok=True)
        self.obeyed_bytes = _size(self._folder)

    def end(self) -> None:
        """Leave nothing behind that would be asked of a later one."""
        self.begin()

    @property
    def asked(self) -> str | None:
        """What is being done, and not done yet."""
        return "stop" if self.stopping else "save" if self.saving else None

    def look(self) -> list[dict[str, Any]]:
        """Take up what was asked since the last look, at most every `LOOK_S`.

        Returns:
            For each action, what the journal is to say of it.
        """
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return []
        self._looked_s = now
        if _size(self._folder) <= self.obeyed_bytes:
            return []
        actions, self.obeyed_bytes = _after(self._folder, self.obeyed_bytes)
        return [self._take(action) for action in actions]

    def _take(self, action: str) -> dict[str, Any]:
        why = refusal(action, workers=self._workers)
        if not why:
            self.saving |= action == "save"
            self.stopping |= action == "stop"
            # To end the epoch is to go on with it.
            self.paused = action == "pause" or (
                self.paused and action not in ("step", "resume", "stop")
            )
            self.stepping = action == "step" or (
                self.stepping and action not in ("pause", "resume", "stop")
            )
        return {
            "action": action,
            "done": not why,
            "why": why,
            "workers": self._workers,
        }

    def after_step(self) -> None:
        """A train step has run: where it was to be one, wait again."""
        if self.stepping:
            self.stepping, self.paused = False, True

    def chunk_steps(self, most: int) -> int:
        """How many steps the next chunk may have."""
        return 1 if self.stepping else most


def _after(folder: Folder, start: int) -> tuple[list[str], int]:
    """Actions asked for after the first `start` bytes, and how many bytes that is."""
    try:
        with folder.control_path.open("rb") as file:
            file.seek(start)
            data = file.read(MOST_BYTES)
    except OSError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    actions = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(line)
            action = said.get("action") if isinstance(said, dict) else None
            actions += [action] if action in ACTIONS else []
    # So long a line without an end is nobody's: pass over it.
    endless = not whole and len(data) == MOST_BYTES
    return actions, start + len(data if endless else whole)


def _size(folder: Folder) -> int:
    try:
        return os.stat(folder.control_path).st_size
    except OSError:
        return 0
