"""What the checks look at: measured once, when a check first asks for it.

Every measurement sets the state back to where it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from loopscope.data.feed import Feed, Segment, on_host
from loopscope.data.source import Source
from loopscope.doctor import stateless, surroundings
from loopscope.doctor.measuring import Pace, growth, next_batches, pace
from loopscope.gear import EAGER, Gear
from loopscope.look.opened import Change, OpenedStep
from loopscope.look.opening import executed, open_step, probe_of
from loopscope.look.probe import Call, Judged, Probe
from loopscope.look.seen import scalars
from loopscope.look.stats import as_float
from loopscope.runner import Runner

BATCHES = 8
"""How many batches are read, at most."""

HASHED_BYTES = 2**31
"""Data larger than this are not compared row by row."""

SETTLING = 10
"""Steps that are trained before a step is looked into for the second time."""

SLOW_MS = 50
"""An eager step that takes longer is not run many times."""

STEADY = 5
"""Batches of one shape in a row: then not each one has a shape of its own."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A step that was executed under a probe; `look` is `None` if it has raised.

    Attributes:
        look: The step, opened up.
        probe: With its notes.
        error: What it has raised.
        changed: What the step has changed in Python, by name; of own steps only.
        printed: What it has printed; of own steps only.
        computed: What Keras's stateless methods have returned.
    """

    look: OpenedStep | None
    probe: Probe
    error: Exception | None = None
    changed: Mapping[str, surroundings.Change] = field(default_factory=dict)
    printed: str = ""
    computed: Sequence[stateless.Computed] = ()


@dataclass(frozen=True, eq=False)
class Tested:
    """What one test step has done.

    Attributes:
        calls: Of layers.
        changes: Variables that are no metric's and were changed, by path.
    """

    calls: Sequence[Call]
    changes: Mapping[str, Change]


MOMENTS = ("the first step", "a step shortly after the first")


class Facts:
    """Measurements of a loop on its data.

    Args:
        runner: Has the train step, and the test step if there is one.
        source: Of the training data; some of its batches are sampled.
        gear: In which training runs; `None` while none is chosen.
        asked: Whether the user asked for this gear.
        validation: The source of the validation data, if there are any.
    """

    moments: tuple[str, ...] = MOMENTS
    """When the steps of `looks` were looked into, in words."""

    def __init__(
        self,
        runner: Runner,
        source: Source,
        *,
        gear: Gear | None,
        asked: bool = False,
        validation: Source | None = None,
    ) -> None:
        self.runner, self.source, self.validation = runner, source, validation
        self.gear, self.backend, self.model = gear, runner.backend, runner.model
        self.asked = asked and gear is not None
        self.own = runner.stages["train"].own
        """Whether the train step is the user's."""
        self._paces: dict[str, Pace] = {}

    @cached_property
    def segment(self) -> Segment:
        """Some steps of the training data."""
        return self.source.sample()

    @cached_property
    def first(self) -> Seen:
        """The first step, from the state as it stands."""
        return self._look(self.segment)

    @cached_property
    def settled(self) -> Seen:
        """A step after some others: what holds at the start only is over."""
        segment = self.segment
        steps = min(SETTLING, segment.steps - 1)
        if steps < 1 or self.first.error is not None:
            return self.first
        with self._kept():
            for at in range(segment.start, segment.start + steps):
                part = Segment(segment.feed, at, at + 1)
                self.runner.run("train", self.gear or EAGER, part)
            self.runner.finished = 0
            return self._look(
                Segment(segment.feed, segment.start + steps, segment.stop)
            )

    def _probe(self) -> Probe:
        return probe_of(self.runner)

    def _look(self, segment: Segment) -> Seen:
        probe = self._probe()
        try:
            with self._kept(), stateless.noted() as computed, self.watched() as watched:
                look = open_step(
                    self.runner, segment, step=0, gear=self.gear, probe=probe
                )
        except Exception as error:
            return Seen(None, probe, error)
        return Seen(
            look,
            probe,
            changed=watched.changed,
            printed=watched.printed,
            computed=computed,
        )

    @cached_property
    def divided(self) -> list[np.ndarray]:
        """The gradients that the first step applies where devices divide it."""
        if self.backend.distribution(self.model) is None:
            return []
        at = self.segment.start
        part = Segment(self.segment.feed, at, at + 1)
        with self._kept(), self.backend.applied() as gradients:
            self.runner.run("train", EAGER, part)
        self.runner.finished = 0
        return [self.backend.to_numpy(gradient) for gradient in gradients]

    def watched(self) -> AbstractContextManager[surroundings.Watched]:
        """See what an own step changes in Python, and prints, within a block."""
        own = self.runner.stages["train"].step if self.own else None
        return surroundings.watched(own)

    @cached_property
    def looks(self) -> list[OpenedStep]:
        """The first step and a later one, as far as they could be executed."""
        seen = {id(s): s for s in (self.first, self.settled)}
        return [s.look for s in seen.values() if s.look is not None]

    @cached_property
    def judged(self) -> list[Judged]:
        """Every call of a loss object in these steps."""
        seen = {id(s): s for s in (self.first, self.settled)}
        return [judged for s in seen.values() for judged in s.probe.judged]

    @cached_property
    def scales_loss(self) -> bool:
        """Whether a `LossScaleOptimizer` applies the gradients."""
        return scales_loss(self.model, self.first, self.settled)

    @cached_property
    def batches(self) -> list[tuple[Any, ...]]:
        """Some batches on the host, each a tuple (x, y, ...) of trees."""
        return list(batches(self.runner, self.segment, BATCHES))

    @cached_property
    def eager(self) -> bool:
        """Whether training runs eagerly: asked for, or since nothing else can be."""
        if self.gear is None:
            return not self.runner.stages["train"].traces
        return self.gear == EAGER

    @property
    def trained(self) -> Gear:
        """The gear of the training; while none is chosen, the first one tried."""
        return EAGER if self.eager else self.gear or self.backend.gears[0]

    @property
    def brisk(self) -> Gear:
        """A gear for many steps: one that is compiled, or eager if that will do."""
        slow = any(sum(look.phases.values()) > SLOW_MS for look in self.looks)
        return self.trained if slow or self.gear is not None else EAGER

    def pace(self, gear: Gear, *, anew: bool = False) -> Pace | None:
        """What a step takes in a gear, which may have to be compiled; or none runs."""
        if anew or gear.name not in self._paces:
            try:
                with self._kept():
                    self._paces[gear.name] = pace(self.runner, gear, self.segment)
            except Exception:
                return None
        return self._paces[gear.name]

    @cached_property
    def fetch_s(self) -> float | None:
        """Seconds that a batch takes to come; `None` where all are there."""
        self.segment.steps  # noqa: B018 - some have to have come
        return self.source.fetch_s()

    @cached_property
    def compiled(self) -> surroundings.Watched:
        """What two compiled steps change in Python, after one that was traced."""
        segment = self.segment
        last = min(segment.stop - 1, segment.start + 1)
        parts = [Segment(segment.feed, at, at + 1) for at in (segment.start, last)]
        with self._kept():
            self.runner.run("train", self.trained, parts[0])
            with self.watched() as watched:
                for part in parts:
                    self.runner.run("train", self.trained, part)
            self.runner.finished = 0
        return watched

    @cached_property
    def growth(self) -> float:
        """Bytes of arrays that each eager step leaves behind."""
        with self._kept():
            return growth(self.runner, self.segment)

    @cached_property
    def shapes(self) -> list[Segment]:
        """Next batches, where not all have one shape. Reads on; nothing comes after."""
        arrays = getattr(self.source, "arrays", None) is not None
        if arrays or self.segment.steps >= STEADY:
            return []
        self.fetch_s  # noqa: B018 - the source will have moved on
        return list(next_batches(self.source))

    @cached_property
    def tested(self) -> Tested | None:
        """What a test step does; `None` if there is none or it cannot be run."""
        source = self.validation
        if source is None or "test" not in self.runner.stages:
            return None
        segment = source.sample()
        probe = probe_of(self.runner)
        state = self.runner.state
        of_metrics = {id(v) for m in probe.metrics for v in m.variables}
        with self._kept():
            before = state.numpy()
            program = self.backend.program(
                self.runner.executable("test"),
                EAGER,
                segment.feed,
                None,
                state.variables,
                1,
            )
            try:
                with probe.around():
                    program(segment.feed, segment.start, segment.start + 1)
            except Exception:
                return None
            after = state.numpy()
            changes = {
                path: Change(before[path], after[path])
                for path, variable in state
                if id(variable) not in of_metrics
                and before[path].tobytes() != after[path].tobytes()
            }
        return Tested(probe.calls, changes)

    def loss_on(self, batch: tuple[Any, ...]) -> float | None:
        """The loss of the train step on another batch of the same shapes."""
        import keras

        arrays = keras.tree.map_structure(self.backend.place, batch)
        like = self.segment.feed
        feed = Feed("whole", arrays, None, like.batch_size, like.specs, ())
        with self._kept():
            outputs, _ = executed(
                self.runner, Segment(feed, 0, 1), self.gear, self._probe()
            )
        return scalars(outputs).get("loss")

    def after_a_step(self, before: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What variables hold after the first step, had they held this before."""
        import keras

        held = {path: v for path, v in self.runner.state if path in before}
        with self._kept():
            for path, variable in held.items():
                value = keras.ops.cast(before[path], variable.dtype)
                self.backend.assign(variable, value)
            executed(self.runner, self.segment, self.gear, probe_of(self.runner))
            read = self.backend.read
            return {p: as_float(self.host(read(v))) for p, v in held.items()}

    def labels(self) -> np.ndarray | None:
        """All labels of the training data, where these are arrays and it has some."""
        arrays: tuple[Any, ...] = getattr(self.source, "arrays", ())
        y = arrays[1] if len(arrays) > 1 else None
        return on_host(y) if getattr(y, "shape", None) else None

    def hashes(self, source: Source | None) -> list[bytes] | None:
        """A digest of each example's first input, where the data are arrays."""
        import keras

        arrays = getattr(source, "arrays", None)
        if not arrays:
            return None
        rows = on_host(keras.tree.flatten(arrays[0])[0])
        if rows.nbytes > HASHED_BYTES:
            return None
        rows = np.ascontiguousarray(rows)
        return [blake2b(row.tobytes(), digest_size=12).digest() for row in rows]

    def host(self, value: Any) -> np.ndarray:
        """A tensor as a NumPy array."""
        return self.backend.to_numpy(value)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Set the state back; what Keras warns of, the checks say themselves."""
        with self.runner.state.kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def scales_loss(model: Any, *seen: Seen) -> bool:
    """Whether the optimizer of a model, or of these steps, scales the loss."""
    import keras

    used = [a.optimizer for one in seen for a in one.probe.applied]
    return any(
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        for optimizer in (getattr(model, "optimizer", None), *used)
    )


def batches(runner: Runner, segment: Segment, count: int) -> Iterator[tuple[Any, ...]]:
    """The first batches of a segment on the host."""
    import keras

    given: list[tuple[Any, ...]] = []

    def step(*batch: Any) -> dict[str, Any]:
        given.append(batch)
        return {}

    stop = min(segment.stop, segment.start + count)
    program = runner.backend.program(step, EAGER, segment.feed, None, [], 1)
    program(segment.feed, segment.start, stop)
    for batch in given:
        yield keras.tree.map_structure(runner.backend.to_numpy, batch)
