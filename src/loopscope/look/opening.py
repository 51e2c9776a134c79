"""Executing one step eagerly, with a probe around it, and setting everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from loopscope.data.feed import Segment
from loopscope.gear import EAGER, Gear
from loopscope.look.opened import OpenedStep
from loopscope.look.probe import Probe
from loopscope.look.seen import Seen
from loopscope.runner import Runner


def open_step(
    runner: Runner,
    segment: Segment,
    *,
    step: int,
    gear: Gear | None,
    examples: np.ndarray | None = None,
    fetch_s: float | None = None,
    probe: Probe | None = None,
) -> OpenedStep:
    """Open up the first step of a segment, from the state as it stands.

    Executes it eagerly, once: tens of milliseconds, and in memory every layer's output.
    The state is set back, whatever happens.

    Args:
        runner: Has the train step.
        segment: The step's data.
        step: The step's global number.
        gear: In which training runs it: random numbers are drawn as this gear does.
        examples: The rows of its examples in the arrays given, if they have any.
        fetch_s: What it took to have the data.
        probe: A new one from `probe_of`, for whoever wants its notes.
    """
    probe = probe or probe_of(runner)
    rate = _learning_rate(runner)
    with _set_back(runner, probe) as before:
        outputs, batch = executed(runner, segment, gear, probe)
        seen = Seen(
            runner=runner,
            probe=probe,
            segment=segment,
            batch=batch,
            outputs=outputs,
            before=before,
        )
        phases = {name: 1e3 * s for name, s in probe.phases.items()}
        if fetch_s is not None:
            phases["data"] = 1e3 * fetch_s
        return seen.opened(
            step=step,
            gear=gear,
            examples=examples,
            learning_rate=rate,
            phases=phases,
        )


def probe_of(runner: Runner) -> Probe:
    """A probe that knows the metrics and the added losses of a loop."""
    model, metrics = runner.model, list(getattr(runner.model, "metrics", ()))
    for stage in runner.stages.values():
        metrics += stage.found.metrics
    single = list({id(m): m for m in metrics}.values())
    return Probe(runner.backend, single, lambda: list(getattr(model, "losses", ())))


def executed(
    runner: Runner, segment: Segment, gear: Gear | None, probe: Probe
) -> tuple[Any, tuple[Any, ...]]:
    """Execute the first step of a segment eagerly, on the live variables.

    Returns:
        The step's outputs, stacked, and its batch.
    """
    executable = runner.executable("train")

    def told(*batch: Any) -> Any:
        # Where it is told once more, operation by operation, the first time counts.
        probe.batch = probe.batch or batch
        return executable(*batch)

    told.__module__ = getattr(executable, "__module__", "")
    backend = runner.backend
    program = backend.program(
        told, EAGER, segment.feed, None, runner.state.variables, 1
    )
    with probe.around(), backend.observed(probe, gear), probe.timed("other"):
        outputs = program(segment.feed, segment.start, segment.start + 1)
    return outputs, probe.batch


@contextmanager
def _set_back(runner: Runner, probe: Probe) -> Iterator[dict[int, Any]]:
    """Whatever the block does to variables is undone; yields their values before."""
    backend, state = runner.backend, runner.state
    before = {id(v): backend.read(v) for v in state.variables}
    try:
        yield before
    finally:
        state.restore(list(before.values()))
        # What was built on the way stays, as it was when it was built.
        for variable, value in probe.born:
            backend.assign(variable, value)


def _learning_rate(runner: Runner) -> float | None:
    optimizer = getattr(runner.model, "optimizer", None)
    if optimizer is None:
        return None
    return float(runner.backend.to_numpy(optimizer.learning_rate))
