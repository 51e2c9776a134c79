"""The journal: what happened, in SQLite.

Values of steps lie in rows of many steps each, as the bytes of an array, so that the
journal keeps up with the fused gears and ten million steps can be read at once. Every
row carries the CRC-32 of its other columns: SQLite itself does not notice a flipped
bit. docs/run-format.md describes the tables.

SQLite from 3.7.0 to 3.51.2 can lose a page when two connections write: there is one
that writes, and readers are opened read-only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import RunError

VERSION = 2
APPLICATION = 0x6C6F6F70
"""Says in the header of the file whose it is: "loop"."""

TABLES = {
    "steps": ("first", "name", "count", "dtype", "data", "time"),
    "signals": ("first", "every", "names", "count", "data", "time"),
    "epochs": ("epoch", "first_step", "steps", "logs", "wall_s", "time"),
    "events": ("id", "step", "kind", "data", "time"),
    "checkpoints": (
        "name",
        "step",
        "epoch",
        "batch_index",
        "size_bytes",
        "sha256",
        "state_sha256",
        "kept",
        "time",
    ),
    "writes": ("step", "turn", "path", "dtype", "shape", "data"),
    "facts": ("name", "value"),
}
"""Each table with its columns; `crc` comes after them."""

_KEYS = {
    "steps": "first, name",
    "signals": "first",
    "epochs": "epoch",
    "events": "id",
    "checkpoints": "name",
    "writes": "step, turn, path",
    "facts": "name",
}

_SCHEMA = "\n".join(
    f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)}, crc INTEGER, "
    f"PRIMARY KEY ({_KEYS[table]})) WITHOUT ROWID;"
    for table, columns in TABLES.items()
)

Row = tuple[Any, ...]


def crc(row: Iterable[Any]) -> int:
    """The CRC-32 of a row: of each column's kind, length and bytes, in order.

    NULL is `N` and nothing, an integer `I` and its decimal digits, a real number `F`
    and its 8 bytes (little-endian), text `S` and its UTF-8, a blob `B` and its bytes.
    """
    value = 0
    for column in row:
        kind, data = _bytes(column)
        value = zlib.crc32(b"%b%d:" % (kind, len(data)), value)
        value = zlib.crc32(data, value)
    return value


def _crc_of(table: str, row: Iterable[Any]) -> int:
    """Of a row with the name of its table first: one of another table is none of it."""
    return crc((table, *row))


def _read(
    db: sqlite3.Connection, table: str, where: str = "", *values: Any
) -> list[tuple[Row, bool]]:
    """Rows by key, without their CRC, and whether each is what was written."""
    columns = ", ".join(TABLES[table])
    rows = db.execute(
        f"SELECT {columns}, crc FROM {table} {where} ORDER BY {_KEYS[table]}", values
    )
    return [(row[:-1], _crc_of(table, row[:-1]) == row[-1]) for row in rows]


def _bytes(column: Any) -> tuple[bytes, bytes]:
    if isinstance(column, bytes):
        return b"B", column
    if isinstance(column, str):
        return b"S", column.encode("utf-8", "surrogatepass")
    if isinstance(column, float):
        return b"F", struct.pack("<d", column)
    return (b"N", b"") if column is None else (b"I", b"%d" % column)


class JournalWriter:
    """The one connection that writes. Used by one thread.

    Args:
        path: The file; made if need be.

    Raises:
        sqlite3.Error: The file cannot be opened or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=5.0
        )
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint=4000")
            self._db.execute(f"PRAGMA application_id={APPLICATION}")
            self._db.execute(f"PRAGMA user_version={VERSION}")
            self._db.executescript(_SCHEMA)
        except BaseException:
            self._db.close()
            raise

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All of a block's rows, or none.

        Args:
            durable: Wait until the disk has them: they outlive a power cut, not only
                a killed process.
        """
        if durable:
            self._db.execute("PRAGMA synchronous=FULL")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
        finally:
            if durable:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("PRAGMA synchronous=NORMAL")

    def put(self, table: str, rows: Sequence[Row]) -> None:
        """Insert rows; those of the same key are replaced."""
        marks = ", ".join("?" * (len(TABLES[table]) + 1))
        self._db.executemany(
            f"INSERT OR REPLACE INTO {table} VALUES ({marks})",
            [(*row, _crc_of(table, row)) for row in rows],
        )

    def next_event(self) -> int:
        """The number of the next event, counted from 1."""
        (last,) = self._db.execute("SELECT max(id) FROM events").fetchone()
        return (last or 0) + 1

    def cut(self, step: int, turn: int, epoch: int, *, begun: bool) -> None:
        """Forget what came after `step` steps had been trained.

        Args:
            step: Steps that stay: 0 to `step - 1`.
            turn: Of the writes before step `step`, how many turns stay.
            epoch: Epochs that stay whole: those before this one.
            begun: Whether this one had begun.
        """
        rows = _read(self._db, "steps")
        whole = [row for row, is_whole in rows if is_whole]
        if len(whole) < len(rows):
            # A row is not found by a key that is damaged: begin the table anew.
            self._db.execute("DELETE FROM steps")
            self.put("steps", whole)
        for first, name, count, dtype, data, time in whole:
            if first + count <= step:
                continue
            self._db.execute(
                "DELETE FROM steps WHERE first = ? AND name = ?", (first, name)
            )
            if first < step:
                size = np.dtype(dtype).itemsize * (step - first)
                kept = (first, name, step - first, dtype, data[:size], time)
                self.put("steps", [kept])
        self._cut_signals(step)
        self._db.execute(
            "DELETE FROM writes WHERE step > ? OR (step = ? AND turn >= ?)",
            (step, step, turn),
        )
        last = epoch if begun else epoch - 1
        self._db.execute("DELETE FROM epochs WHERE epoch > ?", (last,))
        begun_then = self._db.execute(
            "SELECT epoch, first_step, time FROM epochs WHERE epoch = ?", (epoch,)
        ).fetchall()
        self.put(
            "epochs", [(e, first, None, None, None, t) for e, first, t in begun_then]
        )
        # What was made at the end of training stands at the same step.
        self._db.execute(
            "DELETE FROM checkpoints WHERE step > ? OR name LIKE '%-end'", (step,)
        )

    def _cut_signals(self, step: int) -> None:
        rows = [row for row, whole in _read(self._db, "signals") if whole]
        self._db.execute("DELETE FROM signals")
        kept = []
        for first, every, names, count, data, time in rows:
            left = min(count, -(-(step - first) // every))
            if left > 0:
                size = len(data) // count * left
                kept.append((first, every, names, left, data[:size], time))
        self.put("signals", kept)

    def replace_events(self, rows: Sequence[Row]) -> None:
        """Forget every event, and begin with these."""
        self._db.execute("DELETE FROM events")
        self.put("events", rows)

    def close(self, *, tidy: bool = True) -> None:
        """Close the file; if tidy, leave one file that can be read anywhere."""
        if tidy:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()


@dataclass(frozen=True)
class EpochRow:
    """An epoch, as the journal has it. What is not over yet is `None`.

    Attributes:
        epoch: Its number, counted from 0.
        first_step: Global number of its first step.
        steps: How many steps it had.
        logs: Its metrics.
        wall_s: Seconds, validation included.
        time: When the row was written, in seconds since 1970.
    """

    epoch: int
    first_step: int
    steps: int | None
    logs: dict[str, Any] | None
    wall_s: float | None
    time: float = 0.0


@dataclass(frozen=True, eq=False)
class Stretch:
    """Consecutive steps of one output, as a row holds them.

    Attributes:
        name: Of the output.
        first: The first step.
        values: One a step.
        time: When the last of them came, in seconds since 1970.
    """

    name: str
    first: int
    values: np.ndarray
    time: float


class JournalReader:
    """Reads a journal without keeping its writer waiting, and without changing it.

    Args:
        path: The file.
        live: Whether a process may be writing it. Otherwise, where a crash has left a
            log beside the file, both are read from a copy.
        first: The number of the run's first step.
        checked: Whether its pages were looked through before; that reads all of them.

    Raises:
        RunError: There is none, it is damaged, or of a later version.
    """

    def __init__(
        self, path: Path, *, live: bool, first: int = 0, checked: bool = False
    ) -> None:
        self._path, self._first = path, first
        self._steps: list[tuple[Row, bool]] | None = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        if not path.exists():
            raise RunError(f"There is no journal {str(path)!r}")
        logs = [path.with_name(path.name + end) for end in ("-wal", "-journal")]
        if not live and any(log.exists() for log in logs):
            self._copy = tempfile.TemporaryDirectory(prefix="loopscope-")
            for file in filter(Path.exists, (path, *logs)):
                shutil.copyfile(file, Path(self._copy.name) / file.name)
            path = Path(self._copy.name) / path.name
        # A file that nobody writes can be read where nothing can be written.
        mode = "mode=ro" if live or self._copy else "mode=ro&immutable=1"
        with self._reading():
            self._db = sqlite3.connect(
                f"{path.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False
            )
            try:
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                (owner,) = self._db.execute("PRAGMA application_id").fetchone()
                found = "ok"
                if not checked:
                    (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            except BaseException:
                self.close()
                raise
        # One bit in a page's count of rows lets rows vanish that no checksum misses.
        if found != "ok":
            self.close()
            raise RunError(f"{self._path} is damaged: {found}")
        if owner != APPLICATION or version < 1:
            self.close()
            raise RunError(f"{self._path} is damaged: it does not say it is a journal")
        self._version = version
        if version > VERSION:
            self.close()
            raise RunError(
                f"{self._path} has version {version}; this version of loopscope reads "
                f"up to {VERSION}. Install a newer one."
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
            raise RunError(f"{self._path} is damaged: {error}") from error

    def rows(self, table: str, where: str = "", *values: Any) -> list[Row]:
        """Rows of a table without their CRC, by key.

        Raises:
            RunError: A row is not what was written.
        """
        with self._reading():
            found = _read(self._db, table, where, *values)
        for row, whole in found:
            if not whole:
                raise self._damaged(table, row)
        return [row for row, _ in found]

    def _damaged(self, table: str, row: Row) -> RunError:
        return RunError(
            f"{self._path} is damaged: the row {row[0]!r} of {table!r} does not match "
            "its checksum"
        )

    def scalars(
        self, name: str | None = None, first: int = 0, stop: int | None = None
    ) -> dict[str, tuple[int, np.ndarray]]:
        """The values of steps: by name, the first step and an array.

        Args:
            name: Of one of them; `None` for all.
            first: The first step wanted.
            stop: The step to stop before.

        Raises:
            RunError: A row is damaged, or steps are missing between others.
        """
        parts: dict[str, list[np.ndarray]] = {}
        begins: dict[str, int] = {}
        ends: dict[str, int] = {}
        # All rows, not those that a query would choose by a key that may be damaged.
        for row, whole in self._step_rows():
            if not whole:
                raise self._damaged("steps", row)
            at, found, count, dtype, data, _ = row
            if name is not None and found != name:
                continue
            if ends.setdefault(found, at) != at:
                raise RunError(
                    f"{self._path} is damaged: steps {ends[found]} to {at - 1} of "
                    f"{found!r} are missing"
                )
            begins.setdefault(found, at)
            ends[found] = at + count
            if at + count > first and (stop is None or at < stop):
                array = np.frombuffer(data, np.dtype(dtype))
                high = None if stop is None else stop - at
                part = array[max(0, first - at) : high]
                parts.setdefault(found, []).append(part)
        begin = min(begins.values(), default=self._first)
        if begin != self._first:
            raise RunError(
                f"{self._path} is damaged: steps {self._first} to {begin - 1} are "
                "missing"
            )
        return {
            found: (max(first, begins[found]), np.concatenate(arrays))
            for found, arrays in parts.items()
        }

    def stretches(self, first: int = 0) -> list[Stretch]:
        """The rows of steps that begin at step `first` or later, by step.

        Unlike `scalars` it reads no row before, so that somebody who has read the
        others need not do so again.

        Raises:
            RunError: A row is damaged.
        """
        rows = self.rows("steps", "WHERE first >= ?", first)
        with self._reading():
            return [
                Stretch(name, at, np.frombuffer(data, np.dtype(dtype)), time)
                for at, name, _, dtype, data, time in rows
            ]

    def signals(self, first: int = 0) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """The signals of watched steps, in stretches: their numbers, values by name.

        Args:
            first: The first step wanted; no stretch is cut for it.

        Raises:
            RunError: A row is damaged.
        """
        if self._version < 2:
            return []
        found = []
        rows = self.rows("signals", "WHERE first >= ?", first)
        for first, every, names, count, data, _ in rows:
            with self._reading():
                listed = json.loads(names)
                values = np.frombuffer(data, "<f4").reshape(count, len(listed))
                by_name = dict(zip(listed, values.T, strict=True))
            found.append((first + every * np.arange(count), by_name))
        return found

    def epochs(self) -> list[EpochRow]:
        """Every epoch that has begun."""
        return [
            EpochRow(
                epoch,
                first,
                steps,
                None if logs is None else json.loads(logs),
                wall_s,
                time,
            )
            for epoch, first, steps, logs, wall_s, time in self.rows("epochs")
        ]

    def events(
        self, kind: str | None = None, *, after: int = 0
    ) -> list[dict[str, Any]]:
        """Every event: id, step, kind, time (seconds since 1970), and its data.

        Args:
            kind: Those of one kind.
            after: Those whose number is above.

        Raises:
            RunError: A row is damaged or missing.
        """
        rows = self.rows("events", "WHERE id > ?", after)
        if [row[0] for row in rows] != list(range(after + 1, after + len(rows) + 1)):
            raise RunError(f"{self._path} is damaged: an event is missing")
        return [
            {"id": id_, "step": step, "kind": k, "time": time, **json.loads(data)}
            for id_, step, k, data, time in rows
            if kind in (None, k)
        ]

    def fact(self, name: str) -> Any:
        """A fact that became known while the run went on; `None` if it did not."""
        rows = self.rows("facts", "WHERE name = ?", name)
        return json.loads(rows[0][1]) if rows else None

    def covered(self) -> int:
        """How many steps are there in unbroken order from the first, undamaged.

        The number of the step that comes after them.
        """
        rows = self._step_rows()
        damaged = any(not whole for _, whole in rows)
        ends: dict[str, int] = {}
        for (at, name, count, *_), whole in rows:
            if not whole:
                continue
            # An output may come later than others, but not where a row may be lost.
            if ends.setdefault(name, self._first if damaged or not ends else at) == at:
                ends[name] = at + count
        if any(not whole and row[1] not in ends for row, whole in rows):
            return self._first
        return min(ends.values(), default=self._first)

    def recorded(self) -> int:
        """The number of the step after the last one that is there, undamaged."""
        ends = [row[0] + row[2] for row, whole in self._step_rows() if whole]
        return max(ends, default=self._first)

    def _step_rows(self) -> list[tuple[Row, bool]]:
        """Every row of steps, and whether it is what was written; read once."""
        if self._steps is None:
            with self._reading():
                self._steps = _read(self._db, "steps")
        return self._steps

    def check(self) -> None:
        """Read everything but the values of steps.

        Raises:
            RunError: Something is damaged.
        """
        for table in ("epochs", "checkpoints", "writes", "facts"):
            self.rows(table)
        self.signals()
        self.events()

    def copy(self, path: Path) -> None:
        """Write all of it to a new file."""
        target = sqlite3.connect(path)
        try:
            with self._reading():
                self._db.backup(target)
        finally:
            target.close()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
        if self._copy is not None:
            self._copy.cleanup()


def text(document: Mapping[str, Any]) -> str:
    """A JSON column: numbers that are not finite as Python and SQLite's users know."""
    return json.dumps(document, sort_keys=True, default=str)
