"""A run that is looked at again and again: what was read stays, what is new is added.

For a page that asks twice a second. A look at a run whose files are as they were costs
a few calls of `stat`; at one that grows, the rows that have come since. How a run is
read once is the part of reading.py.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import LoopscopeError
from loopscope.run import checkpoint, reading
from loopscope.run.folder import Folder
from loopscope.run.journal import EpochRow, JournalReader, Row, Stretch

Signature = tuple[Any, ...]

HEADER_BYTES = 48
"""Of the header of SQLite's WAL-index."""


@dataclass(eq=False)
class Series:
    """The values of one output so far.

    Attributes:
        first: The step of the first one.
        values: One a step.
        ends: Steps up to which it was known at some times, ascending.
        times: Those times, in seconds since 1970.
    """

    first: int
    values: np.ndarray
    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The step after the last one."""
        return self.first + len(self.values)

    def time_of(self, steps: np.ndarray) -> np.ndarray:
        """About when steps had been trained: the journal knows it of some."""
        times: np.ndarray = np.interp(steps, np.array(self.ends) - 1, self.times)
        return times


@dataclass(eq=False)
class Seen:
    """What a run has shown so far. Whoever gets one does not change it.

    Attributes:
        writer: Who writes it now; `None`: nobody.
        series: Every step's outputs by name.
        events: As `JournalReader.events`.
        epochs: Those that have begun.
        checkpoints: Rows of the journal's table.
        signals: As `JournalReader.signals`.
        facts: By name.
    """

    writer: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[EpochRow] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    signals: list[tuple[np.ndarray, dict[str, np.ndarray]]] = field(
        default_factory=list
    )
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def stop(self) -> int | None:
        """The step after the last one recorded; `None` before the first."""
        return max((s.stop for s in self.series.values()), default=None)


class Following:
    """Follows one run. Any thread may ask.

    Args:
        folder: The run.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._signature: Signature | None = None
        self._checked: Any = None
        self._seen = Seen()
        self._entries: tuple[Any, Any, int] = ((), None, 0)
        self._known: dict[tuple[str, int], checkpoint.Entry] = {}

    def look(self) -> Seen:
        """What the run has shown up to now.

        Raises:
            RunError: It is damaged, or gone.
        """
        with self._lock:
            # Before the files: what comes in between is seen the next time.
            writer = self.folder.writer()
            signature = self._stat()
            if signature != self._signature:
                self._read(writer is not None, signature)
                self._signature = signature
            self._seen.writer = writer
            return self._seen

    def summary(self) -> reading.Summary:
        """The run on one line; a damaged one is described, not raised."""
        path = str(self.folder.path)
        try:
            seen = self.look()
            entries, size_bytes = self._checkpoints()
            first, stop = self.folder.manifest["first_step"], seen.stop
            named = sorted(seen.series.items(), key=lambda s: s[0] != "loss")
            ends = [s.values[-1] for _, s in named if s.stop == stop]
            return reading.summed_up(
                self.folder,
                entries,
                epochs=sum(e.steps is not None for e in seen.epochs),
                steps=0 if stop is None else stop - first,
                loss=float(ends[0]) if ends else None,
                size_bytes=size_bytes,
                writer=seen.writer,
            )
        except LoopscopeError as error:
            return reading.Summary(path, "damaged", problem=str(error))

    def _checkpoints(self) -> tuple[Any, int]:
        """The entries of the folder of checkpoints, and the size of all files."""
        with self._lock:
            at = _stat(self.folder.checkpoints_path)
            if self._entries[0] != at:
                path = self.folder.checkpoints_path
                found = checkpoint.entries(path, self._known)
                self._entries = (at, found, reading.size_bytes(path))
            _, entries, size_bytes = self._entries
        # Those beside it are few, and some of them grow.
        with os.scandir(self.folder.path) as files:
            stats = [_stat(Path(file)) for file in files if file.is_file()]
        return entries, size_bytes + sum(s[1] for s in stats if s)

    def _files(self) -> list[Path]:
        path = self.folder.journal_path
        return [
            path,
            *(path.with_name(path.name + end) for end in ("-wal", "-journal")),
        ]

    def _stat(self) -> Signature:
        files = self._files()
        return (*map(_stat, files), _visible(files[0]))

    def _read(self, live: bool, signature: Signature) -> None:
        seen, path = self._seen, self.folder.journal_path
        file = signature[0] and signature[0][0]
        if file != self._checked:  # Another file than before: another run, perhaps.
            seen = Seen()
            self.folder.__dict__.pop("manifest", None)
        first = self.folder.manifest["first_step"]
        reader = JournalReader(
            path, live=live, first=first, checked=file == self._checked
        )
        try:
            last = seen.events[-1]["id"] if seen.events else 0
            events = reader.events(after=last)
            if last and any(e["kind"] == "resume" for e in events):
                # The journal was cut, and steps may have been trained again.
                seen, events = Seen(), reader.events()
            ends = [series.stop for series in seen.series.values()]
            stretches = reader.stretches(min(ends, default=0))
            marks = seen.signals[-1][0] if seen.signals else [-1]
            signals = reader.signals(int(marks[-1]) + 1)
            self._seen = Seen(
                series=_longer(seen.series, stretches),
                events=[*seen.events, *events],
                epochs=reader.epochs(),
                checkpoints=reader.rows("checkpoints"),
                signals=[*seen.signals, *signals],
                facts={name: reader.fact(name) for name in ("shapes",)},
            )
        finally:
            reader.close()
        self._checked = file


def _longer(known: dict[str, Series], new: list[Stretch]) -> dict[str, Series]:
    """Series with what is new at their ends; those that were there stay as they are."""
    added: dict[str, list[Stretch]] = {}
    for stretch in new:
        before = known.get(stretch.name)
        if before is None or stretch.first >= before.stop:
            added.setdefault(stretch.name, []).append(stretch)
    longer = dict(known)
    for name, stretches in added.items():
        old = known.get(name) or Series(stretches[0].first, np.zeros(0))
        parts = [old.values] if len(old.values) else []
        end, ends, times = old.stop, [*old.ends], [*old.times]
        for stretch in stretches:
            if stretch.first != end:
                break  # Damaged; `loopscope verify` says more.
            parts.append(stretch.values)
            end += len(stretch.values)
            ends.append(end)
            times.append(stretch.time)
        longer[name] = Series(old.first, np.concatenate(parts), ends, times)
    return longer


def _stat(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and time of change of a file; `None` if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _visible(journal: Path) -> bytes:
    """What changes as a transaction becomes visible; empty of a run nobody writes.

    The log beside a database has a transaction before that, while the disk takes it:
    whoever reads then finds the old values in files that do not change any more.

    Source: the header of the WAL-index, https://www.sqlite.org/walformat.html
    """
    try:
        with journal.with_name(f"{journal.name}-shm").open("rb") as index:
            return index.read(HEADER_BYTES)
    except OSError:
        return b""
