"""Running steps of a recorded run again, bit for bit, and saying where they depart.

From a checkpoint the loop itself trains on, in the gear that was used, without
callbacks and validation: what those have assigned to variables between steps is in the
journal.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from loopscope.compare import Moment
from loopscope.errors import RunError, UsageError
from loopscope.events import ChunkBegin, ChunkEnd, Event
from loopscope.experiment import Experiment
from loopscope.figures import html
from loopscope.gear import resolve
from loopscope.look.alternatives import Alternative
from loopscope.look.html import fragment
from loopscope.look.opened import OpenedStep
from loopscope.look.shown import KEPT_SIDE, SIDE, in_notebook, shown
from loopscope.look.why import Why, usual_gradient_norm, why
from loopscope.run import changes, checkpoint, reading
from loopscope.run.checkpoint import Checkpoint, Entry
from loopscope.run.content import standing_of
from loopscope.run.folder import Folder
from loopscope.run.identity import CAUSES, Difference
from loopscope.run.journal import EpochRow, JournalReader
from loopscope.run.writes import BARRIER, value_of
from loopscope.standing import Cursor
from loopscope.state import sha256
from loopscope.step import loss_of

UNKNOWN = (
    "an operation that does not give the same bits twice, or state outside of Keras's "
    "variables (Python's or NumPy's random numbers, attributes that a step changes)"
)


EARLIER = (1, 2, 4, 8, 16)
"""How far before a step those are that say what is usual in it."""

BEFORE = 50
"""Steps whose recorded losses say what a usual loss is."""

Recorded = dict[str, tuple[int, np.ndarray]]
"""By name of an output: the number of the first step, and its values from there on."""


@dataclass(frozen=True)
class Departure:
    """Where a replay first gives other bits than the run had.

    Attributes:
        step: Global number of the step.
        name: Of the output, `"loss"` for a scalar.
        recorded: What the run had.
        replayed: What came out now.
        relative: |recorded - replayed| / |recorded|.
        causes: What may be the reason, the likeliest first.
        kinds: What each of them is about: an entry of `loopscope.run.identity.CAUSES`,
            `"source"`, or `"unknown"`.
        details: What exactly, for each of them; may be empty.
    """

    step: int
    name: str
    recorded: float
    replayed: float
    relative: float
    causes: Sequence[str] = ()
    kinds: Sequence[str] = ()
    details: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """As plain data, and in words."""
        return {**asdict(self), "text": str(self)}

    def __str__(self) -> str:
        """One line a cause."""
        line = (
            f"departs at step {self.step}: {self.name} was {self.recorded!r}, is "
            f"{self.replayed!r} (relative difference {self.relative:.1e})"
        )
        return "".join([line, *(f"\n  likely cause: {c}" for c in self.causes)])


@dataclass(frozen=True, eq=False)
class Rewound:
    """A past step of a run, run again.

    Attributes:
        step: Its global number.
        epoch: Its epoch.
        batch_index: Its position in the epoch.
        gear: In which it was run, then and now.
        checkpoint_step: The step before which the checkpoint was made.
        replayed_steps: How many steps were run, this one included.
        identical: Whether every output of every one of them has the recorded bits.
        first_difference: Where they depart, if they do.
        outputs_recorded: The step's outputs by name, as the journal has them.
        outputs: The step's outputs by name, of now.
        learning_rate: Of the optimizer at this step; `None` without an optimizer.
        state_before: Every variable by path, as the step read it.
        state_after: Every variable by path, as the step left it.
        state_sha256_before: As `Loop.state.sha256`.
        state_sha256_after: As `Loop.state.sha256`.
        seconds: Wall time of all this; start-up and first compilation included.
        look: The step opened up, executed once more in gear eager; `None` where that
            was not asked for, or could not be done.
    """

    step: int
    epoch: int
    batch_index: int
    gear: str
    checkpoint_step: int
    replayed_steps: int
    identical: bool
    first_difference: Departure | None
    outputs_recorded: Mapping[str, float]
    outputs: Mapping[str, float]
    learning_rate: float | None
    state_before: Mapping[str, np.ndarray] = field(repr=False)
    state_after: Mapping[str, np.ndarray] = field(repr=False)
    state_sha256_before: str
    state_sha256_after: str
    seconds: float
    look: OpenedStep | None = field(default=None, repr=False)

    @property
    def loss_recorded(self) -> float | None:
        """The recorded loss (the first output, where none is called so)."""
        return loss_of(self.outputs_recorded)

    @property
    def loss_replayed(self) -> float | None:
        """The loss of now."""
        return loss_of(self.outputs)

    def plot(self) -> Any:
        """The step, opened up, as a plotly figure.

        Raises:
            UsageError: It was not opened up.
            ExtraError: plotly is not installed.
        """
        if self.look is None:
            raise UsageError(
                f"Step {self.step} was run again, but not opened up. "
                "Expected `run.rewind(step)` with look=True, its default."
            )
        return self.look.plot()

    def _repr_html_(self) -> str:
        said = html.rewound(self.as_dict())
        if self.look is None:
            return said
        again = shown_again(self, side=KEPT_SIDE)
        return in_notebook(again, said + fragment(self.look))

    def as_dict(self) -> dict[str, Any]:
        """Everything but the states, as plain data."""
        apart = self.first_difference
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch_index": self.batch_index,
            "gear": self.gear,
            "checkpoint_step": self.checkpoint_step,
            "replayed_steps": self.replayed_steps,
            "identical": self.identical,
            "first_difference": None if apart is None else asdict(apart),
            "loss_recorded": self.loss_recorded,
            "loss_replayed": self.loss_replayed,
            "learning_rate": self.learning_rate,
            "state_sha256_before": self.state_sha256_before,
            "state_sha256_after": self.state_sha256_after,
            "seconds": self.seconds,
            **(self.look.as_dict() if self.look is not None else {}),
        }


def shown_again(rewound: Rewound, *, side: int = SIDE) -> dict[str, Any]:
    """A step that was run again and opened up, as the page shows it.

    Args:
        rewound: The step.
        side: The most pixels of a side of a picture.
    """
    assert rewound.look is not None
    apart = rewound.first_difference
    return {
        **shown(rewound.look, side=side),
        "epoch": rewound.epoch,
        "batch_index": rewound.batch_index,
        "gear": rewound.gear,
        "learning_rate": rewound.learning_rate,
        "recorded_loss": rewound.loss_recorded,
        "same_bits": rewound.identical,
        "difference": None if apart is None else apart.as_dict(),
    }


@dataclass(frozen=True)
class Segment:
    """What a verification has found between two checkpoints.

    Attributes:
        first: The first step.
        stop: The step it ended before.
        identical: Whether every output has the recorded bits.
        state_identical: Whether the state in the end has; `None` if it was not come to.
        largest_relative_difference: Of all outputs.
        first_difference: Where they depart, if they do.
    """

    first: int
    stop: int
    identical: bool
    state_identical: bool | None
    largest_relative_difference: float
    first_difference: Departure | None

    @property
    def verified(self) -> bool:
        """Whether it is what was recorded, bit for bit."""
        return self.identical and self.state_identical is not False


class Replayer:
    """Runs the steps of one run again. The run is only read.

    Making one prepares the experiment: compiling comes with the first replay.

    Args:
        folder: The run.
        experiment: The loop and data that were recorded.

    Raises:
        RunError: The experiment has other variables than the run.
    """

    def __init__(self, folder: Folder, experiment: Experiment) -> None:
        self._folder, self._loop = folder, experiment.loop
        self._held = ExitStack()
        loop, manifest = experiment.loop, folder.manifest
        self._lent, self._watch = loop.standing(), loop.watch
        watched = manifest["identity"].get("watch", False)
        if watched != (loop.watch is not None):
            # The same program as then; its signals are in the journal already.
            loop.watch = sys.maxsize if watched else None
        self._found = _entries(folder)
        loop.seed = self._found[0].content["seed"]
        loop.gear = self._found[0].content["gear"]
        self._source, validation = experiment.sources(self._held)
        if validation is not None:
            loop.prepare("test", validation)
        loop.prepare("train", self._source)
        loop.settle("train", self._source.specs)
        self._initial = loop.standing()
        self._lent = replace(self._lent, state=self._initial.state)
        self._used = False
        with reading.journal(folder) as journal:
            data = journal.fact("data")
        self.differences: list[Difference] = changes.since(
            manifest, loop, self._source, data=data, gear=self._found[0].content["gear"]
        )
        """What is not as it was when the run was recorded."""

    def close(self) -> None:
        """Let go of the data; the loop is as it was lent."""
        self._held.close()
        self._loop.stand(self._lent)
        self._loop.seed = self._lent.seed
        self._loop.watch = self._watch

    @property
    def reusable(self) -> bool:
        """Whether the data can be had from any position once more."""
        return not self._used or self._source.jumps or self._source.repeats

    def rewind(self, step: int, *, look: bool = True) -> Rewound:
        """Run step `step` again, from the nearest checkpoint at or before it.

        Args:
            step: Its global number.
            look: Whether to open it up as well.

        Raises:
            UsageError: The run has no such step.
            RunError: There is no checkpoint from which it can be reached.
        """
        began = time.perf_counter()
        with self._reading() as run:
            run.check(step)
            row = run.epoch_of(step)
            start = self._checkpoint_before(run, step)
            seen = _Seen(self._loop, step, _order(start), look=look)
            again = self._replay(run, start, step + 1, seen, {step})
            recorded = {
                name: values[-1].item()
                for name, (at, values) in again.recorded.items()
                if at + len(values) == step + 1
            }
            opened = seen.look
            if opened is not None:
                opened = replace(opened, loss_recorded=loss_of(recorded))
            return Rewound(
                look=opened,
                step=step,
                epoch=row.epoch,
                batch_index=step - row.first_step,
                gear=str(start.content["gear"]),
                checkpoint_step=start.step,
                replayed_steps=step + 1 - start.step,
                identical=again.apart is None,
                first_difference=again.apart,
                outputs_recorded=recorded,
                outputs={n: values[-1].item() for n, values in again.outputs.items()},
                learning_rate=seen.learning_rate,
                state_before=seen.before,
                state_after=seen.after,
                state_sha256_before=sha256(seen.before.items()),
                state_sha256_after=sha256(seen.after.items()),
                seconds=time.perf_counter() - began,
            )

    def why(self, step: int) -> Why:
        """The short story of a step: see `loopscope.look.why`.

        Replays some steps before it and the one after it as well.

        Raises:
            UsageError: The run has no such step.
            RunError: There is no checkpoint from which it can be reached, or it cannot
                be executed eagerly.
        """
        with self._reading() as run:
            run.check(step)
            earlier = {step - n for n in EARLIER if step - n >= run.first}
            first = min([step, *earlier])
            start = self._checkpoint_before(run, first)
            stop = min(step + 2, run.last, run.end_of(run.epoch_of(step)))
            story = _Story(self._loop, step, earlier)
            stops = {s for n in earlier for s in (n, n + 1)} | {step, step + 1}
            again = self._replay(run, start, stop, story, stops)
            if again.apart is not None:
                warnings.warn(str(again.apart), stacklevel=3)
            recorded = run.journal.scalars(
                None, max(run.first, step - BEFORE), step + 1
            )
        name = "loss" if "loss" in recorded else next(iter(recorded), "")
        losses = recorded[name][1] if name else np.empty(0)
        opened, history = story.opened()
        loss = float(losses[-1]) if len(losses) else None
        return why(
            replace(opened, loss_recorded=loss),
            history,
            losses=np.asarray(losses[:-1], np.float64),
            loss=loss,
            earlier=story.alternatives.get(step, ()),
            later=story.alternatives.get(step + 1, ()),
        )

    def in_gears(self, step: int, gear: str) -> tuple[Moment, Moment]:
        """What a step does in the gear of the run, and in another one."""
        with self._reading() as run:
            run.check(step)
            start = self._checkpoint_before(run, step)
            moments: list[Moment] = []
            backend = self._loop.backend
            asked = resolve(
                gear,
                backend.gears,
                backend=backend.name,
                lacking=backend.lacking,
            )
            if asked is None:
                raise UsageError("Expected the name of a gear. Received: 'auto'")

            def both(event: Event) -> None:
                loop = self._loop
                segment, was = loop.ahead(), loop.gear
                if not isinstance(event, ChunkBegin) or loop.step != step:
                    return
                if segment is not None and was is not None:
                    for gear_ in (was, asked):
                        moments.append(loop.moment(gear_, segment))

            self._replay(run, start, step + 1, both, {step})
        return moments[0], moments[1]

    def verify(self, *, whole: bool) -> Iterator[Segment]:
        """Replay from checkpoint to checkpoint: three stretches, or all of them."""
        with self._reading() as run:
            stretches = run.stretches(self._found)
        if not whole and len(stretches) > 3:
            stretches = [stretches[0], stretches[len(stretches) // 2], stretches[-1]]
        for start, end, stop in stretches:
            with self._reading() as run:
                yield self._verify(run, start, end, stop)

    def _verify(self, run: _Run, start: Entry, end: Entry | None, stop: int) -> Segment:
        from_checkpoint = self._read(start)
        again = self._replay(run, from_checkpoint, stop, None)
        state = again.state
        largest = max(
            (
                _largest(again.recorded[name][1], values)
                for name, values in again.outputs.items()
                if name in again.recorded
            ),
            default=0.0,
        )
        same = None
        if end is not None:
            for at, turn, path, value in run.writes:
                if at == stop and turn < end.turn and value is not None:
                    state[path] = value
            names = _order(self._read(end))
            same = sha256(zip(names, state.values(), strict=False)) == end.state_sha256
        apart = again.apart
        return Segment(start.step, stop, apart is None, same, largest, apart)

    # Replaying.

    def _replay(
        self,
        run: _Run,
        start: Checkpoint,
        stop: int,
        seen: Callable[[Event], None] | None,
        at: Collection[int] = (),
    ) -> _Again:
        """Run steps `start.step` to `stop`, not included; chunks end before `at`."""
        loop = self._loop
        if not self.reusable:
            raise RunError(
                "These data can be read once only, and have been. Open the run again, "
                "with a new experiment."
            )
        self._used = True
        loop.state.set(self._initial.state)
        standing = standing_of(start)
        loop.gear = str(standing.gear)
        listener = _Writes(loop, run.writes, start, _order(start))
        written = {step for step, *_ in run.writes if step > start.step}
        stops = sorted(written | set(at))

        def limit(_: int) -> int:
            return min((s - loop.step for s in stops if s > loop.step), default=2**31)

        parts: dict[str, list[np.ndarray]] = {}
        limits: Any = {"train": limit}
        loop.subscribe(listener, first=True, chunk_steps=limits)
        if seen is not None:
            loop.subscribe(seen)
        try:
            for chunk in self._chunks(run, replace(standing, stopped=False), stop):
                for name, values in chunk.outputs.items():
                    parts.setdefault(name, []).append(np.asarray(values))
            names = _order(start)
            now = [loop.backend.to_numpy(v).copy() for v in loop.state.snapshot()]
            state = dict(zip(names, now, strict=True))
        finally:
            loop.unsubscribe(listener, chunk_steps=limits)
            if seen is not None:
                loop.unsubscribe(seen)
            loop.stand(self._initial)
        outputs = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        recorded = run.journal.scalars(None, start.step, stop)
        apart = self._departure(start.step, recorded, outputs)
        return _Again(apart, recorded, outputs, state)

    def _chunks(self, run: _Run, standing: Any, stop: int) -> Iterator[ChunkEnd]:
        loop = self._loop
        row = run.epoch_of(standing.step)
        # A checkpoint at the end of an epoch stands at the beginning of the next one.
        cursor = Cursor(row.epoch, standing.step - row.first_step, begun=True)
        passes = [
            (r.epoch, r.steps) for r in run.epochs if r.first_step < row.first_step
        ]
        loop.begin_at(replace(standing, cursor=cursor, passes=passes))
        while loop.step < stop:
            row = run.epoch_of(loop.step)
            yield from loop.run_pass(
                "train",
                self._source,
                None,
                epoch=row.epoch,
                limit=min(stop, run.end_of(row)) - row.first_step,
            )
            if loop.step < min(stop, run.end_of(row)):
                raise RunError(
                    f"The data end before step {loop.step}, which the run has: the "
                    "source gives fewer batches than before."
                )

    def _departure(
        self, first: int, recorded: Recorded, outputs: Mapping[str, np.ndarray]
    ) -> Departure | None:
        """The first output that is not the recorded one."""
        found: list[Departure] = []
        for name, (at, was) in recorded.items():
            now = outputs.get(name)
            if now is None or at != first:
                continue
            now = now.astype(was.dtype)[: len(was)]
            other = np.flatnonzero(~_same(was[: len(now)], now))
            if len(other):
                a, b = was[other[0]].item(), now[other[0]].item()
                relative = abs(a - b) / abs(a) if a else float("inf")
                step = first + int(other[0])
                found.append(Departure(step, name, a, b, relative, *self._causes()))
        return min(found, key=lambda d: d.step, default=None)

    def _causes(self) -> tuple[tuple[str, ...], ...]:
        """Likely causes in words, what each is about, and what exactly."""
        inexact = self._source.inexact()
        causes = [(f"the data: {inexact}", "source", inexact)] if inexact else []
        meaning = dict(CAUSES)
        for difference in self.differences:
            root = difference.path.partition("/")[0]
            words = f"{meaning.get(root, root)} ({difference})"
            causes.append((words, root, str(difference)))
        return tuple(zip(*(causes or [(UNKNOWN, "unknown", "")]), strict=True))

    def _checkpoint_before(self, run: _Run, step: int) -> Checkpoint:
        """The nearest checkpoint at or before a step that is whole."""
        problems = []
        for entry in reversed(self._found):
            if entry.step > step:
                continue
            try:
                read = self._read(entry)
            except RunError as error:
                problems.append(str(error))
                continue
            blocked = [
                at
                for at, turn, path, _ in run.writes
                if path == BARRIER
                and (at, turn) >= (entry.step, entry.turn)
                and at <= step
            ]
            if blocked:
                problems.append(
                    f"before step {blocked[0]} more was assigned to variables than is "
                    "recorded, and no checkpoint from there on is left"
                )
            elif any(entry.step <= at for at in run.second_passes(step)):
                problems.append(
                    "an epoch on the way trained on a second source, which cannot be "
                    "replayed"
                )
            else:
                return read
        raise RunError(
            f"Step {step} cannot be reached from any checkpoint: "
            + "; ".join(problems or ["there is none before it"]),
            code="unreachable",
            step=step,
        )

    def _read(self, entry: Entry) -> Checkpoint:
        return checkpoint.read(self._folder.checkpoints_path, entry.name)

    @contextmanager
    def _reading(self) -> Iterator[_Run]:
        with reading.journal(self._folder) as journal:
            yield _Run(self._folder, journal)


@dataclass(frozen=True, eq=False)
class _Again:
    """What running steps again has brought.

    Attributes:
        apart: Where they depart from the journal, if they do.
        recorded: What the journal has of them, as `JournalReader.scalars`.
        outputs: What they returned, by name.
        state: Every variable in the end, by the names that the run had.
    """

    apart: Departure | None
    recorded: Recorded
    outputs: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


class _Writes:
    """Assigns between steps what was assigned in the run."""

    def __init__(
        self,
        loop: Any,
        writes: Sequence[tuple[int, int, str, Any]],
        start: Checkpoint,
        names: Sequence[str],
    ) -> None:
        self._loop = loop
        self._place = {name: i for i, name in enumerate(names)}
        seen = (start.step, start.content["turn"])
        self._at: dict[int, list[tuple[str, Any]]] = {}
        for at, turn, path, value in writes:
            if (at, turn) >= seen and path != BARRIER:
                self._at.setdefault(at, []).append((path, value))

    def __call__(self, event: Event) -> None:
        if not isinstance(event, ChunkBegin) or event.phase != "train":
            return
        variables = self._loop.state.variables
        backend = self._loop.backend
        for path, value in self._at.get(self._loop.step, ()):
            backend.assign(variables[self._place[path]], value)


class _Seen:
    """Keeps the state before and after one step."""

    def __init__(
        self, loop: Any, step: int, names: Sequence[str], *, look: bool
    ) -> None:
        self._loop, self._step, self._names = loop, step, names
        self._looks = look
        self.look: OpenedStep | None = None
        self.before: dict[str, np.ndarray] = {}
        self.after: dict[str, np.ndarray] = {}
        self.learning_rate: float | None = None

    def __call__(self, event: Event) -> None:
        loop = self._loop
        if isinstance(event, ChunkBegin) and loop.step == self._step:
            self.before = self._state()
            optimizer = getattr(loop.model, "optimizer", None)
            if optimizer is not None:
                rate = loop.backend.to_numpy(optimizer.learning_rate)
                self.learning_rate = float(rate)
            if self._looks:
                self.look = self._open()
        elif isinstance(event, ChunkEnd) and loop.step == self._step + 1:
            self.after = self._state()

    def _open(self) -> OpenedStep | None:
        try:
            opened: OpenedStep = self._loop.look()
        except Exception as error:
            # A step that needs its compiler can be replayed all the same.
            warnings.warn(
                f"Step {self._step} cannot be opened up, since it cannot be executed "
                f"in gear eager: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return None
        return opened

    def _state(self) -> dict[str, np.ndarray]:
        to_numpy = self._loop.backend.to_numpy
        values = [np.array(to_numpy(v)) for v in self._loop.state.snapshot()]
        return dict(zip(self._names, values, strict=True))


class _Story:
    """Looks into steps, and tries some of them otherwise."""

    def __init__(self, loop: Any, step: int, earlier: Collection[int]) -> None:
        self._loop, self._step, self._earlier = loop, step, earlier
        self._looks: dict[int, OpenedStep] = {}
        self._kept: dict[int, tuple[Any, Any]] = {}
        self.alternatives: dict[int, list[Alternative]] = {}
        """By the step whose loss they have changed."""

    def __call__(self, event: Event) -> None:
        loop, step = self._loop, self._step
        if not isinstance(event, ChunkBegin) or event.phase != "train":
            return
        at = loop.step
        if at == step or at in self._earlier:
            self._looks[at] = loop.look()
        if at in (step - 1, step, step + 1):
            if at - 1 in self._kept:
                before, segment = self._kept.pop(at - 1)
                self.alternatives[at] = loop.otherwise(
                    before,
                    (segment, loop.ahead()),
                    clipnorm=usual_gradient_norm(
                        look for n, look in self._looks.items() if n in self._earlier
                    ),
                )
            self._kept[at] = (loop.state.snapshot(), loop.ahead())

    def opened(self) -> tuple[OpenedStep, dict[int, OpenedStep]]:
        """The step, and the earlier ones."""
        looks = dict(self._looks)
        return looks.pop(self._step), looks


class _Run:
    """What of a journal a replay needs."""

    def __init__(self, folder: Folder, journal: JournalReader) -> None:
        self.journal = journal
        self.first: int = folder.manifest["first_step"]
        self.last = journal.recorded()
        self.epochs = journal.epochs()
        self.writes = [
            (at, turn, path, None if data is None else value_of(dtype, shape, data))
            for at, turn, path, dtype, shape, data in journal.rows("writes")
        ]
        self._second = [e["step"] for e in journal.events("second-pass")]

    def check(self, step: int) -> None:
        """Refuse a step that the run does not have."""
        if not isinstance(step, int) or not self.first <= step < self.last:
            raise UsageError(
                f"The run has the steps {self.first} to {self.last - 1}. "
                f"Received: step={step!r}",
                code="no_step",
                step=step,
                first=self.first,
                last=self.last - 1,
            )

    def epoch_of(self, step: int) -> EpochRow:
        """The epoch that a step belongs to."""
        for row in reversed(self.epochs):
            if row.first_step <= step:
                return row
        raise RunError(f"The journal does not say to which epoch step {step} belongs")

    def end_of(self, row: EpochRow) -> int:
        """The step after the last one of an epoch, as far as it is recorded."""
        return self.last if row.steps is None else row.first_step + row.steps

    def second_passes(self, step: int) -> list[int]:
        """Where, up to a step, an epoch went on with a second source."""
        return [at for at in self._second if at <= step]

    def stretches(
        self, found: Sequence[Entry]
    ) -> list[tuple[Entry, Entry | None, int]]:
        """From each checkpoint to the next, or to the end of what is recorded."""
        ends: list[Entry | None] = [*found[1:], None]
        return [
            (a, b, b.step if b is not None else self.last)
            for a, b in zip(found, ends, strict=True)
            if (b.step if b is not None else self.last) > a.step
        ]


def _entries(folder: Folder) -> list[Entry]:
    found, problems = checkpoint.entries(folder.checkpoints_path)
    found = [e for e in found if not e.content["finished"]]
    if not found:
        raise RunError(
            f"The run {str(folder.path)!r} has no checkpoint to replay from"
            + "".join(f"; {problem}" for problem in problems),
            code="no_checkpoint",
        )
    return found


def _order(start: Checkpoint) -> list[str]:
    return list(start.state)


def _same(was: np.ndarray, now: np.ndarray) -> np.ndarray:
    bits = f"u{was.dtype.itemsize}"
    same: np.ndarray = was.view(bits) == np.ascontiguousarray(now).view(bits)
    if was.dtype.kind == "f":
        same = same | (np.isnan(was) & np.isnan(now))
    return same


def _largest(was: np.ndarray, now: np.ndarray) -> float:
    a, b = was.astype(np.float64), now[: len(was)].astype(np.float64)
    with np.errstate(all="ignore"):
        apart = np.abs(a[: len(b)] - b) / np.abs(a[: len(b)])
    apart = apart[~_same(was[: len(b)], now[: len(was)].astype(was.dtype))]
    return float(np.nanmax(apart, initial=0.0))
