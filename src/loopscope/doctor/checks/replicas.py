"""A loss that a divided step does not scale: gradients of replicas are summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

SCALED = 1.25
"""Up to so many times the gradients of the whole batch, they may be those."""

ALIKE = 0.9
"""The cosine above which two gradients are the same but for their size."""


def check(facts: Facts) -> Iterator[Finding]:
    """Hold the gradients that a divided step applies against an undivided one's."""
    divided, look = facts.divided, facts.first.look
    if not divided or look is None:
        return
    whole = [g.values for g in look.gradients if g.values is not None]
    if [g.shape for g in whole] != [g.shape for g in divided]:
        return
    factor = _factor(whole, divided)
    if factor is None or factor <= SCALED:
        return
    yield Finding(
        "replicas",
        "error",
        f"The gradients of a divided step are {factor:.3g} times those of the whole "
        "batch: its loss is the mean over a replica's examples, and gradients are "
        "summed",
        "the train step",
        "Give the tape a loss of `loopscope.value_and_grad` or of a Keras loss object, "
        "which are scaled; or scale it: tf.nn.compute_average_loss(per_example, "
        "global_batch_size=...).",
        {"factor": factor},
        kind="divided",
    )


def _factor(whole: Sequence[np.ndarray], divided: Sequence[np.ndarray]) -> float | None:
    """By what the one is to be multiplied to come nearest to the other."""
    one, other = (
        np.concatenate([np.asarray(g, np.float64).ravel() for g in gradients])
        for gradients in (whole, divided)
    )
    product, square = float(one @ other), float(one @ one)
    size = np.sqrt(square * float(other @ other))
    if not np.isfinite(size) or size == 0 or product < ALIKE * size:
        return None
    return product / square
