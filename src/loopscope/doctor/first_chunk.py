"""The cheap checks, made by `fit` itself as training begins.

Once the pace of a training is known, after its first chunk or two, one of the steps
that have just run is executed once more and set back: eagerly, or compiled for it where
each eager operation would be compiled by itself. What that would cost is forecast from
the pace, and what would take longer than `BUDGET_S` is left out.
"""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from loopscope import checks
from loopscope.backend.base import cut
from loopscope.data.feed import Segment, on_host
from loopscope.data.source import Source
from loopscope.doctor.checks import ALL, Cheap
from loopscope.doctor.examine import examine
from loopscope.doctor.facts import BATCHES, Facts, Seen
from loopscope.doctor.finding import Finding
from loopscope.errors import DoctorWarning
from loopscope.events import (
    ChunkBegin,
    ChunkEnd,
    Compiled,
    Diagnosed,
    Event,
    Resumed,
)
from loopscope.gear import EAGER, Gear
from loopscope.look.opening import executed, probe_of
from loopscope.look.probe import Probe
from loopscope.runner import Runner

BUDGET_S = 0.6
"""What all of it may take: 1 % of a training of a minute."""

CALL_S, VARIABLE_S, SLOWER, COPIED_BYTES_S = 0.05, 2e-3, 4.0, 2.5e8
"""What one look costs: a call, each variable, so many compiled steps, and copies."""

WHOLE, FORWARD = 1.0, 0.35
"""Where a look has to be compiled: of what compiling the step took, all or the forward
pass alone."""

WHY_NOT = {
    "eager": "in gear eager the step's own Python code would run once too often",
    "replicas": "the step runs on several replicas",
    "long": "it would take about {seconds:.1f} s",
    "raised": "{error}",
}
"""Why no step is looked into; a view may have other words for it."""


def wanted() -> bool:
    """Whether this process makes the checks: `LOOPSCOPE_DOCTOR=0` turns them off."""
    return os.environ.get("LOOPSCOPE_DOCTOR") != "0"


class FirstChunk:
    """Listens to a training, and makes the cheap checks once.

    Nothing is made of a training that goes on in the middle, nor again of a step that
    was looked at before.

    Args:
        runner: Has the train step.
        source: Of the training data; nothing is taken from it.
        ahead: Gives the steps that are about to run.
        gear: Gives the gear that training runs in.
        tell: Takes the event that says what was found.
    """

    def __init__(
        self,
        runner: Runner,
        source: Source,
        *,
        ahead: Callable[[], Segment | None],
        gear: Callable[[], Gear | None],
        tell: Callable[[Event], None],
    ) -> None:
        self._runner, self._source, self._tell = runner, source, tell
        self._ahead, self._gear = ahead, gear
        self._segment: Segment | None = None
        """Of the chunk that runs."""
        self._compiled = 0
        """Steps of this chunk whose time is that of compiling."""
        self._resumed = False

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case Resumed():
                self._resumed = True
            case ChunkBegin(phase="train") if self._is_due():
                self._segment, self._compiled = self._ahead(), 0
            case Compiled(phase="train"):
                self._compiled += 1
            case ChunkEnd(phase="train", steps=steps, wall_s=wall_s):
                segment, self._segment = self._segment, None
                if segment is not None and steps > self._compiled:
                    self._examine(segment, wall_s / (steps - self._compiled))

    def _is_due(self) -> bool:
        return not self._resumed and not self._runner.stages["train"].examined

    def _examine(self, segment: Segment, step_s: float) -> None:
        began = time.perf_counter()
        self._runner.stages["train"].examined = True
        found: list[Finding] = []
        made: tuple[str, ...] = ()
        try:
            glance = Glance(
                self._runner,
                self._source,
                segment,
                gear=self._gear(),
                until=began + BUDGET_S,
                step_s=step_s,
            )
            with _set_aside():
                found, made = glance.findings()
            because = glance.because
        except Exception as error:
            # Whatever goes wrong with looking, training goes on.
            because = _raised(error)
        wall_s = time.perf_counter() - began
        event = Diagnosed(tuple(found), made, _why_not(because), wall_s, because)
        self._tell(event)
        for finding in found:
            if finding.severity == "error" and finding.where not in self._said():
                # As far up as the call of `fit`.
                warnings.warn(_in_words(finding), DoctorWarning, stacklevel=7)

    def _said(self) -> set[str]:
        """What was warned of before training began."""
        if self._runner.stages["train"].own:
            return set()
        names = checks.activated_losses(self._runner.model)
        return {f"loss {name!r}" for name in names}


class Glance(Facts):
    """What one step of a chunk has shown, within a limit of time.

    Args:
        runner: Has the train step.
        source: Of the training data; nothing is taken from it.
        segment: Steps that have just run.
        gear: In which they ran.
        until: When to end, in the seconds of `time.perf_counter`.
        step_s: What a step takes in that gear.
    """

    moments = ("a step of the first chunk",)

    def __init__(
        self,
        runner: Runner,
        source: Source,
        segment: Segment,
        *,
        gear: Gear | None,
        until: float,
        step_s: float,
    ) -> None:
        super().__init__(runner, source, gear=gear)
        self.segment, self._until = segment, until
        self._took_s = 0.0
        self._compiled = self._forward_only = False
        self.because = self._because(step_s)
        """Why no step was looked into, one of `WHY_NOT`; empty if one was."""

    def _because(self, step_s: float) -> dict[str, Any]:
        if self.gear is None or (self.gear == EAGER and self.own):
            return {"why": "eager"}
        if self.backend.distribution(self.model) is not None:
            return {"why": "replicas"}
        forecast_s = look_s(step_s, self.runner)
        if not self.backend.runs_eagerly_at_once:
            compile_s = self.runner.stages["train"].compile_s
            self._compiled = True
            self._forward_only = forecast_s + WHOLE * compile_s > self._time_left_s()
            forecast_s += (FORWARD if self._forward_only else WHOLE) * compile_s
        if forecast_s > self._time_left_s():
            return {"why": "long", "seconds": forecast_s}
        return {}

    @cached_property
    def first(self) -> Seen:
        """The segment's first step, from the state that its last one has left."""
        if self.because:
            return Seen(None, Probe(self.backend, [], list))
        began = time.perf_counter()
        seen = (self._forward if self._forward_only else self._look)(self.segment)
        self._took_s = time.perf_counter() - began
        if seen.error is not None:
            self.because = _raised(seen.error)
        return seen

    def _forward(self, segment: Segment) -> Seen:
        """What layers and losses have computed; nothing of gradients and updates."""
        probe = self._probe()
        try:
            with self._kept():
                executed(self.runner, segment, self.gear, probe)
        except Exception as error:
            return Seen(None, probe, error)
        return Seen(None, probe)

    @cached_property
    def settled(self) -> Seen:
        """The same: some steps were trained before."""
        return self.first

    @property
    def tested(self) -> None:
        """Nothing: a test step is not run."""
        return

    @cached_property
    def batches(self) -> list[tuple[Any, ...]]:
        """Some batches of the chunk on the host; no operation is run for them."""
        import keras

        feed, shape = self.segment.feed, keras.tree.map_structure
        given = getattr(self.source, "arrays", None) if feed.kind == "take" else None
        # Those that are kept on the device as a whole were given on the host.
        arrays = (
            shape(self._on_host, feed.arrays)
            if given is None
            else shape(on_host, given)
        )
        order = None if feed.order is None else self.host(feed.order)
        stop = min(self.segment.stop, self.segment.start + BATCHES)
        return [
            cut(
                feed,
                arrays,
                order,
                index,
                rows=lambda array, rows: array[rows],
                window=lambda array, start, size: array[start : start + size],
                map_structure=shape,
            )
            for index in range(self.segment.start, stop)
        ]

    def _on_host(self, leaf: Any) -> Any:
        # What only the framework understands stays as it is: no check reads it.
        return self.host(leaf) if self.backend.is_tensor(leaf) else leaf

    def _probe(self) -> Probe:
        probe = probe_of(self.runner)
        probe.until = self._until
        probe.compiled, probe.forward_only = self._compiled, self._forward_only
        return probe

    def findings(self) -> tuple[list[Finding], tuple[str, ...]]:
        """What the cheap checks find, and the names of those that were made."""
        names = [name for name, check in ALL.items() if isinstance(check, Cheap)]
        found, made = self._made(names)
        first, last = self.segment.start, self.segment.stop - 1
        if found and first < last and self._time_left_s() > 2 * self._took_s:
            again = Glance(
                self.runner,
                self.source,
                Segment(self.segment.feed, last, last + 1),
                gear=self.gear,
                until=self._until,
                step_s=0.0,
            )
            again.batches = self.batches  # Bad data are found once.
            confirmed, _ = again._made(sorted({f.check for f in found}))
            # Which of several variables is the worst may change from step to step.
            seen = {f.check for f in confirmed}
            if not again.because:
                found = [f for f in found if f.check in seen]
        return sorted(found, key=lambda f: f.severity != "error"), made

    def _made(self, names: Sequence[str]) -> tuple[list[Finding], tuple[str, ...]]:
        """Findings of these checks, and the names of those there was time for."""
        found: list[Finding] = []
        made = []
        for name in names:
            if self._time_left_s() > 0:
                found += examine(self, [name]).findings
                made.append(name)
        return found, tuple(made)

    def _time_left_s(self) -> float:
        return self._until - time.perf_counter()


def look_s(step_s: float, runner: Runner) -> float:
    """What looking into a step will cost, in seconds; rather too much than too little.

    Args:
        step_s: Of a compiled step.
        runner: Has its variables, all of which are copied before and after.
    """
    variables = runner.state.variables
    size = sum(
        int(np.prod(v.shape)) * np.dtype(_numpy(str(v.dtype))).itemsize
        for v in variables
    )
    return (
        CALL_S + SLOWER * step_s + VARIABLE_S * len(variables) + size / COPIED_BYTES_S
    )


def _numpy(dtype: str) -> str:
    """A dtype of at least this size that NumPy knows."""
    return dtype if dtype in np.sctypeDict else "float32"


@contextmanager
def _set_aside() -> Iterator[None]:
    """Python's and NumPy's random numbers are afterwards what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _raised(error: Exception) -> dict[str, Any]:
    return {"why": "raised", "error": f"{type(error).__name__}: {error}"}


def _why_not(because: Mapping[str, Any]) -> str:
    return WHY_NOT[because["why"]].format(**because) if because else ""


def _in_words(finding: Finding) -> str:
    return (
        f"{finding.message} ({finding.where}). {finding.change} "
        f"[{finding.check}: see {finding.link}; `fit(doctor=False)` does not look]"
    )
