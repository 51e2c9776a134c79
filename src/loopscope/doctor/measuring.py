"""What a step takes: time in a gear, eagerly or compiled, and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loopscope import backend as backends
from loopscope.data.feed import Segment
from loopscope.data.source import Source, as_source
from loopscope.gear import EAGER, Gear, compiled
from loopscope.look.probe import Probe
from loopscope.runner import Done, Runner
from loopscope.step import value_and_grad

ROUNDS = 5
"""Times that a gear is measured, of which the quickest counts."""

CHUNK = 16
"""Steps of each time, in a gear that runs many to a call."""

ENOUGH_S = 0.5
"""After so long a gear is not measured once more."""

GROWING = 4
"""Steps over which growth is measured, twice."""

MOST_BATCHES, MOST_S = 64, 2.0
"""So many batches are read for their shapes, in so many seconds at most."""

PAYS = 2.0
"""So many times as fast, another gear is worth a word."""


@dataclass(frozen=True)
class Pace:
    """What a step takes in a gear: seconds.

    Attributes:
        step_s: The quickest of some.
        compile_s: The first one, less that; `None` where it had been made before.
    """

    step_s: float
    compile_s: float | None


def pace(runner: Runner, gear: Gear, segment: Segment) -> Pace:
    """Run a gear's first steps some times. The state moves on."""
    began = time.perf_counter()

    def run(steps: int) -> Done:
        part = Segment(segment.feed, segment.start, segment.start + steps)
        return runner.run("train", gear, part)

    first, step_s = run(1), run(1).wall_s
    brief = step_s * CHUNK < ENOUGH_S / ROUNDS
    steps = min(segment.steps, CHUNK) if gear.fused and brief else 1
    for _ in range(ROUNDS):
        step_s = min(step_s, run(steps).wall_s / steps)
        if time.perf_counter() - began > ENOUGH_S:
            break
    runner.finished = 0
    spent = [c.wall_s for c in first.compiled]
    return Pace(step_s, max(0.0, sum(spent) - step_s) if spent else None)


def growth(runner: Runner, segment: Segment) -> float:
    """Bytes of arrays that each eager step leaves behind. The state moves on."""

    def run(steps: int) -> int:
        for i in range(steps):
            at = segment.start + i % segment.steps
            runner.run("train", EAGER, Segment(segment.feed, at, at + 1))
        runner.finished = 0
        gc.collect()
        return runner.backend.live_bytes()

    began, middle, end = run(2), run(GROWING), run(GROWING)
    return max(0.0, min(middle - began, end - middle) / GROWING)


def next_batches(source: Source) -> Iterator[Segment]:
    """Single steps of a source, some and for a while. It moves on."""
    data, began = source.open(0), time.perf_counter()
    try:
        for _ in range(MOST_BATCHES):
            segment = data.take(1)
            if segment is None or time.perf_counter() - began > MOST_S:
                return
            yield segment
    finally:
        data.close()


def eager_and_compiled(
    model: Any, probe: Probe, batch: tuple[Any, ...]
) -> tuple[float, float | None]:
    """Seconds of one step: eagerly, and in the first compiled gear.

    The step has the model, loss and optimizer that were seen; the state stays. The
    second is `None` where they cannot be put together.

    Costs one compilation and some ten steps.
    """
    if len(batch) < 2 or not probe.judged or not probe.applied:
        return 0.0, None
    loss_fn, applied = probe.judged[0].loss, probe.applied[0]
    optimizer, variables = applied.optimizer, applied.variables

    def step(x: Any, y: Any) -> Any:
        loss, grads = value_and_grad(
            lambda: loss_fn(y, model(x, training=True)), variables
        )
        optimizer.apply(grads, variables)
        return loss

    backend = backends.current()
    runner = Runner(model, backend)
    runner.stage("train", step, own=True)
    source = as_source(*batch, backend=backend, batch_size=len(batch[0]), shuffle=False)
    try:
        segment = source.sample()
        runner.trace("train", source.specs)
        with runner.state.kept():
            eager_s = pace(runner, EAGER, segment).step_s
            return eager_s, pace(runner, compiled(backend.gears), segment).step_s
    except Exception:
        return 0.0, None
    finally:
        source.close()
