"""Listens to a loop and decides what is written, and when.

It hears everything twice: before anybody else, to know what steps have made of the
variables, and after everybody else, to see what callbacks have made of them since.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope.data.arrays import ArraySource
from loopscope.errors import RunError
from loopscope.events import (
    ChunkBegin,
    ChunkEnd,
    Compiled,
    Diagnosed,
    EpochBegin,
    EpochEnd,
    Event,
    GearChosen,
    Incident,
    PhaseBegin,
    PhaseEnd,
    Resumed,
    Signals,
    TrainEnd,
)
from loopscope.run import (
    about,
    changes,
    checkpoint,
    identity,
    memory,
    signals,
)
from loopscope.run.checkpoint import Checkpoint, Draft
from loopscope.run.content import content_of, encode_logs
from loopscope.run.folder import Folder, unwritable
from loopscope.run.journal import JournalWriter
from loopscope.run.plain import Arrays
from loopscope.run.recording import Recording
from loopscope.run.steering import Steering
from loopscope.run.writer import PATIENCE_S, Limits, Writer
from loopscope.run.writes import BARRIER, writes
from loopscope.standing import Standing

if TYPE_CHECKING:
    from loopscope.callbacks import CallbackListener
    from loopscope.data.source import Source
    from loopscope.loop import Loop

COST = 0.01
"""The share of the time that checkpoints which can wait may take."""


INCIDENT = (
    *("incident", "at", "what", "value", "usual", "examples", "of_data"),
    *("first", "begins", "problem", "text"),
)
"""What the journal has of an `Incident`."""


@dataclass(frozen=True, eq=False)
class Past:
    """What a training that goes on has behind it.

    Attributes:
        checkpoint: Where it goes on.
        standing: The same, as a loop takes it.
        manifest: Of the run.
        recorded: The step up to which the journal had come.
        data: The fingerprint of the training data, if the journal has it.
        history: The number and the metrics of each epoch before.
        notes: What was found on the way, one line each.
        over: Whether there is nothing left to do, so that nothing is written.
        anyway: Whether to go on whatever has changed since.
        move_to: A folder for the callbacks' files, where another run has theirs.
    """

    checkpoint: Checkpoint
    standing: Standing
    manifest: Mapping[str, Any]
    recorded: int
    data: str | None
    history: Sequence[tuple[int, Mapping[str, Any]]] = ()
    notes: Sequence[str] = ()
    over: bool = False
    anyway: bool = False
    move_to: Path | None = None

    def without_arrays(self) -> Past:
        """The same once the loop and its callbacks have their values."""
        return replace(
            self,
            checkpoint=replace(self.checkpoint, state={}, extra={}),
            standing=replace(self.standing, state={}),
        )


class Recorder:
    """Records one training of a loop.

    Args:
        loop: Whose.
        folder: Where.
        how: When, and how much.
        past: Where it goes on, if it does.
    """

    def __init__(
        self, loop: Loop, folder: Folder, how: Recording, past: Past | None
    ) -> None:
        self._loop, self._folder, self._how, self._past = loop, folder, how, past
        self._over = past is not None and past.over
        """Whether the run was at its end before."""
        self._branch = past.manifest.get("branch") if past is not None else None
        """Where this run leaves the one it branched off, and what changes there."""
        self._writer: Writer | None = None
        self._callbacks: list[Any] = []
        self._watch = True
        """Whether somebody may assign variables between the steps of an epoch."""
        self._before: Mapping[str, Any] | None = None
        """The variables as they were at the last look."""
        self._turn = 0
        """Groups of writes that were recorded before the next step."""
        self._saved_step, self._saved_s = -1, time.monotonic()
        self._saved_name = ""
        self._run_s = self._saved_run_s = 0.0
        """Seconds that all steps have taken; when the last checkpoint was made."""
        self._gear: str | None = None
        """In which the last steps were run."""
        self._first_step, self._passes = 0, 0
        """Of the epoch: its first step, and its passes over training data."""
        self._passed: Standing | None = None
        """Where the last pass over training data has led."""
        self._best: float | None = None
        self._best_name: str | None = None
        self._best_waits: Draft | None = None
        """The best checkpoint, where there was no time yet to write it."""
        self._remembers = True
        """Whether the callbacks are those of before, so that they can be set back."""
        self._differences: list[dict[str, Any]] = []
        """What has changed since the run was begun, where it goes on all the same."""
        self._signal: int | None = None
        self._asked = False
        self._steering = Steering(loop, folder)
        self._shaped = False
        """Whether the journal has what flows out of the parts of a step."""

    # Beginning and end.

    @contextmanager
    def listening(
        self,
        listener: CallbackListener | None,
        source: Source | None,
        arguments: Mapping[str, Any],
    ) -> Iterator[None]:
        """Record for the duration of a block, in which the loop trains."""
        loop = self._loop
        self._listener = listener
        if listener is not None:
            self._callbacks = [c for c in listener.callbacks if not _is_bar(c)]
        self._watch = listener is None or listener.hooked
        with loop.together.alone():
            if self._past is None:
                self._begin(source, arguments)
            else:
                self._prepare(self._past, source, arguments)
        self._steering.begin()
        limits = {"train": self._until_due}
        loop.subscribe(self._hear_first, first=True)
        loop.subscribe(self._hear_last, chunk_steps=limits)  # type: ignore[arg-type]
        loop.saves(self._ask)
        try:
            with signals.caught(self._tell), self._warnings():
                if source is not None and source.inexact():
                    self._say_inexact(source)
                yield
        except BaseException as error:
            self._end(error)
            raise
        else:
            self._end(None)
            self._leave("is finished", "could not be recorded to its end")
        finally:
            self._steering.end()
            loop.saves(None)
            loop.unsubscribe(self._hear_first)
            loop.unsubscribe(
                self._hear_last,
                chunk_steps=limits,  # type: ignore[arg-type]
            )

    def _begin(self, source: Source | None, arguments: Mapping[str, Any]) -> None:
        checkpoint.clean(self._folder.checkpoints_path)
        manifest = about.manifest(
            self._loop,
            self._how,
            source,
            None if self._listener is None else self._callbacks,
            arguments,
        )
        try:
            self._folder.write_manifest(manifest)
            self._open(JournalWriter(self._folder.journal_path))
        except (OSError, sqlite3.Error) as error:
            self._folder.forget()
            raise unwritable(self._folder.path, error) from error
        gear = self._loop.gear
        choice = self._loop.choice
        self._event(
            "begin",
            gear=gear.name if gear else None,
            chosen=asdict(choice) if choice is not None else None,
            pid=os.getpid(),
        )
        self._record_fingerprint(source)

    def _record_fingerprint(self, source: Source | None) -> None:
        if isinstance(source, ArraySource) and self._writer is not None:
            arrays = source.arrays
            self._writer.fact("data", lambda: identity.data_fingerprint(arrays))

    def _prepare(
        self, past: Past, source: Source | None, arguments: Mapping[str, Any]
    ) -> None:
        """Refuse what has changed, say what was found, let callbacks go on."""
        memories = past.checkpoint.content["callbacks"]
        differences = changes.since(
            past.manifest,
            self._loop,
            source,
            data=past.data,
            gear=past.standing.gear,
            callbacks=None if self._listener is None else self._callbacks,
            arguments=None if self._listener is None else arguments,
        )
        if not past.anyway:
            changes.refuse(differences, self._folder.path)
        self._differences = [d.as_dict() for d in differences]
        kinds = [memory.kind_of(c) for c in self._callbacks]
        self._remembers = kinds == [m["kind"] for m in memories]
        for note in past.notes:
            warnings.warn(f"{self._folder.path}: {note}", stacklevel=6)
        if self._remembers:
            memory.before_training(
                self._callbacks, memories, past.move_to, over=past.over
            )

    def _open(self, journal: JournalWriter) -> None:
        how = self._how
        limits = Limits(how.replay_steps, how.replay_s, how.disk_bytes)
        self._writer = Writer(self._folder, journal, limits, self._steering.live)

    def _go_on(self) -> None:
        """Cut the journal at the checkpoint: from here on this process writes."""
        past = self._past
        assert past is not None
        _refuse_other_batches(past, self._loop.data)
        standing, turn = past.standing, past.checkpoint.content["turn"]
        cursor = standing.cursor
        try:
            journal = JournalWriter(self._folder.journal_path)
            with journal.transaction(durable=True):
                journal.cut(standing.step, turn, cursor.epoch, begun=cursor.begun)
        except (OSError, sqlite3.Error) as error:
            raise unwritable(self._folder.path, error) from error
        checkpoint.cut(self._folder.checkpoints_path, past.checkpoint)
        checkpoint.clean(self._folder.checkpoints_path)
        self._open(journal)
        self._turn = turn
        self._saved_step, self._saved_s = standing.step, time.monotonic()
        self._saved_name = past.checkpoint.name
        self._run_s = self._saved_run_s = past.checkpoint.content["run_s"]
        self._gear = standing.gear
        if past.data is None:  # Lost with a journal, or not come to.
            self._record_fingerprint(self._loop.data)
        best = past.checkpoint.content["best"]
        self._best, self._best_name = best["value"], best["name"]
        assert self._writer is not None
        self._writer.best = best["name"]
        self._event(
            "resume",
            checkpoint=past.checkpoint.name,
            recorded=past.recorded,
            lost=max(0, past.recorded - standing.step),
            notes=list(past.notes),
            differences=self._differences,
            pid=os.getpid(),
        )

    def _end(self, error: BaseException | None) -> None:
        if self._writer is None:
            return
        if isinstance(error, GeneratorExit):
            self._event("left")
        elif error is not None and self._signal is None:
            self._event(
                "error",
                error=f"{type(error).__name__}: {error}",
                notes=list(getattr(error, "__notes__", ())),
                traceback="".join(traceback.format_exception(error))[-8000:],
            )
        self._writer.close(tidy=True)
        self._say_problems()

    # Hearing.

    def _hear_first(self, event: Event) -> None:
        self._steering.hear_first(event)
        match event:
            case ChunkEnd(phase="train"):
                self._turn, self._before = 0, None
                if self._watch:
                    self._before = self._loop.state.values()
            case PhaseEnd(phase="train"):
                self._turn, self._before = 0, self._loop.state.values()

    def _hear_last(self, event: Event) -> None:
        match event:
            case Resumed():
                assert self._past is not None
                if self._remembers:
                    memories = self._past.checkpoint.content["callbacks"]
                    extra = dict(self._past.checkpoint.extra)
                    memory.restore(self._callbacks, memories, extra)
                else:
                    memory.fill_history(self._callbacks, self._past.history)
                self._past = self._past.without_arrays()
                self._first_step = event.step - event.index
                self._before = self._loop.state.values()
            case EpochBegin(epoch=epoch):
                self._passes, self._first_step = 0, self._loop.step
                if self._writer is not None:
                    self._row_of_epoch(epoch)
            case PhaseBegin(phase="train"):
                self._passes += 1
                if self._passes == 2:
                    self._event("second-pass")
            case ChunkBegin(phase="train"):
                self._before_chunk()
            case ChunkEnd(phase="train"):
                self._after_chunk(event)
            case ChunkEnd() if self._passed is not None:
                self._leave_if_told(self._passed)
            case PhaseEnd(phase="train"):
                self._passed = self._loop.standing(state=self._before)
            case EpochEnd():
                self._after_epoch(event)
            case TrainEnd():
                self._after_training()
            case Compiled():
                self._event("compiled", **asdict(event))
            case GearChosen():
                self._event("gear", **asdict(event))
            case Incident():
                data = {**vars(event), "incident": event.kind, "at": event.step}
                self._event("incident", **{n: data[n] for n in INCIDENT})
            case Diagnosed():
                findings = [f.as_dict() for f in event.findings]
                self._event("doctor", **{**vars(event), "findings": findings})
        self._steering.hear_last(event, self)
        if isinstance(event, ChunkEnd) and self._can_save(event):
            self._leave_if_told(self._passed)
        self._say_problems()

    def _before_chunk(self) -> None:
        if self._over:
            return
        self._resume_writing()
        self._passed = None
        turned = self._turn_off() | self._gear_is_new()
        barrier = self._record_writes()
        if self._saved_step < 0 or barrier or turned:
            self._put(self._capture(pinned=barrier or turned))
        self._before = None

    def _gear_is_new(self) -> bool:
        """Whether somebody has changed the gear: no replay goes across that."""
        gear = self._loop.gear
        name = gear.name if gear is not None else None
        was, self._gear = self._gear, name
        if was in (None, name):
            return False
        self._event("gear", gear=name, was=was)
        return True

    def _turn_off(self) -> bool:
        """Where this run leaves the one it branched off: change what is to change."""
        branch, loop = self._branch, self._loop
        if branch is None or loop.step != branch["step"]:
            return False
        if self._before is None:
            self._before = loop.state.values()
        if branch["learning_rate"] is not None:
            loop.model.optimizer.learning_rate = branch["learning_rate"]
        if branch["gear"] is not None:
            loop.gear = branch["gear"]
        self._event("branch", **branch)
        return True

    def _after_chunk(self, event: ChunkEnd) -> None:
        if self._writer is None:
            return
        self._run_s += event.wall_s
        if not self._shaped:
            self._shaped, shapes = True, about.shapes(self._loop)
            self._writer.fact("shapes", lambda: shapes)
        values = {n: _number(v) for n, v in event.outputs.items() if _is_scalar(v)}
        self._writer.scalars(event.step, values)
        self._record_signals(event.signals)
        if not self._can_save(event):
            return
        elapsed_s = time.monotonic() - self._saved_s
        due = self._loop.step - self._saved_step >= self._how.replay_steps
        cost_s, run_s = self._writer.cost_s, self._run_s - self._saved_run_s
        late = elapsed_s >= max(self._how.every_s, cost_s / COST)
        late |= run_s >= self._how.replay_s and elapsed_s >= 60 * cost_s
        if self._asked or due or (late and not self._writer.saving):
            self._put(self._capture())
        self._leave_if_told(None)

    def _can_save(self, event: ChunkEnd) -> bool:
        """Whether there is a place to go on from, now that a chunk has ended."""
        if event.phase != "train":
            return self._passed is not None
        # Only the first pass of an epoch has a place to go on from; and callbacks
        # that were told of a beginning are to be told its end.
        within = self._listener is not None and self._listener.within_call
        return self._passes <= 1 and not within

    def _record_signals(self, signals: Signals | None) -> None:
        if signals is None or not len(signals.steps):
            return
        assert self._writer is not None
        values = np.stack(list(signals.values.values()), axis=1).astype("<f4")
        first, names = int(signals.steps[0]), json.dumps(list(signals.values))
        row = (first, self._loop.watch, names, len(values), values.tobytes())
        self._writer.row("signals", *row, time.time())

    def _after_epoch(self, event: EpochEnd) -> None:
        if self._is_over():
            return
        self._resume_writing()
        writer, loop = self._writer, self._loop
        assert writer is not None
        self._row_of_epoch(
            event.epoch,
            loop.step - self._first_step,
            json.dumps(encode_logs(event.logs, {}, ""), sort_keys=True),
            event.wall_s,
        )
        value = event.logs.get(self._how.monitor)
        best = isinstance(value, float) and self._how.better(value, self._best)
        if best:
            self._best = value
        elapsed_s = time.monotonic() - self._saved_s
        can_be = elapsed_s >= writer.cost_s / COST and not writer.saving
        if loop.is_last(event.epoch) or self._asked or can_be:
            self._put(self._capture(best=best), best=best)
        elif best:
            self._best_waits = self._capture(best=True)
        self._passed = None
        self._leave_if_told(None)

    def _is_over(self) -> bool:
        """Whether what ends now is no end of the run: it was before, or is not yet.

        An outer loop of the user's own that is left ends no epoch: nobody can tell a
        `break` from an exception. Gone on with, it is left again, or goes on.
        """
        return self._loop.left or self._over

    def _after_training(self) -> None:
        if self._is_over():
            return
        self._resume_writing()
        if self._writer is not None:
            self._put(self._capture(finished=True))
            self._event("finished")
            self._writer.wait()

    def _resume_writing(self) -> None:
        if self._writer is None and self._past is not None:
            self._go_on()
            if self._past.standing.cursor.epoch != self._loop.cursor.epoch:
                return
            if self._loop.cursor.begun:
                self._row_of_epoch(self._loop.cursor.epoch)

    # Saving.

    def _until_due(self, index: int) -> int:
        """The most steps of a chunk: none goes past a checkpoint that is due."""
        step, most = self._loop.step, self._how.replay_steps
        stops = [self._saved_step + most] if self._saved_step >= 0 else []
        stops += [self._branch["step"]] if self._branch is not None else []
        due = min((stop - step for stop in stops if stop > step), default=most)
        return self._steering.chunk_steps(due)

    def _record_writes(self) -> bool:
        """Record what was assigned since the last look; whether it was too much."""
        if self._before is None:
            return False
        now = self._loop.state.values()
        found = writes(self._before, now, self._loop.backend)
        self._before = now
        if found and self._writer is not None:
            for path, dtype, shape, data in found:
                row = (self._loop.step, self._turn, path, dtype, shape, data)
                self._writer.row("writes", *row)
            self._turn += 1
        return any(path == BARRIER for path, *_ in found)

    def _has_room(self) -> bool:
        """Wait where the disk is slower than checkpoints have to be made.

        At most two states are kept in memory to be written. A disk that hangs holds
        training up once for each checkpoint, and no longer than `PATIENCE_S`.
        """
        writer, progress, until = self._writer, None, 0.0
        assert writer is not None
        while writer.saving > 1:
            if writer.progress != progress:
                progress, until = writer.progress, time.monotonic() + PATIENCE_S
            elif time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def _put(self, captured: Draft, *, best: bool = False) -> None:
        waits, self._best_waits, self._asked = self._best_waits, None, False
        with self._steering.saving():
            if waits is not None and waits.name == captured.name:
                best = True
            elif waits is not None and not best:
                self._hand_over(waits, best=True)
            self._hand_over(captured, best=best)

    def _hand_over(self, captured: Draft, *, best: bool) -> None:
        """Let the writer write a checkpoint that is not there already."""
        writer, name = self._writer, captured.name
        assert writer is not None
        if best:
            self._best_name = name
        if name == self._saved_name and name not in writer.missing:
            # Written once more, it would not be there for as long as that takes.
            if best:
                writer.keep(name)
            return
        last = captured.content["finished"] or self._signal is not None
        if self._has_room() or last:
            writer.save(captured, best=best)
        else:
            writer.leave_out(captured)
        self._saved_name = name
        self._saved_step, self._saved_s = self._loop.step, time.monotonic()
        self._saved_run_s = self._run_s

    def _capture(
        self,
        standing: Standing | None = None,
        *,
        pinned: bool = False,
        finished: bool = False,
        best: bool = False,
    ) -> Draft:
        """Where training stands, as a checkpoint for another thread to write."""
        barrier = self._record_writes() if standing is None else False
        at = standing or self._loop.standing(state=self._before)
        if self._steering.stopped:
            # By whoever looked at it: unlike a callback's, no end for good.
            at = replace(at, stopped=False)
        extra: Arrays = {}
        source = self._loop.data
        name = checkpoint.name_of(at.step, self._turn, finished=finished)
        waits = self._best_waits
        content = {
            "turn": self._turn,
            "run_s": self._run_s,
            "finished": finished,
            **content_of(at, extra),
            "callbacks": memory.capture(self._callbacks, extra),
            "marks": dict(source.marks()) if source is not None else {},
            "best": {
                "value": self._best,
                "name": name if best else waits.name if waits else self._best_name,
            },
        }
        # Attributes of callbacks may be arrays that they go on changing.
        extra = {name: array.copy() for name, array in extra.items()}
        return Draft(
            name=name,
            step=at.step,
            state=dict(at.state),
            extra=extra,
            content=content,
            pinned=pinned or barrier,
            to_numpy=self._loop.backend.to_numpy,
        )

    # Being told.

    @property
    def told_to_leave(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    def save_now(self, event: ChunkEnd) -> None:
        """Save where training stands after a chunk, or as soon as that can be done."""
        if self._writer is not None and self._can_save(event):
            self._put(self._capture(self._passed))
        else:
            self._asked = True

    def note(self, kind: str, **data: Any) -> None:
        """Put an event into the journal."""
        self._event(kind, **data)

    def _ask(self) -> None:
        self._asked = True

    def _tell(self, number: int) -> None:
        self._signal = number

    def _leave_if_told(self, standing: Standing | None) -> None:
        """After a signal: save where training stands, and end it."""
        if self._signal is None or self._writer is None:
            return
        self._put(self._capture(standing))
        name = signal.Signals(self._signal).name
        self._event("signal", signal=name)
        self._writer.wait()
        step = standing.step if standing is not None else self._loop.step
        self._say_problems()
        self._leave(
            f"is saved before step {step}",
            f"could not be saved before step {step}: gone on with, it starts from the "
            "checkpoint before",
        )

    def _leave(self, saved: str, missing: str) -> None:
        """After a signal: end the training, and say which of two things is true."""
        if self._signal is None:
            return
        writer, name = self._writer, signal.Signals(self._signal).name
        lost = writer is not None and self._saved_name in writer.missing
        where = f"the run {str(self._folder.path)!r} {missing if lost else saved}"
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt(where)
        print(f"loopscope: {name}; {where}", file=sys.stderr)
        raise SystemExit(128 + self._signal)

    # Saying.

    def _event(self, kind: str, **data: Any) -> None:
        if self._writer is not None:
            self._writer.event(self._loop.step, kind, about.readable(data))

    def _row_of_epoch(
        self,
        epoch: int,
        steps: int | None = None,
        logs: str | None = None,
        wall_s: float | None = None,
    ) -> None:
        assert self._writer is not None
        row = (epoch, self._first_step, steps, logs, wall_s, time.time())
        self._writer.row("epochs", *row)

    def _say_inexact(self, source: Source) -> None:
        warnings.warn(
            "This run cannot be repeated: another process would get other batches, "
            f"since {source.inexact()}. It is recorded all the same; `resume` and "
            "`rewind` will say where they depart.",
            stacklevel=6,
        )

    def _say_problems(self) -> None:
        if self._writer is None:
            return
        while not self._writer.problems.empty():
            problem = self._writer.problems.get()
            self._event("problem", problem=problem)
            warnings.warn(f"{self._folder.path}: {problem}", stacklevel=6)

    @contextmanager
    def _warnings(self) -> Iterator[None]:
        """Record the warnings of a block; they are shown as before."""
        shown = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
            self._event("warning", category=category.__name__, message=str(message))
            shown(message, category, *rest, **named)

        warnings.showwarning = show
        try:
            yield
        finally:
            if warnings.showwarning is show:
                warnings.showwarning = shown


def _is_bar(callback: Any) -> bool:
    """Whether it only shows progress: it has no part in what a run ends in."""
    import keras

    return isinstance(callback, keras.callbacks.ProgbarLogger)


def _refuse_other_batches(past: Past, source: Source | None) -> None:
    """Refuse data whose batches are not those that were trained on."""
    if source is None:
        return
    was, now = past.checkpoint.content["marks"], source.marks()
    for place, mark in was.items():
        if place in now and now[place] != mark:
            number = place.partition("/")[2]
            raise RunError(
                f"Batch {number} of the data is not the one that was trained on: the "
                "source gives other batches than before"
                f"{_because(source)}. Nothing was changed. Make it give the same ones, "
                "or start a new run."
            )


def _because(source: Source) -> str:
    reason = source.inexact()
    return f" ({reason})" if reason else ""


def _is_scalar(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 1 and value.dtype.kind in "fiubV"


def _number(value: np.ndarray) -> np.ndarray:
    """Values as the journal has them: bfloat16 and its like as float32, exactly."""
    return value.astype(np.float32) if value.dtype.kind == "V" else value
