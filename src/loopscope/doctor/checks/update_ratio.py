"""Updates that are far too large or too small for their weights."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

LEAST, MOST = 1e-5, 1e-1
"""Of the norm of a weight, one update moves it by about 1e-3 in a healthy training."""

ONCE = 3e-1
"""More than this is too much in a single step; `MOST` is in every one looked into."""


def check(facts: Facts) -> Iterator[Finding]:
    """Take the median over the weights (not the biases), of both steps looked into."""
    looks = facts.looks
    if not looks or any(k.first_nonfinite is not None for k in looks) or _grows(facts):
        return
    # A weight that began at 0 is small for a while, whatever its updates.
    begun = {u.path for u in looks[0].updates if u.weight_norm and u.before.ndim > 1}
    by_step = [
        {u.path: u.ratio for u in k.updates if u.path in begun and u.ratio}
        for k in looks
    ]
    by_step = [ratios for ratios in by_step if ratios]
    if not by_step:
        return
    extreme = max(by_step, key=lambda ratios: median(ratios.values()))
    middle = median(extreme.values())
    least = min(median(ratios.values()) for ratios in by_step)
    large = least > MOST or middle > ONCE
    if not large and middle >= LEAST:
        return
    path = (max if large else min)(extreme, key=lambda p: extreme[p])
    rate = looks[-1].learning_rate
    yield Finding(
        "update_ratio",
        "warning",
        f"One step moves the weights by {middle:.2g} of their size: "
        + ("too much to settle" if large else "hardly at all"),
        f"the learning rate; most in {path}",
        f"{'Lower' if large else 'Raise'} the learning rate.",
        {
            "median_ratio": middle,
            "ratio": extreme[path],
            "learning_rate": float("nan") if rate is None else rate,
        },
        kind="large" if large else "small",
    )


def _grows(facts: Facts) -> bool:
    """Whether a schedule moves the learning rate: it may be warming up."""
    import keras

    schedule = keras.optimizers.schedules.LearningRateSchedule
    return any(
        isinstance(getattr(a.optimizer, "_learning_rate", None), schedule)
        for a in facts.settled.probe.applied
    )
