"""What is out of the ordinary in a watched training: found, and looked into.

A chunk is judged by the loss of each of its steps and by the signals that were due, of
its last step among them. Steps are deterministic, so a chunk that is suspicious is run
once more from where it began, now with the signals of every step: that gives the exact
step at no cost for all others. Then this step is opened up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loopscope.data.feed import Segment
from loopscope.events import Incident
from loopscope.gear import Gear
from loopscope.look.opened import OpenedStep
from loopscope.look.opening import open_step
from loopscope.look.why import NAMED, carriers
from loopscope.runner import Done, Runner
from loopscope.step import loss_of
from loopscope.watching import Readings

WINDOW = 1000
"""A value is compared with the largest of so many steps before it: an example that is
hard comes once an epoch, and is no spike."""

FEWEST = 20
"""With no fewer values than so many."""

TIMES = 4.0
"""It is a spike if it is more than so many times as large."""

MOST = 10
"""The most spikes of a training that are looked into."""


@dataclass(frozen=True)
class Chunk:
    """Steps that have run.

    Attributes:
        segment: Their data.
        gear: In which they ran.
        before: `state.snapshot()` before them.
        step: The global number of the first one.
        examples: Gives the rows of a step's examples in the arrays given, by its
            position in the segment; `None` where there are no such numbers.
    """

    segment: Segment
    gear: Gear
    before: Sequence[Any]
    step: int
    examples: Callable[[int], np.ndarray | None]


@dataclass(frozen=True)
class _Notice:
    """A value that is out of the ordinary.

    Attributes:
        at: The step's position in its chunk.
        what: `"loss"`, `"gradient_norm"` or the name of a signal.
        value: It.
        usual: The largest of those before; `None` where it is not finite.
    """

    at: int
    what: str
    value: float
    usual: float | None

    @property
    def kind(self) -> Literal["nonfinite", "spike"]:
        return "nonfinite" if self.usual is None else "spike"


class Incidents:
    """Judges one training, chunk by chunk.

    Args:
        runner: Has the train step.
        every: How often its signals are measured.
    """

    def __init__(self, runner: Runner, every: int) -> None:
        self._runner = runner
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._gradients: deque[float] = deque(maxlen=max(FEWEST, WINDOW // every))
        self._over = False
        """Whether something was not finite: what comes then says nothing new."""
        self._spikes = 0

    def after(self, chunk: Chunk, done: Done) -> Incident | None:
        """What a chunk has brought; the state stays as it is."""
        if self._over or done.signals is None:
            return None
        found = self._judged(done.outputs, done.signals)
        incident = None
        if found is not None and (found.kind == "nonfinite" or self._spikes < MOST):
            incident = self._looked_into(chunk, found)
            self._over = incident.kind == "nonfinite"
            self._spikes += 1
        losses = _losses(done.outputs)
        self._losses.extend(losses[np.isfinite(losses)].tolist())
        norms = done.signals.gradient_norms()
        self._gradients.extend(norms[np.isfinite(norms)].tolist())
        return incident

    def _judged(
        self, outputs: Mapping[str, np.ndarray], signals: Readings
    ) -> _Notice | None:
        """The first step at which something is out of the ordinary, and what."""
        losses, at = _losses(outputs), np.flatnonzero(signals.due)
        found = [
            *_not_finite("loss", losses, np.arange(len(losses))),
            *_spikes("loss", losses, np.arange(len(losses)), self._losses),
            *_spikes("gradient_norm", signals.gradient_norms(), at, self._gradients),
        ]
        finite = {"weight_norm", "update_norm"}
        if not self._scales():  # That tries how far gradients can go.
            finite.add("gradient_norm")
        for name, values in zip(signals.names, signals.values.T, strict=True):
            if name.partition("/")[0] in finite:
                found += _not_finite(name, values[at], at)
        # A variable is not finite after its gradient: at one step, the cause first.
        order = {"gradient_norm": 0, "loss": 1}
        return min(
            found,
            key=lambda n: (
                n.kind != "nonfinite",
                n.at,
                order.get(n.what.partition("/")[0], 2),
            ),
            default=None,
        )

    def _scales(self) -> bool:
        import keras

        optimizers = [getattr(self._runner.model, "optimizer", None)]
        optimizers += self._runner.stages["train"].found.optimizers
        return any(
            isinstance(o, keras.optimizers.LossScaleOptimizer) for o in optimizers
        )

    def _looked_into(self, chunk: Chunk, found: _Notice) -> Incident:
        """Find the step that it was, and open that up."""
        opened, problem = None, ""
        try:
            with self._runner.state.kept():
                found = self._exactly(chunk) or found
                opened = self._opened(chunk, found.at)
        except Exception as error:  # Nothing that is only told ends a training.
            problem = f"{type(error).__name__}: {error}"
        self._runner.finished = 0
        return _incident(chunk.step + found.at, found, opened, problem)

    def _exactly(self, chunk: Chunk) -> _Notice | None:
        """Judge a chunk by the signals of all of its steps: it is run once more."""
        self._runner.state.restore(list(chunk.before))
        every = np.ones(chunk.segment.steps, bool)
        done = self._runner.run("train", chunk.gear, chunk.segment, every)
        assert done.signals is not None
        return self._judged(done.outputs, done.signals)

    def _opened(self, chunk: Chunk, position: int) -> OpenedStep:
        """Run a chunk once more up to one of its steps, and open that up."""
        feed, first = chunk.segment.feed, chunk.segment.start
        self._runner.state.restore(list(chunk.before))
        at = first + position
        if position:
            self._runner.run("train", chunk.gear, Segment(feed, first, at))
        return open_step(
            self._runner,
            Segment(feed, at, at + 1),
            step=chunk.step + position,
            gear=chunk.gear,
            examples=chunk.examples(position),
        )


def _losses(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    losses = loss_of(outputs)
    return np.zeros(0) if losses is None else np.asarray(losses, np.float64)


def _not_finite(name: str, values: np.ndarray, at: np.ndarray) -> list[_Notice]:
    wrong = np.flatnonzero(~np.isfinite(values))
    return [_Notice(int(at[i]), name, float(values[i]), None) for i in wrong[:1]]


def _spikes(
    name: str, values: np.ndarray, at: np.ndarray, before: Collection[float]
) -> list[_Notice]:
    known = np.abs(np.concatenate([np.array(before, np.float64), values]))
    known = np.where(np.isfinite(known), known, 0.0)
    usual = np.concatenate([[0.0], _largest(known)[:-1]])
    is_spike = (known > TIMES * usual) & (usual > 0)
    is_spike[: max(FEWEST, len(before))] = False
    return [
        _Notice(int(at[i]), name, float(values[i]), float(usual[i + len(before)]))
        for i in np.flatnonzero(is_spike)[:1] - len(before)
    ]


def _largest(values: np.ndarray) -> np.ndarray:
    """At each place, the largest of the last `WINDOW` values, its own included."""
    largest, span = values, 1
    while span < min(WINDOW, len(values)):
        shift = min(span, WINDOW - span)
        later = np.maximum(largest[shift:], largest[:-shift])
        largest, span = np.concatenate([largest[:shift], later]), span + shift
    return largest


def _incident(
    step: int, found: _Notice, opened: OpenedStep | None, problem: str
) -> Incident:
    positions: list[int] = []
    first, begins, rows = "", None, None
    if opened is not None:
        rows = opened.examples
        if opened.first_nonfinite is not None:
            first = str(opened.first_nonfinite)
            begins = opened.first_nonfinite.as_dict()
            positions = list(opened.first_nonfinite.examples)
        positions = positions or [c.position for c in carriers(opened)]
    examples = [i if rows is None else int(rows[i]) for i in positions]
    said = [f"Step {step}: {_words(found)}"]
    if first:
        said.append(f"first not finite: {first}")
    if examples:
        whose = "of the batch" if rows is None else "of the data"
        said.append(f"examples {examples[:NAMED]} {whose}")
    if problem:
        said.append(f"it could not be looked into ({problem})")
    return Incident(
        found.kind,
        step,
        found.what,
        found.value,
        found.usual,
        tuple(examples),
        first,
        "; ".join(said),
        opened,
        begins,
        rows is not None,
        problem,
    )


def _words(found: _Notice) -> str:
    kind, _, layer = found.what.partition("/")
    things = {
        "loss": "the loss",
        "gradient_norm": "the norm of the gradient",
        "weight_norm": "the norm of the weights",
        "update_norm": "the norm of the update",
    }
    thing = things[kind] + (f" of {layer!r}" if layer else "")
    if found.usual is None:
        return f"{thing} is {found.value}"
    times = abs(found.value) / found.usual
    return (
        f"{thing} is {found.value:.4g}, {times:.3g} times the largest of the steps "
        "before"
    )


__all__ = ["Chunk", "Incidents"]
