"""Labels that are none of the outputs, or in another form than the loss expects."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.doctor.losses import kind_of, option, values
from loopscope.look.stats import as_float


def check(facts: Facts) -> Iterator[Finding]:
    """Compare the labels that a loss was given with its predictions."""
    told = set()
    for judged in facts.judged:
        kind, loss, pair = kind_of(judged.loss), judged.loss, values(facts, judged)
        if kind is None or pair is None or loss.name in told:
            continue
        labels, scores = as_float(pair[0]), pair[1]
        found = (
            _sparse(loss, labels, scores)
            if kind == "sparse"
            else _between(loss.name, labels)
        )
        if found is not None:
            told.add(loss.name)
            yield found


def _sparse(loss: object, labels: np.ndarray, scores: np.ndarray) -> Finding | None:
    name, classes = loss.name, scores.shape[-1]  # type: ignore[attr-defined]
    one_hot = labels.ndim == scores.ndim and labels.shape[-1] == classes > 1
    if one_hot:
        return Finding(
            "labels",
            "error",
            f"The loss {name!r} expects a number for each example, but is given "
            "one-hot rows",
            f"loss {name!r}",
            "Use CategoricalCrossentropy, or give the numbers: y.argmax(axis=-1).",
            {
                "shape_of_labels": str(labels.shape),
                "shape_of_outputs": str(scores.shape),
            },
            kind="one_hot",
        )
    ignored = option(loss, "ignore_class", None)
    counted = labels if ignored is None else labels[labels != ignored]
    if not counted.size:
        return None
    outside = (counted < 0) | (counted >= classes)
    if not outside.any():
        return None
    return Finding(
        "labels",
        "error",
        f"Labels lie outside of the {classes} outputs of the model",
        f"loss {name!r}, labels",
        f"Number the classes from 0 to {classes - 1}, or give the last layer "
        f"{int(counted.max()) + 1} outputs.",
        {
            "smallest": float(counted.min()),
            "largest": float(counted.max()),
            "outputs": classes,
            "share_outside": float(outside.mean()),
        },
        kind="outside",
    )


def _between(name: str, labels: np.ndarray) -> Finding | None:
    if not labels.size or (labels.min() >= 0 and labels.max() <= 1):
        return None
    return Finding(
        "labels",
        "error",
        f"The loss {name!r} expects labels from 0 to 1",
        f"loss {name!r}, labels",
        "Give probabilities: 0 and 1 for two classes, one-hot rows for more.",
        {"smallest": float(labels.min()), "largest": float(labels.max())},
        kind="between",
    )
