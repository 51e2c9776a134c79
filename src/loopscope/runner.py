"""Executing segments of steps: traces, programs, and the state they work on.

Keeps *how* steps are executed apart from *when* (the loop's part). Whatever
happens, the variables stand where a whole number of steps has left them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopscope import interrupt
from loopscope.backend.base import Alone, Backend, Program, Step, Trace
from loopscope.data.feed import NativeSpec, Segment, Spec
from loopscope.discover import Found, discover, global_seed
from loopscope.errors import StepError, TraceError
from loopscope.events import Compiled, Phase
from loopscope.gear import EAGER, Gear
from loopscope.state import State
from loopscope.step import LOGS, ModelStep
from loopscope.together import Together
from loopscope.watching import SIGNALS, Readings, Watcher

CAPACITY = 1024
"""The most steps of one call: the length of the buffers for their outputs."""

PREDICT_BYTES = 4 * 2**20
"""The most bytes of outputs of one call of the predict step."""


@dataclass
class Stage:
    """One of the loop's steps with everything made for executing it."""

    step: Step
    own: bool
    """Whether the user wrote the step: it is looked through for what it works on."""
    found: Found
    traces: dict[str, Trace] = field(default_factory=dict)
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)
    watchers: dict[str, Watcher] = field(default_factory=dict)
    checked: list[Any] = field(default_factory=list)
    first_specs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    examined: bool = False
    """Whether the doctor has made its cheap checks."""
    compile_s: float = 0.0
    """Seconds until the program that was made last had run once."""


@dataclass(frozen=True)
class Done:
    """What one call of `Runner.run` has brought."""

    outputs: dict[str, np.ndarray]
    wall_s: float
    compiled: tuple[Compiled, ...]
    logs: Any = None
    """What Keras calls the logs of the last step, where the step gives them."""
    signals: Readings | None = None
    """What a watched step has measured."""


class Runner:
    """Executes steps of the three phases over segments.

    Args:
        model: The Keras model (or layer).
        backend: Where steps run.
        together: The processes that run them; one alone if not given.
    """

    def __init__(
        self, model: Any, backend: Backend, together: Together | None = None
    ) -> None:
        self.model = model
        self.backend = backend
        self.together = together or Together(Alone())
        self.stages: dict[Phase, Stage] = {}
        """Each phase's step with everything made for executing it."""
        self._state: State | None = None
        self.finished = 0
        """Steps that the current or last call of `run` has finished."""
        self.watched = False
        """Whether train steps give their signals; change it before any is staged."""

    def stage(self, phase: Phase, step: Step, *, own: bool) -> Stage:
        """The stage of a phase; a new one if the step is not the one before."""
        stage = self.stages.get(phase)
        if stage is None or stage.step != step:
            found = _found(step) if own else Found()
            stage = self.stages[phase] = Stage(step, own, found)
            self._state = None
        return stage

    def forget(self) -> None:
        """Drop every trace and program: what they were made from has changed."""
        self.stages.clear()
        self._state = None

    def executable(self, phase: Phase) -> Step:
        """The phase's step as the backend gets it."""
        step = _python(self.stages[phase].step)
        if phase != "predict":
            return _named_outputs(step, phase)
        # Labels may come with the data; only the model's own step sees them.
        return step if isinstance(step, ModelStep) else _first_part(step)

    @property
    def state(self) -> State:
        """Every variable that the steps known so far read or write."""
        if self._state is None:
            self._state = State(self._variables(), self.backend)
        return self._state

    def renewed(self) -> State:
        """The state, looked for anew: a step may have made variables just now."""
        self._state = None
        return self.state

    def _variables(self) -> list[Any]:
        optimizer = getattr(self.model, "optimizer", None)
        variables = list(self.model.variables)
        variables += list(optimizer.variables) if optimizer is not None else []
        variables += list(self.model.metrics_variables)
        for stage in self.stages.values():
            variables += stage.found.all_variables()
            for trace in stage.traces.values():
                variables += trace.variables
            if stage.own and not stage.traces:
                variables += global_seed()
        return [*variables, *self.backend.random_state()]

    def trace(self, phase: Phase, specs: tuple[Any, ...]) -> Trace:
        """The trace of a phase's step on a batch of these specs.

        Raises:
            StepError: The step does not return what a step returns.
        """
        stage = self.stages[phase]
        key = repr(specs)
        if key not in stage.traces:
            due = (Spec((), "bool"),) if self._watches(phase) else ()
            step = self._step(phase, specs)
            trace = self.backend.trace(step, (*due, *specs), self._variables)
            if phase != "predict":
                _check_outputs(trace.outputs, stage.step, phase)
            stage.traces[key] = trace
            self._state = None
        return stage.traces[key]

    def _watches(self, phase: Phase) -> bool:
        return self.watched and phase == "train"

    def _step(self, phase: Phase, specs: tuple[Any, ...]) -> Step:
        """The phase's step as it is traced and run, watched if it is to be."""
        step = self.backend.spread(self.executable(phase), self.model)
        if not self._watches(phase):
            return step
        watchers, key = self.stages[phase].watchers, repr(specs)
        watcher = watchers.setdefault(key, Watcher(self.backend))
        return watcher.watched(step)

    def run(
        self,
        phase: Phase,
        gear: Gear,
        segment: Segment,
        due: np.ndarray | None = None,
    ) -> Done:
        """Run a segment; the outputs come back by name.

        `due` says of each step whether its signals are, where the phase is watched; if
        not given, those of none. Raises whatever a step raised, with the variables as
        the last finished step left them and a note that says which step it was.
        """
        key = (gear.name, segment.feed.signature)
        stage = self.stages[phase]
        start, outputs, compiled = segment.start, [], []
        self.finished = 0
        if not self._watches(phase):
            due = None
        elif due is None:
            due = np.zeros(segment.steps, bool)
        if key not in stage.programs:
            began = time.perf_counter()
            stage.programs[key] = self._program(phase, gear, segment)
            if due is not None:
                # Which signals there are, gear eager knows once it has measured some.
                due = np.concatenate([[True], due[1:]])
            outputs.append(self._first(phase, gear, segment, due))
            start += 1
            stage.compile_s = time.perf_counter() - began
            compiled.append(
                Compiled(
                    phase,
                    gear.name,
                    stage.compile_s,
                    _changes(stage.first_specs, gear.name, segment.feed.specs),
                )
            )
        began = time.perf_counter()
        unit = 1 if gear == EAGER else segment.steps
        while start < segment.stop:
            stop = min(segment.stop, start + unit)
            outputs.append(self._advance(phase, gear, segment, start, stop, due))
            start = stop
        wall_s = time.perf_counter() - began
        joined, signals = _join(outputs), None
        if due is not None:
            watcher = stage.watchers[repr(segment.feed.specs)]
            signals = Readings(watcher.names, joined.pop(SIGNALS), due)
        joined, logs = _without_logs(joined)
        return Done(joined, wall_s, tuple(compiled), logs, signals)

    def keep(self, phase: Phase, gear: Gear) -> None:
        """Drop a phase's programs in every other gear."""
        stage = self.stages[phase]
        stage.programs = {k: p for k, p in stage.programs.items() if k[0] == gear.name}

    def capacity(self, phase: Phase, specs: tuple[Any, ...]) -> int:
        """The most steps of one call."""
        if phase != "predict":
            return CAPACITY
        import keras

        outputs = keras.tree.flatten(self.trace(phase, specs).outputs)
        size = sum(
            int(np.prod([axis or 1 for axis in o.shape])) * np.dtype(o.dtype).itemsize
            for o in outputs
        )
        return int(max(1, min(CAPACITY, PREDICT_BYTES // max(1, size))))

    def _program(self, phase: Phase, gear: Gear, segment: Segment) -> Program:
        stage, specs = self.stages[phase], segment.feed.specs
        trace = None
        # An own step in the eager gear may do what cannot be traced.
        if gear != EAGER or not stage.own:
            try:
                trace = self.trace(phase, specs)
            except TraceError:
                if gear != EAGER:
                    raise
        return self.backend.program(
            self._step(phase, specs),
            gear,
            segment.feed,
            None if gear == EAGER else trace,
            trace.variables if trace else self.state.variables,
            self.capacity(phase, specs) if gear != EAGER else CAPACITY,
            watched=self._watches(phase),
        )

    def _first(
        self, phase: Phase, gear: Gear, segment: Segment, due: np.ndarray | None
    ) -> Any:
        """Run a program's first step; undo it if it returns what no step returns."""
        before = self.state.snapshot()
        state, stage = self.state, self.stages[phase]
        stop = segment.start + 1
        outputs = self._advance(phase, gear, segment, segment.start, stop, due)
        self.renewed()  # An untraced step may have built its optimizer just now.
        if phase != "predict" and not stage.traces:
            try:
                _check_outputs(_row_specs(outputs), stage.step, phase)
            except StepError:
                state.restore(before)
                self.finished = 0
                del stage.programs[gear.name, segment.feed.signature]
                raise
        return outputs

    def _advance(
        self,
        phase: Phase,
        gear: Gear,
        segment: Segment,
        start: int,
        stop: int,
        due: np.ndarray | None,
    ) -> Any:
        program = self.stages[phase].programs[gear.name, segment.feed.signature]
        if due is not None:
            due = due[start - segment.start : stop - segment.start]
        state = self.state
        before = state.snapshot()
        try:
            with interrupt.deferred(), self.together.guarded():
                outputs = program(segment.feed, start, stop, due)
                self.finished += stop - start
                return outputs
        except Exception:
            state.restore(before)
            if stop - start > 1:
                self._repeat_until_failure(program, segment, start, stop, due)
            raise

    def _repeat_until_failure(
        self,
        program: Program,
        segment: Segment,
        start: int,
        stop: int,
        due: np.ndarray | None,
    ) -> None:
        """Run a failed chunk again, step by step, up to the step that fails.

        Steps are deterministic and chunks can be cut anywhere, so this leaves
        the state of the last finished step.
        """
        for index in range(start, stop):
            before = self.state.snapshot()
            try:
                at = None if due is None else due[index - start :][:1]
                program(segment.feed, index, index + 1, at)
            except Exception:
                self.state.restore(before)
                return
            self.finished += 1


def _found(step: Step) -> Found:
    """What an own step works on: what it names, or what its model has."""
    if not isinstance(step, ModelStep):
        return discover(step)
    import keras

    owned = list(vars(step.model).values())
    return Found(
        optimizers=[v for v in owned if isinstance(v, keras.optimizers.Optimizer)],
        metrics=[v for v in owned if isinstance(v, keras.metrics.Metric)],
    )


def _first_part(step: Step) -> Step:
    def first(x: Any, *_: Any) -> Any:
        return step(x)

    first.__module__ = getattr(step, "__module__", "")
    return first


def _without_logs(outputs: Any) -> tuple[Any, Any]:
    """The outputs by name, and the logs of the last step.

    A model's own step has no outputs but its logs: their scalars are taken for it.
    """
    if not isinstance(outputs, dict) or LOGS not in outputs:
        return outputs, None
    import keras

    stacked = outputs[LOGS]
    named = {name: value for name, value in outputs.items() if name != LOGS}
    if not named and isinstance(stacked, dict):
        named = {n: v for n, v in stacked.items() if getattr(v, "ndim", None) == 1}
    return named, keras.tree.map_structure(lambda v: v[-1], stacked)


def _python(step: Step) -> Step:
    """The function inside a `tf.function`: the gear decides how it is compiled."""
    return getattr(step, "python_function", step)


def _named_outputs(step: Step, phase: Phase) -> Step:
    """The same step, returning a dict: a scalar is called `loss`.

    A test step may return nothing: what it finds is in its metrics.
    """

    def named(*batch: Any) -> Any:
        result = step(*batch)
        if result is None and phase == "test":
            return {}
        return result if isinstance(result, dict) else {"loss": result}

    named.__module__ = getattr(step, "__module__", "")
    return named


def _row_specs(outputs: Any) -> dict[str, Any]:
    """The specs of one step's outputs, from those of some steps."""

    def row(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        numbers = value.dtype.kind in "fiubV"
        return Spec(value.shape[1:], value.dtype.name) if numbers else value[0]

    return {name: row(value) for name, value in outputs.items()}


def _check_outputs(outputs: Any, step: Step, phase: Phase) -> None:
    name = getattr(step, "__qualname__", repr(step))
    wrong = {
        key: str(value)
        for key, value in outputs.items()
        if key not in (LOGS, SIGNALS)
        and (not isinstance(value, Spec) or value.shape or value.dtype == "string")
    }
    if wrong or (not outputs.keys() - {SIGNALS} and phase == "train"):
        raise StepError(
            f"Step {name!r} must return a scalar (the loss) or a dict of scalars. "
            f"Received: {wrong}. Reduce it, for example with `keras.ops.mean`."
        )


def _join(outputs: Sequence[Any]) -> dict[str, np.ndarray]:
    import keras

    if len(outputs) == 1:
        joined: dict[str, np.ndarray] = outputs[0]
        return joined
    return keras.tree.map_structure(  # type: ignore[no-any-return]
        lambda *parts: np.concatenate(parts), *outputs
    )


def _changes(
    first: dict[str, tuple[Any, ...]], gear: str, specs: tuple[Any, ...]
) -> tuple[str, ...]:
    """Each argument whose spec is not the first program's, as "path: was -> is"."""
    if gear not in first:
        first[gear] = specs
        return ()
    was, now = by_argument(first[gear]), by_argument(specs)
    changed = [
        f"{path}: {was.get(path, 'absent')} -> {now.get(path, 'absent')}"
        for path in dict.fromkeys([*was, *now])
        if was.get(path) != now.get(path)
    ]
    return tuple(changed) or ("number of examples or capacity of a chunk",)


def by_argument(specs: tuple[Any, ...]) -> dict[str, Spec | NativeSpec]:
    """Each array of a batch: `"x"`, `"x['name']"`, `"sample_weight"` and so on."""
    import keras

    names = ("x", "y", "sample_weight")
    return {
        "".join([name, *(f"[{key!r}]" for key in path)]): spec
        for name, part in zip(names, specs, strict=False)
        for path, spec in keras.tree.flatten_with_path(part)
    }


__all__ = ["CAPACITY", "Done", "Runner", "by_argument"]
