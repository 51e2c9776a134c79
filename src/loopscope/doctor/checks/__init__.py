"""One check a file: facts in, findings out. Checks do not know each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loopscope.doctor.checks import (
    broadcast,
    dead_units,
    float16,
    from_logits,
    gradient_sizes,
    inputs,
    labels,
    metrics_twice,
    nonfinite,
    order,
    overlap,
    regularization,
    resuming,
    saturation,
    test_step,
    training_flag,
    update_ratio,
    variables,
)
from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

Check = Callable[[Facts], Iterator[Finding]]

ALL: dict[str, Check] = {
    "labels": labels.check,
    "from_logits": from_logits.check,
    "broadcast": broadcast.check,
    "inputs": inputs.check,
    "order": order.check,
    "training_flag": training_flag.check,
    "test_step": test_step.check,
    "regularization": regularization.check,
    "metrics_twice": metrics_twice.check,
    "variables": variables.check,
    "float16": float16.check,
    "nonfinite": nonfinite.check,
    "gradient_sizes": gradient_sizes.check,
    "dead_units": dead_units.check,
    "saturation": saturation.check,
    "update_ratio": update_ratio.check,
    "overlap": overlap.check,
    "resuming": resuming.check,
}
"""By name, in the order in which they are run: what explains others comes first."""
