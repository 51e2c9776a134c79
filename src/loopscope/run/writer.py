"""The thread that writes a run, so that no step waits for the disk.

Steps and events are queued; a few times a second everything that has come is one
transaction. A checkpoint is written between two of them: first the journal up to it,
durably, then its files, then the note that it is there, then older ones may go.

What cannot be written (a full disk, a folder that is gone) ends no training: it is
tried again, and given up when too much has piled up.
"""

from __future__ import annotations

import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loopscope.errors import RunError
from loopscope.run import checkpoint as checkpoints
from loopscope.run import live
from loopscope.run.checkpoint import Draft, Entry
from loopscope.run.files import HeldFolder
from loopscope.run.folder import Folder
from loopscope.run.journal import JournalWriter, Row, text
from loopscope.run.keep import Kept, superfluous

PATIENCE_S = 10.0
"""How long training waits for a disk that takes nothing at all."""

FLUSH_S = 0.5
"""How long a step may wait in memory until it is in the journal."""

TELL_S = 0.5
"""How often it is written down what the training does."""

BACKLOG_BYTES = 64 * 2**20
"""So much that could not be written is kept; then recording ends."""


@dataclass
class Batch:
    """What is to be written in one transaction."""

    scalars: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    rows: list[tuple[str, Row]] = field(default_factory=list)
    size_bytes: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class Limits:
    """How many checkpoints stay.

    Attributes:
        replay_steps: The most steps between two, as long as the disk allows.
        replay_s: The most seconds that those steps have taken, likewise.
        disk_bytes: The most that all of them may take.
    """

    replay_steps: int
    replay_s: float
    disk_bytes: int


class Writer:
    """Writes a run on a thread of its own.

    Args:
        folder: The run.
        journal: Its journal, open for writing.
        limits: Of checkpoints.
        does: What the training does now, for `live.json`; asked on the thread. `None`:
            nobody says it.
    """

    def __init__(
        self,
        folder: Folder,
        journal: JournalWriter,
        limits: Limits,
        does: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._folder, self._journal, self._limits = folder, journal, limits
        self._does, self._told_s = does, 0.0
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._batch = Batch()
        self._next_event = journal.next_event()
        self._identity = _inode(folder)
        # Whatever comes to lie at its path is another run's.
        self._checkpoints = HeldFolder(folder.checkpoints_path)
        self.problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        """What went wrong, for the thread that trains to say."""
        self.failed = False
        """Whether recording has ended for good."""
        self._queued = self._saved = 0
        self._draft: Draft | None = None
        """The checkpoint that is being written."""
        self.cost_s = 0.0
        """What the last checkpoint took."""
        self.best: str | None = None
        """The name of the best checkpoint, which stays."""
        self.missing: set[str] = set()
        """The names of checkpoints that could not be written."""
        self._said: set[str] = set()
        found, _ = checkpoints.entries(folder.checkpoints_path)
        self._kept = [_without_history(e) for e in found if not e.content["finished"]]
        self._thread = threading.Thread(
            target=self._run, name="loopscope-run", daemon=True
        )
        self._thread.start()

    # For the thread that trains; none of these waits for the disk.

    def scalars(self, first: int, values: dict[str, np.ndarray]) -> None:
        """Record the outputs of steps, from step `first` on."""
        self._queue.put(("scalars", first, values, time.time()))

    def row(self, table: str, *columns: Any) -> None:
        """Record a row."""
        self._queue.put(("row", table, columns))

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        """Record that something happened before step `step`."""
        self._queue.put(("event", step, kind, text(data), time.time()))

    def fact(self, name: str, find: Callable[[], Any]) -> None:
        """Record what `find` returns; it is called on the writing thread."""
        self._queue.put(("fact", name, find))

    def save(self, draft: Draft, *, best: bool = False) -> None:
        """Write a checkpoint. Its state is let go of variable by variable."""
        self._queued += 1
        self._queue.put(("save", draft, best))

    def leave_out(self, draft: Draft) -> None:
        """Do not write a checkpoint, since those before it are not getting anywhere."""
        self.missing.add(draft.name)
        self._say(
            "checkpoint",
            f"the checkpoint before step {draft.step} is left out: the disk has taken "
            f"nothing for {PATIENCE_S:.0f} s; it is tried again later",
        )

    def keep(self, name: str) -> None:
        """Take a checkpoint that was written or queued for the best one."""
        self._queue.put(("best", name))

    @property
    def saving(self) -> int:
        """Checkpoints that are queued or being written; their states are kept."""
        return self._queued - self._saved

    @property
    def progress(self) -> tuple[int, int]:
        """Something else than before, unless the disk hangs."""
        draft = self._draft
        return self._saved, draft.moved_bytes if draft is not None else 0

    def wait(self) -> None:
        """Wait until everything queued so far is on the disk, or given up."""
        done = threading.Event()
        self._queue.put(("done", done))
        done.wait()

    def close(self, *, tidy: bool) -> None:
        """Write what is left and end the thread."""
        self._queue.put(("end",))
        self._thread.join()
        lost = [parts[0][0] for parts in self._batch.scalars.values()]
        if lost:
            self._say("lost", f"nothing is recorded from step {min(lost)} on")
        self._journal.close(tidy=tidy and not self.failed)
        self._checkpoints.close()

    # The thread.

    def _run(self) -> None:
        ended = False
        while not ended:
            waited: list[Any] = []
            until = time.monotonic() + FLUSH_S
            while not waited or waited[-1][0] in ("scalars", "row", "event", "fact"):
                try:
                    waited.append(
                        self._queue.get(timeout=max(0.0, until - time.monotonic()))
                    )
                except queue.Empty:
                    break
            for kind, *rest in waited:
                try:
                    ended = self._take(kind, rest) or ended
                except Exception as error:  # Training must go on, whatever it is.
                    self._say("failed", f"recording failed: {error!r}")
            self._flush()
            self._tell(now=ended)

    def _tell(self, *, now: bool) -> None:
        """Write down what the training does, if that is due."""
        late = time.monotonic() - self._told_s >= TELL_S
        if self._does is None or self.failed or not (now or late):
            return
        if _inode(self._folder) != self._identity:
            return
        self._told_s = time.monotonic()
        try:
            live.write(self._folder, self._does())
        except OSError:
            pass  # Nothing depends on it, and the journal says it of a full disk.
        except Exception as error:
            self._say("live", f"what the training does is not said: {error!r}")

    def _take(self, kind: str, rest: list[Any]) -> bool:
        if kind == "save":
            self._draft, best = rest
            draft = self._draft
            try:
                if self._save(draft, best):
                    self.missing.discard(draft.name)
                else:
                    self.missing.add(draft.name)
            except BaseException:
                self.missing.add(draft.name)
                raise
            finally:
                draft.state.clear()
                self._draft = None
                self._saved += 1
        elif kind == "best":
            if rest[0] not in self.missing:
                self.best = rest[0]
        elif kind == "done":
            self._flush()
            rest[0].set()
        elif kind == "end":
            return True
        elif not self.failed:
            self._add(kind, rest)
        return False

    def _add(self, kind: str, rest: list[Any]) -> None:
        batch = self._batch
        if kind == "scalars":
            first, values, batch.time = rest
            for name, array in values.items():
                batch.scalars.setdefault(name, []).append((first, array))
                batch.size_bytes += array.nbytes + 64
        elif kind == "event":
            step, what, data, at = rest
            batch.rows.append(("events", (self._next_event, step, what, data, at)))
            self._next_event += 1
            batch.size_bytes += len(data) + 128
        elif kind == "fact":
            name, find = rest
            batch.rows.append(("facts", (name, json.dumps(find()))))
        else:
            table, columns = rest
            batch.rows.append((table, tuple(columns)))
            batch.size_bytes += 128 + sum(
                len(c) for c in columns if isinstance(c, (bytes, str))
            )

    def _flush(self, *, durable: bool = False) -> bool:
        """Write what has come; whether it is all there."""
        batch = self._batch
        if self.failed:
            return False
        if not batch.scalars and not batch.rows and not durable:
            return True
        try:
            if _inode(self._folder) != self._identity:
                self._give_up(f"the run folder {self._folder.path} is gone")
                return False
            with self._journal.transaction(durable=durable):
                self._journal.put("steps", _step_rows(batch))
                for table in dict.fromkeys(table for table, _ in batch.rows):
                    self._journal.put(table, [r for t, r in batch.rows if t == table])
        except (sqlite3.Error, OSError) as error:
            if batch.size_bytes > BACKLOG_BYTES:
                self._give_up(f"the journal cannot be written ({error})")
            else:
                self._say(
                    "journal",
                    f"the journal cannot be written ({error}); what happens is kept in "
                    "memory and written when it can be, checkpoints after that",
                )
            return False
        self._batch = Batch()
        return True

    def _save(self, draft: Draft, best: bool) -> bool:
        """Write a checkpoint; whether it is there."""
        if self.failed:
            return False
        began = time.perf_counter()
        # Journal first: a checkpoint whose steps are not recorded would leave a gap.
        if not self._flush(durable=True):
            return False
        try:
            described = checkpoints.write(self._checkpoints.path, draft)
        except (OSError, RunError) as error:
            if _inode(self._folder) != self._identity:
                self._give_up(f"the run folder {self._folder.path} is gone")
            else:
                why = getattr(error, "strerror", None) or error
                self._say(
                    "checkpoint",
                    f"the checkpoint before step {draft.step} could not be written "
                    f"({why}); the ones before it stay, and it is tried again later",
                )
            return False
        written = checkpoints.entry_of(draft.name, *described)
        self._note(written, kept=True)
        if best:
            self.best = draft.name
        if not draft.content["finished"]:
            # One of the same name was written over: two would thin out each other.
            self._kept = [e for e in self._kept if e.name != draft.name]
            self._kept.append(_without_history(written))
            self._kept.sort(key=lambda e: (e.step, e.turn))
        if self._flush(durable=True):
            self._thin()
        self.cost_s = time.perf_counter() - began
        return True

    def _thin(self) -> None:
        """Let go of checkpoints that are not needed."""
        gone = superfluous(
            [Kept(e.name, e.step, e.size_bytes, e.pinned, e.run_s) for e in self._kept],
            replay_steps=self._limits.replay_steps,
            replay_s=self._limits.replay_s,
            disk_bytes=self._limits.disk_bytes,
            always=[self.best] if self.best else [],
        )
        for e in [e for e in self._kept if e.name in gone]:
            self._kept.remove(e)
            checkpoints.remove(self._checkpoints.path, e.name)
            self._note(e, kept=False)

    def _note(self, entry: Entry, *, kept: bool) -> None:
        """Record that a checkpoint is there, or no longer."""
        cursor = entry.content["cursor"]
        row = (
            entry.name,
            entry.step,
            cursor["epoch"],
            cursor["index"],
            entry.size_bytes,
            entry.sha256,
            entry.state_sha256,
            int(kept),
            time.time(),
        )
        self._batch.rows.append(("checkpoints", row))

    def _give_up(self, why: str) -> None:
        self.failed = True
        self._batch = Batch()
        self._say("end", f"{why}; recording ends here, training goes on")

    def _say(self, kind: str, problem: str) -> None:
        """Let the thread that trains say it, once of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            self.problems.put(problem)


def _without_history(entry: Entry) -> Entry:
    """As much of an entry as thinning needs: thousands of them are kept in memory."""
    return replace(entry, content={"cursor": entry.content["cursor"]})


def _inode(folder: Folder) -> int | None:
    try:
        return folder.manifest_path.stat().st_ino
    except OSError:
        return None


def _step_rows(batch: Batch) -> list[Row]:
    """Rows of the journal: as few as the steps' order and dtypes allow."""
    rows: list[Row] = []
    for name, parts in batch.scalars.items():
        first, arrays, end = parts[0][0], [parts[0][1]], parts[0][0] + len(parts[0][1])
        for at, array in parts[1:]:
            if at != end or array.dtype != arrays[0].dtype:
                rows.append(_step_row(first, name, arrays, batch.time))
                first, arrays = at, []
            arrays.append(array)
            end = at + len(array)
        rows.append(_step_row(first, name, arrays, batch.time))
    return rows


def _step_row(first: int, name: str, arrays: list[np.ndarray], at: float) -> Row:
    joined = np.concatenate(arrays)
    joined = joined.astype(joined.dtype.newbyteorder("<"), copy=False)
    return first, name, len(joined), joined.dtype.str, joined.tobytes(), at
