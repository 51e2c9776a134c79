"""What compiling a step would bring: measured on a step of the same parts."""

from __future__ import annotations

import time
from typing import Any

from loopscope import backend as backends
from loopscope.data.feed import Segment
from loopscope.data.source import as_source
from loopscope.gear import EAGER, Gear
from loopscope.look.probe import Probe
from loopscope.runner import Runner
from loopscope.step import value_and_grad

ROUNDS = 5
"""Steps of each, of which the quickest counts."""


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
            eager_s = _quickest(runner, EAGER, segment)
            return eager_s, _quickest(runner, backend.gears[0], segment)
    except Exception:
        return 0.0, None
    finally:
        source.close()


def _quickest(runner: Runner, gear: Gear, segment: Segment) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):  # The first one compiles.
        began = time.perf_counter()
        runner.run("train", gear, Segment(segment.feed, 0, 1))
        seconds.append(time.perf_counter() - began)
    runner.finished = 0
    return min(seconds[1:])
