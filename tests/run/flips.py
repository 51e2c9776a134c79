"""Damage to the files of a run folder, one at a time, and what is then said of the run.

    python flips.py RUN --epochs 30 --count 500

Whatever reads a damaged run refuses with a `RunError` that names the file, or goes back
to an earlier checkpoint and says why, or gives what it gave before: never other data,
never another exception, and never another folder. test_flips.py asks the same.
"""

import argparse
import shutil
import sqlite3
import struct
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loopscope.errors import RunError
from loopscope.run import checkpoint, reading
from loopscope.run.folder import Folder
from loopscope.run.journal import JournalReader, JournalWriter
from loopscope.run.resume import find

JOURNAL, WAL = "journal.sqlite", "journal.sqlite-wal"
READS_ONLY = "summary"
"""The last of what is asked that must leave the folder as it is."""

CHANGED = {"resumable_step", "status", "problem", "size_bytes"}
"""What a run's summary may say otherwise when its last checkpoint is lost."""

SHOWN = 5
"""Wrong answers to one kind of damage that are printed."""

UNREAD = ("lock", "journal.sqlite-shm")
"""Files that say nothing about the run."""


class Wrong(AssertionError):
    """A damaged run was taken for another one."""


# Damage: the bytes of a file and random numbers give other bytes, and say where.


def flipped(data, rng):
    """One bit anywhere."""
    return _flip(data, int(rng.integers(len(data))), int(rng.integers(8)))


def structure_flipped(data, rng):
    """One bit of what says where rows lie in a file of SQLite's."""
    places = _structure(data)
    return _flip(data, places[int(rng.integers(len(places)))], int(rng.integers(8)))


def truncated(data, rng):
    """The end is missing."""
    size = int(rng.integers(len(data)))
    return data[:size], f"{size} of {len(data)} bytes left"


def emptied(data, rng):
    return b"", "empty"


def missing(data, rng):
    return None, "missing"


def every_flip(data, places):
    """Each bit of some bytes, one after the other."""
    for place in places:
        for bit in range(8):
            yield _flip(data, place, bit)


def page_headers(data):
    """Of each page that holds rows, the places of what it is and of how many."""
    return [range(start, start + 8) for start in _pages(data)]


def first_rows(data, table, count):
    """The places of the first bytes of a table's first rows: keys are in them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / JOURNAL).write_bytes(data)
        journal = sqlite3.connect(Path(folder) / JOURNAL)
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (page,) = journal.execute(query, (table,)).fetchone()
        journal.close()
    start = (page - 1) * struct.unpack(">H", data[16:18])[0]
    assert data[start] == 10, "a table of one page"
    cells = struct.unpack(f">{count}H", data[start + 8 : start + 8 + 2 * count])
    return [place for cell in cells for place in range(start + cell, start + cell + 14)]


def _flip(data, place, bit):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed), f"byte {place}, bit {bit}"


def _pages(data):
    """Where the pages that hold rows begin; before the first is the file's header."""
    size = struct.unpack(">H", data[16:18])[0]
    starts = [100, *range(size, len(data), size)]
    return [start for start in starts if data[start] in (2, 5, 10, 13)]


def _structure(data):
    """The file's header; of each page the header, the places of rows, their sizes."""
    size = struct.unpack(">H", data[16:18])[0]
    places = set(range(100))
    for start in _pages(data):
        cells = start + (12 if data[start] in (2, 5) else 8)
        count = struct.unpack(">H", data[start + 3 : start + 5])[0]
        places.update(range(start, cells + 2 * count))
        for i in range(cells, cells + 2 * count, 2):
            row = start // size * size + struct.unpack(">H", data[i : i + 2])[0]
            places.update(range(row, min(row + 16, len(data))))
    return sorted(places)


class Sound:
    """A copy of a run folder, what it says, and what it says of itself once damaged.

    Args:
        path: Of the run, which is left alone.
        folder: Where the copy is made.
        epochs: To which its training was to go.
    """

    def __init__(self, path, folder, epochs):
        self.path, self._epochs = Path(folder) / "run", epochs
        shutil.copytree(path, self.path)
        self.files = self._files()
        found, problems = checkpoint.entries(self.path / "checkpoints")
        assert not problems
        self._order = [entry.name for entry in found]
        self._checkpoints = {
            name: checkpoint.read(self.path / "checkpoints", name)
            for name in self._order
        }
        with reading.journal(Folder(self.path)) as journal:
            closed = [row for row in journal.epochs() if row.logs]
        self._history = [row.epoch for row in closed]
        self._past = find(Folder(self.path), epochs, anyway=False)
        self.steps = reading.steps(Folder(self.path))
        self._rows = {name: read(self.path) for name, read in ROWS.items()}
        self._summary = reading.summary(Folder(self.path))

    def outcomes(self, name, damages, asks=None):
        """What came of each damage to a file: how often what, and what is wrong."""
        counts, wrong = Counter(), []
        for data, where in damages:
            with self._damaged(name, data):
                for ask in asks or self._asks(name):
                    try:
                        counts[f"{ask}: {self._told(ask, name)}"] += 1
                    except Exception as error:
                        wrong.append(f"{name}, {where}: {ask}: {_in_short(error)}")
                    if ask == READS_ONLY and self._files() != self._is:
                        wrong.append(f"{name}, {where}: reading has changed the folder")
        return counts, wrong

    def random(self, name, damage, count, seed=0):
        """`outcomes` of a kind of damage, at so many places."""
        rng = np.random.default_rng(seed)
        return self.outcomes(
            name, (damage(self.files[name], rng) for _ in range(count))
        )

    def newest(self, end):
        """The name of the newest checkpoint's file that ends so."""
        return f"checkpoints/{self._past.checkpoint.name}.{end}"

    def _asks(self, name):
        """What is asked of the run; the last of it changes the folder."""
        if name.startswith("checkpoints/"):
            return "resume", READS_ONLY
        if name == "run.json":
            return "resume", READS_ONLY, "anyway"
        return "resume", "cut", "steps", *ROWS, READS_ONLY, "anyway"

    @contextmanager
    def _damaged(self, name, data):
        self._is = {**self.files, name: data}
        if data is None:
            del self._is[name]
            (self.path / name).unlink()
        else:
            (self.path / name).write_bytes(data)
        yield
        for known, content in self.files.items():
            if not (self.path / known).exists() or known == name:
                (self.path / known).write_bytes(content)
        for put_aside in self.path.glob("journal.damaged*"):
            put_aside.unlink()

    def _told(self, ask, name):
        try:
            match ask:
                case "resume" | "anyway":
                    return self._resume(name, anyway=ask == "anyway")
                case "cut":
                    return self._cut()
                case "steps":
                    return self._columns(name)
                case "summary":
                    return self._line(name)
            return self._listed(ask, name)
        except RunError as error:
            named = JOURNAL if name == WAL else name
            if named not in str(error):
                raise Wrong(f"{named} is not named: {error}") from error
            return "refused"

    def _resume(self, name, *, anyway):
        now = find(Folder(self.path), self._epochs, anyway=anyway)
        if now is None:
            raise Wrong("the run is taken for one that has not begun")
        was = self._past
        read = now.checkpoint
        assert_same_checkpoint(self._checkpoints[read.name], read)
        notes = " ".join(now.notes)
        anew = "begun anew" in notes
        if now.manifest != was.manifest:
            raise Wrong("another manifest")
        # The fingerprint may be lost where no step is kept that was trained on them.
        kept = read.step > was.manifest["first_step"]
        if now.data != was.data and (kept or now.data is not None):
            raise Wrong(f"another fingerprint of the data: {now.data}")
        if now.recorded > was.recorded:
            raise Wrong(f"{now.recorded} steps recorded of {was.recorded}")
        epochs = [e for e in self._history if e < now.standing.cursor.epoch]
        if [e for e, _ in now.history] != epochs and not anew:
            raise Wrong(f"the epochs before are {[e for e, _ in now.history]}")
        place = self._order.index
        if place(read.name) > place(was.checkpoint.name):
            raise Wrong(f"a later checkpoint: {read.name}")
        if read.name == was.checkpoint.name:
            return "as before"
        about = "journal" if name in (JOURNAL, WAL) else Path(name).stem
        # A checkpoint is there once its JSON is: without it, it never was.
        there = (self.path / name).exists() or not name.endswith(".json")
        if there and about not in notes:
            raise Wrong(f"an earlier checkpoint, {read.name}, with no word of {about}")
        return "an earlier checkpoint"

    def _cut(self):
        """What the journal says of the past once a training has gone on."""
        past = find(Folder(self.path), self._epochs, anyway=False)
        step, cursor = past.checkpoint.step, past.standing.cursor
        with tempfile.TemporaryDirectory() as place:
            for file in self.path.glob("journal.sqlite*"):
                shutil.copy(file, place)
            journal = JournalWriter(Path(place) / JOURNAL)
            with journal.transaction():
                turn = past.checkpoint.content["turn"]
                journal.cut(step, turn, cursor.epoch, begun=cursor.begun)
            journal.close()
            reader = JournalReader(Path(place) / JOURNAL, live=False)
            try:
                scalars = reader.scalars()
                epochs = [row.epoch for row in reader.epochs() if row.logs]
            finally:
                reader.close()
        for column in self.steps.keys() - {"step"}:
            first, values = scalars.get(column, (0, np.zeros(0)))
            if first or list(values) != list(self.steps[column][:step]):
                raise Wrong(f"{column!r} has {len(values)} of {step} from {first} on")
        if epochs != [e for e in self._history if e < cursor.epoch]:
            raise Wrong(f"of epochs 0 to {cursor.epoch}, {epochs}")
        return "the past is whole"

    def _columns(self, name):
        now, was = reading.steps(Folder(self.path)), self.steps
        size = len(now["step"])
        if name != WAL and size != len(was["step"]):
            raise Wrong(f"{size} steps of {len(was['step'])}")
        if size and list(now) != list(was):
            raise Wrong(f"columns {list(now)}")
        for column in now:
            if now[column].tobytes() != was[column][:size].tobytes():
                raise Wrong(f"other values of {column!r}")
        return "as before" if size == len(was["step"]) else "up to a step"

    def _listed(self, ask, name):
        now, was = ROWS[ask](self.path), self._rows[ask]
        if name != WAL and len(now) != len(was):
            raise Wrong(f"{len(now)} of {len(was)}")
        if repr(now) != repr(was[: len(now)]):
            raise Wrong("other ones")
        return "as before" if len(now) == len(was) else "up to a step"

    def _line(self, name):
        now, was = reading.summary(Folder(self.path)), self._summary
        if now.status == "damaged":
            raise RunError(now.problem)
        then, now_ = was.as_dict(), now.as_dict()
        apart = [k for k in then if repr(then[k]) != repr(now_[k])]
        if set(apart) <= {"size_bytes"}:
            return "as before"
        if name == WAL and now.steps <= was.steps and now.epochs <= was.epochs:
            return "up to a step"
        if name.endswith(".json") and not {*apart} - CHANGED:
            there = (self.path / name).exists()
            if not there or name in now.problem:
                return "an earlier checkpoint"
            raise Wrong(f"an earlier checkpoint, with no word of {name}")
        raise Wrong(", ".join(f"{k}: {then[k]!r} is {now_[k]!r}" for k in apart))

    def _files(self):
        return {
            str(file.relative_to(self.path)): file.read_bytes()
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file.name not in UNREAD
        }


def _events(path):
    with reading.journal(Folder(path)) as journal:
        return journal.events()


ROWS = {"epochs": lambda path: reading.epochs(Folder(path)), "events": _events}


def assert_same_checkpoint(was, now):
    """Every bit of a checkpoint is that of another one."""
    if list(was.state) != list(now.state) or was.extra.keys() != now.extra.keys():
        raise Wrong(f"other names of arrays in {now.name}")
    for arrays, others in ((was.state, now.state), (was.extra, now.extra)):
        for key, array in arrays.items():
            other = others[key]
            same = (array.dtype, array.shape) == (other.dtype, other.shape)
            if not same or array.tobytes() != other.tobytes():
                raise Wrong(f"another array {key!r} in {now.name}")
    for key in ("step", "content", "state_sha256", "pinned"):
        if getattr(was, key) != getattr(now, key):
            raise Wrong(f"another {key} in {now.name}")


def _in_short(error):
    if isinstance(error, Wrong):
        return str(error)
    at = traceback.extract_tb(error.__traceback__)[-1]
    name = type(error).__name__
    return f"{name}: {str(error)[:120]} ({Path(at.filename).name}:{at.lineno})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as place:
        sound = Sound(given.run, place, given.epochs)
        for name in sound.files:
            kinds = [(flipped, given.count), (truncated, given.count // 5)]
            kinds += [(emptied, 1), (missing, 1)]
            kinds += [(structure_flipped, given.count)] if name == JOURNAL else []
            for damage, count in kinds:
                counts, wrong = sound.random(name, damage, count, given.seed)
                told = ", ".join(f"{k} {n}" for k, n in sorted(counts.items()))
                print(f"{name}: {count} times {damage.__name__}: {told}")
                for line in wrong[:SHOWN]:
                    print(f"  WRONG {line}")
                if len(wrong) > SHOWN:
                    print(f"  and {len(wrong) - SHOWN} more")
                failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
