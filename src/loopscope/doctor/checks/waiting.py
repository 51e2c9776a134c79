"""A loop that waits for its data."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

SHARE = 0.5
"""Of the time: less is no finding, since the two hinder each other a little."""

LEAST_S = 2e-3
"""Nobody minds waiting this long in a step."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare what a batch takes to come with what a step takes.

    A thread fetches batches while steps run: the loop waits for what is left.
    """
    fetch_s = facts.fetch_s
    if fetch_s is None or fetch_s < LEAST_S or facts.first.error is not None:
        return
    pace = facts.pace(facts.trained)
    if pace is None:
        return
    wait_s = fetch_s - pace.step_s
    if wait_s < LEAST_S or wait_s < SHARE * fetch_s:
        return
    yield Finding(
        "waiting",
        "warning",
        f"The loop waits for data {100 * wait_s / fetch_s:.0f} % of its time: a batch "
        f"takes {1e3 * fetch_s:.3g} ms to come, a step {1e3 * pace.step_s:.3g} ms",
        "the training data",
        "Prepare batches in parallel: dataset.map(..., num_parallel_calls=tf.data."
        "AUTOTUNE) and .prefetch(tf.data.AUTOTUNE), or a keras.utils.PyDataset with "
        "workers; do once what is the same in every epoch; give arrays if they fit.",
        {
            "fetch_ms": 1e3 * fetch_s,
            "step_ms": 1e3 * pace.step_s,
            "waiting_share": wait_s / fetch_s,
        },
    )
