"""One check a file: facts in, findings out. Checks do not know each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loopscope.doctor.checks import (
    accumulating,
    broadcast,
    compiling,
    dead_units,
    dropped_state,
    float16,
    from_logits,
    gradient_sizes,
    inputs,
    labels,
    memory,
    metrics,
    nonfinite,
    order,
    overfit,
    overlap,
    regularization,
    replicas,
    resuming,
    retracing,
    saturation,
    side_effects,
    test_step,
    training_flag,
    uncompiled,
    update_ratio,
    variables,
    waiting,
)
from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

Check = Callable[[Facts], Iterator[Finding]]


@dataclass(frozen=True)
class Cheap:
    """A check that one step is enough for: `fit` makes it by itself.

    It asks for `first` (or what comes of it) and `segment`, and for nothing that runs
    more steps or reads more data.
    """

    run: Check

    def __call__(self, facts: Facts) -> Iterator[Finding]:
        """Make it."""
        return self.run(facts)


ALL: dict[str, Check] = {
    "labels": Cheap(labels.check),
    "from_logits": Cheap(from_logits.check),
    "broadcast": Cheap(broadcast.check),
    "inputs": Cheap(inputs.check),
    "order": order.check,
    "training_flag": Cheap(training_flag.check),
    "test_step": test_step.check,
    "regularization": Cheap(regularization.check),
    "replicas": replicas.check,
    "metrics": Cheap(metrics.check),
    "variables": Cheap(variables.check),
    "float16": Cheap(float16.check),
    "nonfinite": Cheap(nonfinite.check),
    "gradient_sizes": Cheap(gradient_sizes.check),
    "dead_units": Cheap(dead_units.check),
    "saturation": Cheap(saturation.check),
    "update_ratio": update_ratio.check,
    "overlap": overlap.check,
    "resuming": resuming.check,
    "dropped_state": dropped_state.check,
    "accumulating": accumulating.check,
    "side_effects": side_effects.check,
    "memory": memory.check,
    "waiting": waiting.check,
    "uncompiled": uncompiled.check,
    "compiling": compiling.check,
    "retracing": retracing.check,
    "overfit": overfit.check,
}
"""By name, in the order in which they are run: what explains others comes first."""

LAST = ("overfit",)
"""Made only where the others have found nothing, or when asked for by name."""
