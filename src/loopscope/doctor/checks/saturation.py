"""A classifier that is sure of everything, and wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.doctor.losses import kind_of, option, values
from loopscope.look.stats import as_float

SURE = 0.99
"""The mean probability of the likeliest class from which on it is sure."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare how sure the first predictions are with how often they are right."""
    for judged in facts.first.probe.judged:
        kind, pair = kind_of(judged.loss), values(facts, judged)
        if kind not in ("sparse", "categorical") or pair is None:
            continue
        labels, scores = as_float(pair[0]), as_float(pair[1])
        if scores.ndim != 2 or scores.shape[1] < 2 or not np.isfinite(scores).all():
            continue
        if option(judged.loss, "from_logits", False):
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        meant = labels.argmax(axis=1) if kind == "categorical" else labels.ravel()
        if len(meant) != len(scores):
            continue
        sure = float(scores.max(axis=1).mean())
        right = float(np.mean(scores.argmax(axis=1) == meant))
        if sure > SURE and right < 0.5:
            yield Finding(
                "saturation",
                "warning",
                "The softmax is saturated: the model is sure of nearly every example, "
                "and mostly wrong",
                f"loss {judged.loss.name!r}",
                "Scale the inputs, or make the initial weights of the last layer "
                "smaller.",
                {"mean_largest_probability": sure, "accuracy": right},
            )
            return
