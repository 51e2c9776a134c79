"""From a run folder back into a loop: which checkpoint, and whether it can be trusted.

Only what a run folder says about itself is looked at here; whether the code, the data
and the machine are still the same is the part of changes.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.errors import RunError, UsageError
from loopscope.run import checkpoint as checkpoints
from loopscope.run import reading, signals
from loopscope.run.content import standing_of
from loopscope.run.folder import Folder, unwritable
from loopscope.run.lock import Lock
from loopscope.run.plain import decode
from loopscope.run.recorder import Past, Recorder
from loopscope.run.recording import Recording

if TYPE_CHECKING:
    from loopscope.loop import Loop

ANYWAY = "anyway"


class Follower:
    """Records nothing: the chief does. Leaves when the chief says so."""

    @contextmanager
    def listening(self, *arguments: Any) -> Iterator[None]:
        """As the recorder's: signals wait for the chief to save."""
        with signals.caught(lambda number: None):
            yield


@contextmanager
def recording(
    loop: Loop, run: Any, resume: bool | str, epochs: int
) -> Iterator[Recorder | Follower]:
    """Open a run folder for a training of `loop`, new or to be gone on with.

    Before anything else is prepared: the seed and the gear are the run's.

    Args:
        loop: What will be trained.
        run: A path or a `Recording`.
        resume: Whether to go on with the run that is there; `"anyway"`: whatever has
            changed since. Where there is none yet, one is begun.
        epochs: The number at which to stop.

    Raises:
        RunError: The folder holds a run already, is written by another process, is
            damaged beyond use, or cannot be written.
    """
    if resume not in (True, False, ANYWAY):
        raise UsageError(
            f"`resume` must be True, False or {ANYWAY!r}. Received: resume={resume!r}"
        )
    how = Recording.of(run)
    folder = Folder(Path(how.path))
    if loop.together.chief:
        with _chief(loop, folder, how, run, resume, epochs) as recorder:
            yield recorder
    else:
        with _follower(loop, folder) as follower:
            yield follower


@contextmanager
def _chief(
    loop: Loop,
    folder: Folder,
    how: Recording,
    run: Any,
    resume: bool | str,
    epochs: int,
) -> Iterator[Recorder]:
    """The run of a single process, or of the chief of several."""
    with loop.together.alone():
        lock = _locked(folder, resume)
    try:
        with loop.together.alone():
            past = None
            if folder.exists:
                manifest = folder.manifest
                if not isinstance(run, Recording):
                    how = Recording(how.path, **manifest["recording"])
                past = find(folder, epochs, anyway=resume == ANYWAY)
                if past is None:
                    folder.forget()
        loop.together.agreed(past and (past.checkpoint.name, past.over))
        if past is not None:
            loop.adopt(past.standing)
            loop.go_on_from(past.standing)
        recorder = Recorder(loop, folder, how, past)
        del past  # The recorder lets go of its arrays as training begins.
        yield recorder
    finally:
        loop.go_on_from(None)
        lock.release()
        folder.leave_no_trace()


def _locked(folder: Folder, resume: bool | str) -> Lock:
    if folder.exists and not resume:
        raise RunError(
            f"{str(folder.path)!r} holds a run already. Go on with it: `resume=True`, "
            f"`loopscope resume {folder.path}`; or give this training another folder."
        )
    folder.make()
    lock = folder.lock()
    try:
        lock.acquire()
    except (OSError, RunError) as error:
        folder.leave_no_trace()
        if isinstance(error, OSError):
            raise unwritable(folder.path, error) from error
        raise
    return lock


@contextmanager
def _follower(loop: Loop, folder: Folder) -> Iterator[Follower]:
    """A worker of a run that the chief writes: it goes on where the chief does."""
    found = loop.together.agreed(None)
    if found is not None:
        name, over = found
        standing = standing_of(checkpoints.read(folder.checkpoints_path, name))
        standing = replace(standing, stopped=True) if over else standing
        loop.adopt(standing)
        loop.go_on_from(standing)
    try:
        yield Follower()
    finally:
        loop.go_on_from(None)


def find(folder: Folder, epochs: int, *, anyway: bool) -> Past | None:
    """Where a run can go on: the newest checkpoint that is whole.

    The journal must reach up to it, undamaged; what is damaged is named and passed
    over. `None`: the run was ended before it had a checkpoint.

    Raises:
        RunError: There are checkpoints, and none that can be used; or the journal is
            damaged, and it may not be begun anew.
    """
    found, notes = checkpoints.entries(folder.checkpoints_path)
    first: int = folder.manifest["first_step"]
    try:
        if not found and not notes and not folder.journal_path.exists():
            return None
        state = _journal(folder)
        if not found and not notes and state.recorded == first:
            return None
    except RunError as error:
        if not anyway:
            raise RunError(
                f"{error}. Everything up to the damage could be lost: `--anyway` "
                "(`resume='anyway'`) keeps it aside and trains again from the first "
                "checkpoint."
            ) from error
        notes.append(f"{error}; begun anew")
        _put_aside(folder)
        state = _Journal(first, first, None, whole=False)
    if state.damage:
        notes.append(state.damage)
    for entry in reversed(found):
        finished = bool(entry.content["finished"])
        if finished and not _is_over(entry.content, epochs):
            continue
        lacking = [
            epoch
            for epoch, _ in entry.content["passes"]
            if epoch not in dict(state.history)
        ]
        if lacking and state.whole:
            notes.append(
                f"the journal lacks epoch {lacking[0]} before checkpoint {entry.name}"
            )
            continue
        if entry.step > state.covered:
            notes.append(
                f"the journal ends before step {entry.step} of checkpoint {entry.name}"
            )
            continue
        try:
            read = checkpoints.read(folder.checkpoints_path, entry.name)
        except RunError as error:
            notes.append(str(error))
            continue
        standing = standing_of(read)
        if finished:
            standing = replace(standing, stopped=True)
        return Past(
            read,
            standing,
            manifest=folder.manifest,
            recorded=state.recorded,
            data=state.data,
            history=[h for h in state.history if h[0] < standing.cursor.epoch],
            notes=tuple(notes),
            over=finished,
            anyway=anyway,
            move_to=folder.path if "parent" in folder.manifest else None,
        )
    raise RunError(
        f"The run {str(folder.path)!r} has no checkpoint that can be used:"
        + "".join(f"\n  {note}" for note in notes)
    )


@dataclass(frozen=True)
class _Journal:
    covered: int
    recorded: int
    data: str | None
    history: Sequence[tuple[int, Mapping[str, Any]]] = ()
    damage: str = ""
    whole: bool = True
    """Whether it is the run's, not one that is begun anew."""


def _journal(folder: Folder) -> _Journal:
    """How far the journal can be trusted.

    Raises:
        RunError: Something in it but the values of steps is damaged.
    """
    with reading.journal(folder, ours=True) as reader:
        reader.check()
        covered, recorded = reader.covered(), reader.recorded()
        damage = ""
        if covered < recorded:
            damage = f"the journal is damaged at step {covered}"
        return _Journal(
            covered,
            recorded,
            reader.fact("data"),
            [(e.epoch, decode(e.logs, {})) for e in reader.epochs() if e.logs],
            damage,
        )


def _is_over(content: Any, epochs: int) -> bool:
    """Whether a finished training has nothing left to do."""
    return bool(content["stopped"]) or content["cursor"]["epoch"] >= epochs


def _put_aside(folder: Folder) -> None:
    for path in folder.path.glob("journal.sqlite*"):
        path.replace(path.with_name(path.name.replace("journal", "journal.damaged")))
