"""A loop that does not learn a single batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from loopscope.data.feed import Segment
from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.trials import overfit

BRIEFLY, STEPS = 25, 200
"""Steps on one batch: most loops have shown after a few that they learn."""

MOST_S = 2.0
"""Seconds of each trial."""

FALLEN, OUT, ROUNDING = 0.01, 4.0, 1e-6
"""A loop learns if its loss has once been lower by so much of itself, or so many times
its changes from step to step; rounding apart."""

MEAN = 5
"""Steps over which a loss is averaged."""

LEAST = 1e-3
"""A loss that is smaller is as good as learnt."""

RATES = (1.0, 10.0, 100.0, 0.1)
"""Times the learning rate: one that is far off is nobody's bug here."""


def check(facts: Facts) -> Iterator[Finding]:
    """Train on one batch, at several learning rates, until the loss falls once.

    Made where nothing else was found. GANs and their like are left out, whose losses
    fall by turns; and trained models, whose loss may have nowhere to fall.
    """
    if not _can_tell(facts):
        return
    optimizer = next((a.optimizer for a in facts.first.probe.applied), None)
    rate = _rate(facts, optimizer)
    tried: dict[float, np.ndarray] = {}
    for times in RATES if rate is not None else RATES[:1]:
        for steps in (BRIEFLY, STEPS):
            losses = _losses(facts, optimizer, rate and rate * times, steps)
            if losses is None or _falls(losses):
                return
            tried[times] = losses
    first, last = _ends(tried[1.0])
    if rate is None and last < (1 + 5 * FALLEN) * first:
        return  # It may only be slow: a schedule can begin at next to nothing.
    yield Finding(
        "overfit",
        "error",
        f"The loop does not learn a single batch: in {len(tried[1.0])} steps on the "
        f"same examples the loss goes from {first:.4g} to {last:.4g}",
        "the train step: its loss, its gradients, or how they are applied",
        "Look at the sign of the loss and of the gradients, at whether labels and "
        "outputs belong together, and at whether gradients and variables come in the "
        "same order.",
        {
            "loss_before": first,
            **{
                f"loss_at_{times:g}_times_the_learning_rate": _ends(losses)[1]
                for times, losses in tried.items()
            },
        },
    )


def _can_tell(facts: Facts) -> bool:
    """Whether there is one loss, and one optimizer that has not been applied before."""
    import keras

    look, applied = facts.first.look, facts.first.probe.applied
    if look is None or look.loss is None or facts.settled.look is None:
        return False
    if len(applied) > 1 or not np.isfinite(look.loss) or abs(look.loss) < LEAST:
        return False
    if facts.own and "loss" not in look.outputs:
        return False
    iterations = [keras.ops.convert_to_numpy(a.optimizer.iterations) for a in applied]
    return not any(iterations)


def _rate(facts: Facts, optimizer: Any) -> float | None:
    """Its learning rate; `None` where it is a schedule's, or there is no optimizer."""
    import keras

    inner = getattr(optimizer, "inner_optimizer", optimizer)
    known = isinstance(getattr(inner, "_learning_rate", None), keras.Variable)
    read = facts.backend.read
    return float(facts.host(read(inner._learning_rate))) if known else None


def _losses(
    facts: Facts, optimizer: Any, rate: float | None, steps: int
) -> np.ndarray | None:
    """Of steps on one batch, at this rate; `None` where they take too long."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    segment = facts.segment
    one = Segment(segment.feed, segment.start, segment.start + 1)
    pace = facts.pace(facts.brisk)
    if pace is None or pace.step_s * BRIEFLY > MOST_S:
        return None
    steps = int(min(steps, MOST_S / pace.step_s))
    with facts.runner.state.kept():
        if rate is not None:
            facts.backend.assign(inner._learning_rate, rate)
        return overfit(facts.runner, one, facts.brisk, batches=1, steps=steps).losses


def _means(losses: np.ndarray) -> np.ndarray:
    return np.convolve(losses, np.full(MEAN, 1 / MEAN), "valid")


def _falls(losses: np.ndarray) -> bool:
    if len(losses) <= 2 * MEAN:
        return True  # It has ended early: learnt by heart.
    losses = losses[np.isfinite(losses)]
    if len(losses) <= MEAN:
        return False
    means = _means(losses)
    fallen, size = means[0] - means[1:].min(), abs(means[0])
    # A large part of the loss may be constant: what stands out of the noise counts too.
    noise = float(np.median(np.abs(np.diff(losses))))
    return bool(fallen > max(min(FALLEN * size, OUT * noise), ROUNDING * size))


def _ends(losses: np.ndarray) -> tuple[float, float]:
    return float(losses[0]), float(losses[-MEAN:].mean())
