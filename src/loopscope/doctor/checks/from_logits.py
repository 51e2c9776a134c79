"""A softmax or sigmoid under `from_logits=True`, and logits without it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.doctor.losses import kind_of, option, values
from loopscope.look.probe import Judged
from loopscope.look.stats import as_float

SUM = 1e-2
"""How far from 1 the scores of an example may sum up: float16 rounds by as much."""


def check(facts: Facts) -> Iterator[Finding]:
    """Look at what the losses were given, not at what layers are called."""
    told = set()
    for judged in facts.judged:
        kind, loss = kind_of(judged.loss), judged.loss
        pair = values(facts, judged)
        if kind is None or pair is None or loss.name in told:
            continue
        scores = as_float(pair[1])
        if not np.isfinite(scores).all():
            continue
        flag = bool(option(loss, "from_logits", False))
        found = _of(facts, judged, kind == "binary", scores, flag)
        if found is not None:
            told.add(loss.name)
            yield found


def _of(
    facts: Facts, judged: Judged, binary: bool, scores: np.ndarray, flag: bool
) -> Finding | None:
    name = judged.loss.name
    measured = {"smallest": float(scores.min()), "largest": float(scores.max())}
    if flag and _are_probabilities(facts, judged, binary, scores):
        activation = "sigmoid" if binary else "softmax"
        if not binary:
            sums = scores.sum(axis=-1)
            measured |= {"sums_from": float(sums.min()), "sums_to": float(sums.max())}
        return Finding(
            "from_logits",
            "error",
            f"The loss {name!r} has from_logits=True, but is given the outputs of a "
            f"{activation}: it is applied twice",
            f"loss {name!r}",
            f"Drop the {activation} of the last layer, or set from_logits=False.",
            measured,
            kind="twice",
        )
    if not flag and (scores.min() < -SUM or scores.max() > 1 + SUM):
        activation = "sigmoid" if binary else "softmax"
        return Finding(
            "from_logits",
            "error",
            f"The loss {name!r} expects probabilities, but is given numbers outside of "
            "0 to 1",
            f"loss {name!r}",
            f"Set from_logits=True, or end the model in a {activation}.",
            measured,
            kind="never",
        )
    return None


def _are_probabilities(
    facts: Facts, judged: Judged, binary: bool, scores: np.ndarray
) -> bool:
    if scores.min() < 0 or scores.max() > 1:
        return False
    if not binary:
        several = scores.ndim > 1 and scores.shape[-1] > 1
        return several and bool(np.abs(scores.sum(axis=-1) - 1).max() < SUM)
    # Logits may lie between 0 and 1 by chance: it takes a sigmoid to be sure.
    return any(
        getattr(getattr(call.layer, "activation", None), "__name__", "") == "sigmoid"
        for seen in (facts.first, facts.settled)
        for call in seen.probe.calls
        if any(output is judged.y_pred for output in call.outputs)
    )
