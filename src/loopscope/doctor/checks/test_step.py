"""A test step that trains: weights, statistics or Dropout are at work in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding


def check(facts: Facts) -> Iterator[Finding]:
    """Run one test step and see what it has changed."""
    import keras

    tested = facts.tested
    if tested is None:
        return
    changed = [p for p in tested.changes if "seed_generator" not in p]
    if changed:
        yield Finding(
            "test_step",
            "error",
            f"The test step changes {len(changed)} variables that are no metric's",
            ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else ""),
            "Call the model with training=False, and apply no gradients there.",
            {"variables": len(changed)},
            kind="changes",
        )
    for call in tested.calls:
        layer = call.layer
        if not isinstance(layer, keras.layers.Dropout) or not call.inputs:
            continue
        before, after = facts.host(call.inputs[0]), facts.host(call.outputs[0])
        if before.shape == after.shape and not np.array_equal(before, after):
            yield Finding(
                "test_step",
                "error",
                "Dropout drops units in the test step: what is measured is not the "
                "model that will be used",
                f"layer {call.path!r}",
                "Call the model with training=False in the test step.",
                {"rate": layer.rate, "dropped": float(np.mean(after == 0))},
                kind="dropout",
            )
            return
