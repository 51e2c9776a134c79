"""Half precision without loss scaling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.look.stats import as_float

SMALLEST = 6e-8
"""The smallest number above 0 that float16 has."""


def check(facts: Facts) -> Iterator[Finding]:
    """Look for layers that compute in float16, and for an optimizer that scales."""
    seen = facts.first
    half = [c.path for c in seen.probe.calls if c.layer.compute_dtype == "float16"]
    scales = facts.scales_loss or any(
        getattr(a.optimizer, "loss_scale_factor", None) for a in seen.probe.applied
    )
    if not half or scales or not seen.probe.applied:
        return
    shares = [
        float(np.mean(np.abs(as_float(g.values)) < SMALLEST))
        for look in facts.looks
        for g in look.gradients
        if g.values is not None
    ]
    yield Finding(
        "float16",
        "error",
        "Layers compute in float16, and the loss is not scaled: gradients below 6e-8 "
        "become 0",
        f"{len(half)} layers, {half[0]!r} among them",
        "Wrap the optimizer: keras.optimizers.LossScaleOptimizer(optimizer), and take "
        "the gradients of optimizer.scale_loss(loss); or use mixed_bfloat16.",
        {"share_of_gradients_at_0": float(np.mean(shares)) if shares else 0.0},
    )
