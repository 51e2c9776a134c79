"""A loss that compares every prediction with every label: (B, 1) against (B,)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

SAME = 1e-5
"""Relative: a loss that changes by less does not depend on which label is whose."""


def check(facts: Facts) -> Iterator[Finding]:
    """Exchange labels among the examples of a batch: the loss has to change."""
    seen, batches = facts.settled, facts.batches
    if not facts.own or seen.look is None or not batches or len(batches[0]) < 2:
        return
    x, y, *rest = batches[0]
    rows = len(y) if isinstance(y, np.ndarray) else 0
    outer = [c for c in seen.probe.calls if "/" not in c.path]
    column = any(tuple(o.shape) == (rows, 1) for c in outer for o in c.outputs)
    if not column or y.ndim != 1 or rows < 4 or len(np.unique(y)) < 2:
        return
    as_given = facts.loss_on((x, y, *rest))
    exchanged = facts.loss_on((x, np.roll(y, rows // 2), *rest))
    other = facts.loss_on((x, (y + 1).astype(y.dtype), *rest))
    if as_given is None or exchanged is None or other is None:
        return
    scale = SAME * max(abs(as_given), 1e-12)
    if abs(exchanged - as_given) < scale < abs(other - as_given):
        yield Finding(
            "broadcast",
            "error",
            "The loss is the same when labels are exchanged among examples: every "
            "prediction is compared with every label",
            f"labels of shape ({rows},), outputs of shape ({rows}, 1)",
            "Give both the same shape: y[:, None], or keras.ops.squeeze(outputs, -1).",
            {"loss": as_given, "loss_with_labels_exchanged": exchanged},
        )
