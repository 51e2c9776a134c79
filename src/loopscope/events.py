"""What a loop tells those who listen: frozen records, in the order they happen.

Listeners (callbacks, progress, later the run on disk) get them through
`loop.subscribe`. Nothing flows back but a decision to stop (`loop.stop()`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from loopscope.doctor.finding import Finding

Phase = Literal["train", "test", "predict"]
PHASES: tuple[Phase, ...] = ("train", "test", "predict")


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class TrainBegin(Event):
    """Training starts. `epochs` may be `None` where the user decides."""

    epochs: int | None


@dataclass(frozen=True)
class Resumed(Event):
    """Training goes on from where another one stood; variables are set.

    Attributes:
        step: Global number of the next step.
        epoch: Of the next step.
        index: Position in the epoch of the next step.
    """

    step: int
    epoch: int
    index: int


@dataclass(frozen=True)
class EpochBegin(Event):
    """An epoch starts; metrics have just been reset."""

    epoch: int
    epochs: int | None


@dataclass(frozen=True)
class PhaseBegin(Event):
    """A pass over data starts. `steps` is `None` where unknown."""

    phase: Phase
    steps: int | None


@dataclass(frozen=True)
class ChunkBegin(Event):
    """Steps are about to run; `index` counts within the pass.

    Attributes:
        phase: Which step.
        index: Position in the pass of the first of them.
        fetch_s: Seconds that the source took to give their data.
    """

    phase: Phase
    index: int
    fetch_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, eq=False)
class Signals:
    """What a watched training has measured in some of its steps.

    Attributes:
        steps: Their global numbers, of shape `(m,)`.
        values: By name, `"gradient_norm/PATH"` and so on, float32 of shape `(m,)`.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class ChunkEnd(Event):
    """Steps have run; variables are current.

    Attributes:
        phase: Which step ran.
        index: Position in the pass of the first step.
        steps: How many steps.
        step: Global number of the first step (`train`), else -1.
        samples: Examples seen in this pass so far.
        outputs: Each step's return value by name (`"loss"` for a scalar), arrays
            of shape `(steps,)`.
        wall_s: Seconds, data excluded.
        logs: Reads the pass's metrics so far; waits for the device.
        signals: Of those steps whose turn it was, in a watched training.
    """

    phase: Phase
    index: int
    steps: int
    step: int
    samples: int
    outputs: Mapping[str, np.ndarray]
    wall_s: float
    logs: Callable[[], Mapping[str, Any]]
    signals: Signals | None = None


@dataclass(frozen=True, eq=False)
class Incident(Event):
    """A watched training has come upon something out of the ordinary.

    Attributes:
        kind: `"nonfinite"`: the first value that is infinite or none at all.
            `"spike"`: a loss or gradient far above those of the steps before.
        step: The global number of the step it was.
        what: `"loss"`, `"gradient_norm"`, or the signal of a layer,
            `"gradient_norm/PATH"`.
        value: Its value.
        usual: The largest of the steps before; `None` for `"nonfinite"`.
        examples: The examples that carry the loss, or that are not finite: their rows
            in the arrays given to `fit`, or else their positions in the batch.
        first: Where numbers stopped being finite; empty where they did not.
        text: All of it in a sentence.
        opened: The step, opened up: a `loopscope.look.opened.OpenedStep`; `None` where
            that failed.
        begins: `first` as plain data; `None` where it is empty.
        of_data: Whether `examples` are rows of the data.
        problem: Why it could not be looked into; empty if it could.
    """

    kind: Literal["nonfinite", "spike"]
    step: int
    what: str
    value: float
    usual: float | None
    examples: tuple[int, ...]
    first: str
    text: str
    opened: Any = field(default=None, repr=False)
    begins: Mapping[str, Any] | None = None
    of_data: bool = False
    problem: str = ""


@dataclass(frozen=True)
class PhaseEnd(Event):
    """A pass over data has ended; `logs` are its metrics."""

    phase: Phase
    steps: int
    logs: Mapping[str, Any]


@dataclass(frozen=True)
class EpochEnd(Event):
    """An epoch has ended; `logs` hold train and `val_` metrics."""

    epoch: int
    logs: Mapping[str, Any]
    wall_s: float


@dataclass(frozen=True)
class TrainEnd(Event):
    """Training has ended, for whatever reason."""

    logs: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled(Event):
    """A program was made: a trace and, under XLA, a compilation.

    Attributes:
        phase: Of which step.
        gear: The gear's name.
        wall_s: Seconds until the program had run once.
        changed: Why one more was needed: each argument whose shape or dtype
            differs from the first program's, as "path: was -> is". Empty for the
            first program of a phase and gear.
    """

    phase: Phase
    gear: str
    wall_s: float
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class GearChosen(Event):
    """`auto` has decided; `reason` is one line, `because` the same as plain data."""

    gear: str
    reason: str
    wall_s: float
    measured: Mapping[str, float] = field(default_factory=dict)
    because: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosed(Event):
    """The doctor has made its cheap checks, once, as training began.

    Attributes:
        findings: What it has found, errors first.
        checks: The names of the checks that it has made.
        why_not: Why it has looked at data only, and into no step; else empty.
        wall_s: Seconds that training has waited for it.
        because: `why_not` as plain data; empty as well if it is.
    """

    findings: tuple[Finding, ...]
    checks: tuple[str, ...]
    why_not: str
    wall_s: float
    because: Mapping[str, Any] = field(default_factory=dict)
