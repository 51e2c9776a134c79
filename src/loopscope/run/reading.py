"""A run as it lies on the disk: what is to be known of it without running anything.

No framework is needed, and none is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import LoopscopeError, RunError
from loopscope.run import checkpoint
from loopscope.run.folder import Folder
from loopscope.run.journal import JournalReader
from loopscope.run.plain import decode


@dataclass(frozen=True)
class Summary:
    """A run on one line.

    Attributes:
        path: Of its folder.
        status: `"running"`, `"finished"`, `"interrupted"`, or `"damaged"`.
        experiment: What it trains, by name, or the script that did.
        backend: Of Keras.
        gear: How steps were executed.
        created: When, in UTC.
        epochs: Epochs that are over.
        steps: Steps recorded.
        resumable_step: Where it would go on; steps from there on are run again.
        loss: Of the last step.
        size_bytes: Of all its files.
        writer: Who writes it now: pid, host, since.
        problem: What is wrong with it.
    """

    path: str
    status: str
    experiment: str = ""
    backend: str = ""
    gear: str | None = None
    created: str = ""
    epochs: int = 0
    steps: int = 0
    resumable_step: int | None = None
    loss: float | None = None
    size_bytes: int = 0
    writer: dict[str, Any] | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@contextmanager
def journal(folder: Folder, *, ours: bool = False) -> Iterator[JournalReader]:
    """A run's journal, for reading.

    Args:
        folder: The run.
        ours: Whether this process holds the lock, and does not write yet.
    """
    reader = JournalReader(
        folder.journal_path,
        live=not ours and folder.writer() is not None,
        first=folder.manifest["first_step"],
    )
    try:
        yield reader
    finally:
        reader.close()


def summary(folder: Folder) -> Summary:
    """What a run is and how far it has come; a damaged one is described, not raised."""
    path = str(folder.path)
    try:
        manifest = folder.manifest
        found = checkpoint.entries(folder.checkpoints_path)
        writer = folder.writer()
        with journal(folder) as reader:
            epochs = [e for e in reader.epochs() if e.steps is not None]
            first = manifest["first_step"]
            last = reader.recorded()
            tail = reader.scalars(None, max(first, last - 1))
    except LoopscopeError as error:
        return Summary(path, "damaged", problem=str(error))
    loss = next(iter(_loss_first(tail)), None)
    return summed_up(
        folder,
        found,
        epochs=len(epochs),
        steps=last - first,
        loss=float(loss[-1]) if loss is not None and len(loss) else None,
        size_bytes=size_bytes(folder.path),
        writer=writer,
    )


def summed_up(
    folder: Folder,
    checkpoints: tuple[Sequence[checkpoint.Entry], Sequence[str]],
    *,
    epochs: int,
    steps: int,
    loss: float | None,
    size_bytes: int,
    writer: dict[str, Any] | None,
) -> Summary:
    """A run on one line, from what was read of it."""
    manifest, (found, problems) = folder.manifest, checkpoints
    ended = [e for e in found if e.content["finished"]]
    open_ends = [e for e in found if not e.content["finished"]]
    # A lock whose text is damaged still holds.
    running = writer is not None
    status = "running" if running else "finished" if ended else "interrupted"
    return Summary(
        str(folder.path),
        status,
        experiment=str(manifest["origin"].get("experiment") or _script(manifest)),
        backend=manifest["identity"]["backend"],
        gear=(found[-1].content["gear"] if found else manifest["identity"]["gear"]),
        created=manifest["created"],
        epochs=epochs,
        steps=steps,
        resumable_step=open_ends[-1].step if open_ends else None,
        loss=loss,
        size_bytes=size_bytes,
        writer=writer,
        problem="; ".join(problems),
    )


def summaries(path: Path) -> list[Summary]:
    """Every run in a folder or below it, newest first; or the one that it is."""
    if Folder(path).exists:
        return [summary(Folder(path))]
    if not path.is_dir():
        raise RunError(f"There is no folder {str(path)!r}")
    found = [summary(Folder(p.parent)) for p in path.rglob("run.json")]
    return sorted(found, key=lambda s: s.created, reverse=True)


def steps(folder: Folder) -> dict[str, np.ndarray]:
    """Every step's outputs: `"step"` and one array a name, of shape `(steps,)`."""
    with journal(folder) as reader:
        found = reader.scalars()
    if not found:
        return {"step": np.zeros(0, np.int64)}
    first = min(at for at, _ in found.values())
    stop = max(at + len(values) for at, values in found.values())
    columns: dict[str, np.ndarray] = {"step": np.arange(first, stop)}
    for given, (at, values) in found.items():
        name = f"{given} (output)" if given == "step" else given
        if len(values) == stop - first:
            columns[name] = values
            continue
        column = np.full(stop - first, np.nan)  # It was not there from the beginning.
        column[at - first : at - first + len(values)] = values
        columns[name] = column
    return columns


def signals(folder: Folder) -> dict[str, np.ndarray]:
    """What a watched training measured: `"step"` and one array a name.

    Each of shape `(m,)`; not a number where a step had no such signal.
    """
    with journal(folder) as reader:
        stretches = reader.signals()
    parts = [steps for steps, _ in stretches]
    count = sum(map(len, parts))
    empty = np.zeros(0, np.int64)
    columns: dict[str, np.ndarray] = {"step": np.concatenate([empty, *parts])}
    at = 0
    for steps_, values in stretches:
        for name, value in values.items():
            if name not in columns:
                columns[name] = np.full(count, np.nan, np.float32)
            columns[name][at : at + len(steps_)] = value
        at += len(steps_)
    return columns


def epochs(folder: Folder) -> list[dict[str, Any]]:
    """Every epoch that is over: epoch, first_step, steps, seconds, and its metrics."""
    with journal(folder) as reader:
        rows = reader.epochs()
    found = []
    for r in rows:
        if r.steps is None:
            continue
        row: dict[str, Any] = {
            "epoch": r.epoch,
            "first_step": r.first_step,
            "steps": r.steps,
            "seconds": r.wall_s,
        }
        for name, value in decode(r.logs or {}, {}).items():
            row[f"{name} (metric)" if name in row else name] = value
        found.append(row)
    return found


Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Step, mean, least and greatest of each point."""


def curve(folder: Folder, name: str, points: int) -> Curve:
    """A step's output in at most so many points: step, mean, least, greatest.

    Each of shape `(points,)`; what is not a number has no part in a point's values.
    """
    with journal(folder) as reader:
        found = reader.scalars(name)
    if name not in found:
        raise RunError(f"The run {str(folder.path)!r} records no {name!r}")
    return points_of(*found[name], points)


def points_of(first: int, values: np.ndarray, points: int) -> Curve:
    """Values of the steps from `first` on, in at most so many points, as `curve`.

    A point where nothing is finite has a mean that is none, and no least or greatest.
    """
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0)
    size = max(1, -(-len(values) // points))
    starts = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    low_of = high_of = known = values
    counts = np.diff(np.append(starts, len(values)))
    if not finite.all():
        counts = np.add.reduceat(finite, starts, dtype=np.int64)
        known = np.where(finite, values, 0)
        low_of = np.where(finite, values, np.inf)
        high_of = np.where(finite, values, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(known, starts, dtype=np.float64) / counts
    low = np.minimum.reduceat(low_of, starts)
    high = np.maximum.reduceat(high_of, starts)
    return first + starts, mean, low, high


def size_bytes(path: Path) -> int:
    """Of all files; those of a live run come and go."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _loss_first(found: dict[str, tuple[int, np.ndarray]]) -> Sequence[np.ndarray]:
    names = sorted(found, key=lambda name: name != "loss")
    return [found[name][1] for name in names]


def _script(manifest: Any) -> str:
    script = manifest.get("script") or [""]
    return Path(script[0]).name
