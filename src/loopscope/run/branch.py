"""A branch: a new run that shares another one's past up to a step.

It begins as a copy of that run as of a checkpoint, trains up to the step as the other
one did, to the same bits, and goes on with what was changed.
"""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from loopscope.errors import RunError, UsageError
from loopscope.run import about, checkpoint, files, reading
from loopscope.run.folder import Folder, unwritable
from loopscope.run.journal import JournalWriter, text


def branch(
    parent: Folder,
    new: Folder,
    step: int,
    *,
    learning_rate: float | None = None,
    gear: str | None = None,
) -> None:
    """Make `new` a branch of `parent` at `step`. The parent is only read.

    Args:
        parent: The run to branch off.
        new: A folder with no run in it.
        step: The first step that is not the parent's.
        learning_rate: From this step on.
        gear: From this step on.

    Raises:
        RunError: There is a run in `new`, or no checkpoint at or before the step.
        UsageError: The parent has no such step.
    """
    if new.exists:
        raise RunError(f"{str(new.path)!r} holds a run already; name another folder")
    with reading.journal(parent) as journal:
        first, last = parent.manifest["first_step"], journal.recorded()
        if not first <= step <= last:
            raise UsageError(
                f"The run has the steps {first} to {last - 1}. "
                f"Received: --from-step {step}"
            )
        journal.check()
        journal.scalars()
        start = _nearest(parent, step)
        new.make()
        lock = new.lock()
        try:
            lock.acquire()
            for suffix in (".safetensors", ".json"):
                name = f"{start.name}{suffix}"
                files.copy(parent.checkpoints_path / name, new.checkpoints_path / name)
            journal.copy(new.journal_path)
            _cut(new, start, parent, step)
            changes = {"step": step, "learning_rate": learning_rate, "gear": gear}
            manifest = {
                **parent.manifest,
                **about.birth(),
                "parent": {
                    "id": parent.manifest["id"],
                    "path": str(parent.path.resolve()),
                    "step": step,
                },
                "branch": changes,
            }
            new.write_manifest(manifest)
        except (OSError, sqlite3.Error) as error:
            checkpoint.remove(new.checkpoints_path, start.name)
            new.forget()
            raise unwritable(new.path, error) from error
        finally:
            lock.release()
            new.leave_no_trace()


def _nearest(parent: Folder, step: int) -> checkpoint.Entry:
    found, problems = checkpoint.entries(parent.checkpoints_path)
    for entry in reversed(found):
        if entry.step <= step and not entry.content["finished"]:
            try:
                checkpoint.check(parent.checkpoints_path, entry.name)
            except RunError as error:
                problems.append(str(error))
            else:
                return entry
    raise RunError(
        f"Step {step} cannot be reached from any checkpoint"
        + "".join(f"; {problem}" for problem in problems)
    )


def _cut(new: Folder, start: checkpoint.Entry, parent: Folder, step: int) -> None:
    journal = JournalWriter(new.journal_path)
    cursor: Any = start.content["cursor"]
    with journal.transaction(durable=True):
        journal.cut(start.step, start.turn, cursor["epoch"], begun=cursor["begun"])
        data = text({"parent": str(parent.path.resolve()), "step": step})
        journal.replace_events([(1, start.step, "branch", data, time.time())])
    journal.close()
