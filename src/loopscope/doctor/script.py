"""The doctor on a hand-written loop that knows nothing of loopscope.

The script runs as it is, but for three things: compiled functions run eagerly, Keras's
objects take notes, and after some steps it is ended. Each step is then looked at as a
step of a `Loop` would be.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from loopscope import backend as backends
from loopscope.data.adapters import Shuffled
from loopscope.discover import Found
from loopscope.doctor.checks import ALL
from loopscope.doctor.examine import Examination, examine
from loopscope.doctor.facts import MOMENTS, Seen, scales_loss
from loopscope.doctor.finding import Finding
from loopscope.doctor.measuring import PAYS, eager_and_compiled
from loopscope.doctor.resets import Source
from loopscope.errors import ExperimentError
from loopscope.hooks import Hook
from loopscope.look.opened import OpenedStep
from loopscope.look.probe import Call, Judged, Probe
from loopscope.look.seen import Seen as SeenStep

STEPS = 30
"""So many steps of a script are watched, if nothing else is asked for."""

BY_LOSS = ("labels", "from_logits", "saturation", "broadcast", "regularization")
BY_MODEL = ("inputs", "training_flag", "dead_units", "order")
"""Which line of the script a finding is about; any other is about the optimizer."""


OF_LOOPS = (
    "accumulating",
    "compiling",
    "dropped_state",
    "memory",
    "overfit",
    "overlap",
    "replicas",
    "resuming",
    "retracing",
    "side_effects",
    "test_step",
    "uncompiled",
    "waiting",
)
"""Checks that need a step that can be run again, or the data as a whole."""


class Enough(BaseException):
    """Ends a script: no `except Exception` of its own may catch it."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a script: from a call of the model to the next after an update."""

    probe: Probe
    look: OpenedStep | None
    batch: tuple[Any, ...]
    lines: Mapping[str, int]


class Watching(Probe):
    """Takes notes of a whole script, step by step.

    Args:
        script: Its path: lines are those of this file.
        steps: After how many it is ended.
    """

    def __init__(self, script: Path, steps: int) -> None:
        super().__init__(backends.current(), [], list)
        self._script, self._most = str(script), steps
        self._source = Source(script)
        self._made: dict[int, int] = {}
        self.growing: dict[str, tuple[int, int]] = {}
        """Metrics that go on from epoch to epoch unless they are reset: by name, the
        line that updates them, and the loops in which it does so."""
        self.steps: list[Step] = []
        self.shuffles: list[Shuffled] = []
        self.functions: dict[tuple[str, int | None], int] = {}
        """How often a compiled function was made, by name and line."""
        self.replicas: dict[int | None, tuple[int, int]] = {}
        """Replicas and the examples of one, by the line that differentiates."""
        self.model: Any = None
        self._before: dict[int, Any] = {}
        self._variables: list[Any] = []
        self._lines: dict[str, int] = {}
        self.within_compiled = False
        self.compiled_steps = 0

    # Called by the framework's room.

    def shuffled(self, buffer: int, size: int, after_batch: bool) -> None:
        """A pipeline is shuffled; `size` is negative where it is not known."""
        line = self._line()
        where = f"{Path(self._script).name}:{line}" if line else "the data pipeline"
        self.shuffles.append(Shuffled(buffer, size, after_batch, where))

    def made(self, name: str) -> None:
        """A function is to be compiled."""
        key = (name, self._line())
        self.functions[key] = self.functions.get(key, 0) + 1

    def averaged(self, replicas: int, examples: int) -> None:
        """A replica differentiates the mean over its own examples."""
        self.replicas.setdefault(self._line(), (replicas, examples))

    @contextlib.contextmanager
    def called_compiled(self) -> Iterator[None]:
        """A function that would run compiled."""
        outer, self.within_compiled = self.within_compiled, True
        try:
            yield
        finally:
            self.within_compiled = outer

    # Notes.

    def _line(self) -> int | None:
        """The line of the script that is being executed."""
        return self._source.line()

    def _mark(self, what: str) -> None:
        line = self._line()
        if line is not None:
            self._lines.setdefault(what, line)

    def _layer(self, real: Callable[..., Any]) -> Callable[..., Any]:
        noted = super()._layer(real)

        def call(layer: Any, *arguments: Any, **named: Any) -> Any:
            if not self._stack and self._tensors((arguments, named)):
                if self.applied:
                    self._end_step()
                else:
                    self.updates.clear()  # They were for a validation batch.
                if self.model is None or len(layer.variables) > len(
                    self.model.variables
                ):
                    self.model = layer
                if not self._before:
                    self._begin_step(layer)
                self._mark("model")
            return noted(layer, *arguments, **named)

        return call

    def _loss(self, real: Callable[..., Any]) -> Callable[..., Any]:
        noted = super()._loss(real)

        def call(loss: Any, *arguments: Any, **named: Any) -> Any:
            self._mark("loss")
            return noted(loss, *arguments, **named)

        return call

    def _apply(self, real: Callable[..., Any]) -> Callable[..., Any]:
        noted = super()._apply(real)

        def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
            self._mark("optimizer")
            self.compiled_steps += self.within_compiled
            result = noted(optimizer, grads, trainable_variables)
            self._variables += list(optimizer.variables)
            return result

        return apply

    def _metric_kinds(self) -> set[type]:
        import keras

        # Which metrics a script will make is not known yet.
        kinds, found = [keras.metrics.Metric], set()
        while kinds:
            kind = kinds.pop()
            kinds += kind.__subclasses__()
            if "update_state" in vars(kind):
                found.add(kind)
        return found

    def _metric(self, real: Callable[..., Any]) -> Callable[..., Any]:
        noted = super()._metric(real)

        def update_state(metric: Any, *arguments: Any, **named: Any) -> Any:
            if all(m is not metric for m in self.metrics):
                self.metrics.append(metric)
                self._note_loops(metric)
            return noted(metric, *arguments, **named)

        return update_state

    def _hooks(self) -> list[Hook]:
        import keras

        made: Hook = (keras.metrics.Metric, "__init__", self._metric_init)
        return [*super()._hooks(), made]

    def _metric_init(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def init(metric: Any, *arguments: Any, **named: Any) -> None:
            self._made[id(metric)] = self._source.depth()
            real(metric, *arguments, **named)

        return init

    def _note_loops(self, metric: Any) -> None:
        made, line = self._made.get(id(metric)), self._line()
        if made is None or line is None or not self._source.calls():
            return
        loops = self._source.depth() - made
        if loops > 1:
            self.growing[metric.name] = (line, loops)

    def never_reset(self) -> Iterator[tuple[str, int, int]]:
        """Metrics that no epoch sets back: name, line, loops around it."""
        if not self._source.resets():
            for name, (line, loops) in self.growing.items():
                yield name, line, loops

    def _begin_step(self, layer: Any) -> None:
        read = self._backend.read
        self._variables += list(layer.variables)
        for step in self.steps[-1:]:
            for applied in step.probe.applied:
                self._variables += list(applied.optimizer.variables)
        single = {id(v): v for v in self._variables}
        self._variables = list(single.values())
        self._before = {id(v): read(v) for v in self._variables}

    def end_early(self) -> None:
        """A script has raised: its step is what was noted so far."""
        if not self.steps and self.judged:
            self._end_step()

    def _end_step(self) -> None:
        self._leave_out_validation()
        notes = Probe(self._backend, list(self.metrics), list)
        for name in ("calls", "judged", "applied", "origins", "born", "updates"):
            setattr(notes, name, getattr(self, name))
        notes.phases, notes.regularization = self.phases, self.regularization
        self.steps.append(
            Step(
                notes,
                self._look(notes) if notes.applied else None,
                self._batch(notes),
                self._lines,
            )
        )
        self.calls, self.judged, self.applied = [], [], []
        self.origins, self.born, self.updates, self.phases = [], [], {}, {}
        self.regularization, self._counts, self._lines = [], {}, {}
        self._before = {}
        if len(self.steps) >= self._most:
            raise Enough

    def _leave_out_validation(self) -> None:
        """Drop calls of the model that nothing was differentiated through."""
        groups: list[list[Call]] = [[]]
        for call in self.calls:  # What was called within a call comes before it.
            groups[-1].append(call)
            if "/" not in call.path:
                groups.append([])
        learning = [
            group
            for group in groups
            if any(g is not None for call in group for g in call.gradients)
        ]
        if not learning:
            return
        left = {id(c) for group in groups for c in group}
        self.calls = [call for group in learning for call in group]
        left -= {id(c) for c in self.calls}
        outputs = {id(o) for g in groups for c in g if id(c) in left for o in c.outputs}
        self.judged = [j for j in self.judged if id(j.y_pred) not in outputs]

    def _batch(self, notes: Probe) -> tuple[Any, ...]:
        outer = [c for c in notes.calls if "/" not in c.path]
        x = outer[0].inputs[0] if outer and outer[0].inputs else None
        y = notes.judged[0].y_true if notes.judged else None
        parts = [p for p in (x, y) if p is not None]
        return tuple(self._backend.to_numpy(self._backend.place(p)) for p in parts)

    def _look(self, notes: Probe) -> OpenedStep | None:
        batch = self._batch(notes)
        size = len(batch[0]) if batch else 0
        value = notes.judged[0].value if notes.judged else None
        loss = [] if value is None else [float(self._backend.to_numpy(value))]
        variables = {id(v): v for v in (*self._variables, *(v for v, _ in notes.born))}
        seen = SeenStep(
            runner=SimpleNamespace(  # type: ignore[arg-type]
                backend=self._backend,
                model=self.model,
                stages={"train": SimpleNamespace(found=Found(), own=True)},
                renewed=lambda: [(v.path, v) for v in variables.values()],
            ),
            probe=notes,
            segment=SimpleNamespace(feed=SimpleNamespace(batch_size=size)),  # type: ignore[arg-type]
            batch=batch,
            outputs={"loss": np.asarray(loss)} if loss else {},
            before=self._before,
        )
        rate = getattr(notes.applied[0].optimizer, "learning_rate", None)
        return seen.opened(
            step=len(self.steps),
            gear=None,
            examples=None,
            learning_rate=None if rate is None else float(self._backend.to_numpy(rate)),
            phases={n: 1e3 * s for n, s in notes.phases.items()},
        )


class ScriptFacts:
    """What a script has shown, as the checks ask for it."""

    own = True
    moments = MOMENTS
    validation = None
    tested = None

    def __init__(self, watched: Watching) -> None:
        self._steps = watched.steps
        self.model, self.backend = watched.model, backends.current()
        self.source = SimpleNamespace(
            inexact=lambda: None,
            examples=lambda *_: None,
            shuffles=lambda: watched.shuffles,
            steps=None,
        )
        self.first = self._seen(self._steps[0])
        # By then what holds at the start only is over.
        self.settled = self._seen(self._steps[-1])
        self.looks = [s.look for s in (self.first, self.settled) if s.look is not None]

    @staticmethod
    def _seen(step: Step) -> Seen:
        return Seen(step.look, step.probe)

    @property
    def judged(self) -> list[Judged]:
        """As `Facts.judged`."""
        return [*self.first.probe.judged, *self.settled.probe.judged]

    @property
    def scales_loss(self) -> bool:
        """As `Facts.scales_loss`."""
        return scales_loss(self.model, self.first, self.settled)

    @property
    def batches(self) -> list[tuple[Any, ...]]:
        """One of each step that was watched."""
        return [step.batch for step in self._steps]

    def labels(self) -> None:
        """Not known: only batches are."""

    def hashes(self, source: Any) -> None:
        """Not known."""

    def loss_on(self, batch: Any) -> None:
        """Not to be had: the step is no function that could be called."""

    def host(self, value: Any) -> np.ndarray:
        """A tensor as a NumPy array."""
        return self.backend.to_numpy(value)


def examine_script(
    path: Path, *, steps: int = STEPS, arguments: Sequence[str] = ()
) -> Examination:
    """Run a script for some steps, watch it, and report what is wrong with its loop.

    Args:
        path: Of the script. It is run as `__main__`, and ended after the steps.
        steps: How many optimizer updates are watched.
        arguments: For `sys.argv`.

    Raises:
        ExperimentError: It cannot be run, or trains nothing with Keras's optimizers.
    """
    if not path.is_file():
        raise ExperimentError(f"There is no file {str(path)!r}. Expected a script.")
    path = path.resolve()
    watched = Watching(path, steps)
    backend = backends.current()
    raised: BaseException | None = None
    argv, sys.argv = sys.argv, [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    try:
        with (
            backend.scripted(watched),
            watched.around(),
            backend.observed(watched, None),
            contextlib.redirect_stdout(sys.stderr),
        ):
            runpy.run_path(str(path), run_name="__main__")
    except Enough:
        pass
    except (Exception, SystemExit) as error:
        raised = error
        watched.end_early()
        if not watched.steps:
            raise ExperimentError(
                f"The script {str(path)!r} ended before its first step was over: "
                f"{type(error).__name__}: {error}"
            ) from error
    finally:
        sys.argv = argv
        sys.path.remove(str(path.parent))
    if not watched.steps:
        raise ExperimentError(
            f"The script {str(path)!r} has applied no Keras optimizer twice: there is "
            "no loop to look at."
        )
    # A script has no source that could be asked, and no test step of its own.
    checks = [n for n in ALL if n not in OF_LOOPS]
    found = examine(ScriptFacts(watched), checks)  # type: ignore[arg-type]
    lines = watched.steps[0].lines
    named = [_with_line(f, path, lines) for f in found.findings]
    own = [
        *_of_functions(watched, path),
        *_of_metrics(watched, path),
        *_of_replicas(watched, path),
    ]
    failed = dict(found.failed)
    if raised is not None and watched.steps[-1].look is None:
        failed["script"] = f"{type(raised).__name__}: {raised}"
    findings = sorted([*named, *own], key=lambda f: f.severity != "error")
    return Examination(findings, found.seconds, failed)


def _with_line(found: Finding, path: Path, lines: Mapping[str, int]) -> Finding:
    what = (
        "loss"
        if found.check in BY_LOSS
        else "model"
        if found.check in BY_MODEL
        else "optimizer"
    )
    line = lines.get(what)
    if line is None or found.where.startswith(f"{path.name}:"):
        return found
    return replace(found, where=f"{path.name}:{line}, {found.where}")


def _of_metrics(watched: Watching, path: Path) -> Iterator[Finding]:
    for name, line, loops in watched.never_reset():
        yield Finding(
            "metrics",
            "warning",
            f"The metric {name!r} is never reset: in each epoch it counts all epochs "
            "before as well",
            f"{path.name}:{line}, metric {name!r}",
            "Call its reset_state() at the beginning of each epoch.",
            {"loops_around_its_update": loops, "resets_in_the_script": 0},
            kind="never_reset",
        )


def _of_replicas(watched: Watching, path: Path) -> Iterator[Finding]:
    for line, (replicas, examples) in watched.replicas.items():
        yield Finding(
            "replicas",
            "error",
            f"Each of {replicas} replicas differentiates the mean over its own "
            f"{examples} examples, and the gradients are summed: every step is "
            f"{replicas} times as large",
            f"{path.name}:{line}",
            "Divide by the number of replicas: tf.nn.compute_average_loss(per_example, "
            "global_batch_size=...), or a Keras loss object, which does so itself.",
            {"replicas": replicas, "examples_of_a_replica": examples},
            kind="tape",
        )


def _of_functions(watched: Watching, path: Path) -> Iterator[Finding]:
    for (name, line), times in watched.functions.items():
        if times > 2 and line is not None:
            yield Finding(
                "retracing",
                "warning",
                f"A compiled function {name!r} is made {times} times in "
                f"{len(watched.steps)} steps: each one is traced anew",
                f"{path.name}:{line}",
                "Make it once, outside of the loop.",
                {"times": times},
                kind="remade",
            )
    if watched.compiled_steps:
        return
    first = watched.steps[0]
    eager_s, compiled_s = eager_and_compiled(watched.model, first.probe, first.batch)
    line = first.lines.get("optimizer")
    if compiled_s is not None and eager_s > PAYS * compiled_s:
        yield Finding(
            "uncompiled",
            "warning",
            f"The step runs eagerly: compiled it would be {eager_s / compiled_s:.1f} "
            "times as fast",
            f"{path.name}:{line}",
            "Put the step into a function under @tf.function, or give it to a "
            "loopscope.Loop.",
            {"eager_ms": 1e3 * eager_s, "compiled_ms": 1e3 * compiled_s},
            kind="script",
        )
