"""Inputs that are not finite, all alike, or far from the scale that layers expect."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.look.stats import as_float

LARGE = 10.0
"""A root mean square that is larger is unusual: standardized inputs have 1."""


def check(facts: Facts) -> Iterator[Finding]:
    """Look at the data of some batches, and at what the first layer is given."""
    import keras

    named: dict[str, list[np.ndarray]] = {}
    for batch in facts.batches:
        for name, part in zip(("x", "y"), batch, strict=False):
            for path, leaf in keras.tree.flatten_with_path(part):
                if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufV":
                    where = "/".join([name, *map(str, path)])
                    named.setdefault(where, []).append(as_float(leaf))
    for where, parts in named.items():
        values = np.concatenate([p.ravel() for p in parts])
        finite = np.isfinite(values)
        if not finite.all():
            yield Finding(
                "inputs",
                "error",
                f"The data hold numbers that are not finite in {where!r}",
                where,
                "Drop these examples, or fill in what is missing.",
                {"share": float(1 - finite.mean()), "values": values.size},
                kind="nonfinite",
            )
        elif where.startswith("x") and values.size > 1 and values.std() == 0:
            yield Finding(
                "inputs",
                "error",
                f"Every value of {where!r} is {values[0]:g}: there is nothing to learn "
                "from",
                where,
                "Look at how the data are read.",
                {"values": values.size},
                kind="constant",
            )
    yield from _scale(facts)


def _scale(facts: Facts) -> Iterator[Finding]:
    import keras

    forgiving = (
        keras.layers.BatchNormalization,
        keras.layers.Embedding,
        keras.layers.GroupNormalization,
        keras.layers.LayerNormalization,
    )
    trained = [
        c
        for c in facts.first.probe.calls
        if c.layer._trainable_variables and not isinstance(c.layer, forgiving)
    ]
    if not trained or not trained[0].inputs:
        return
    first = trained[0]
    calls = facts.first.probe.calls
    if any(isinstance(c.layer, forgiving) for c in calls[: calls.index(first)]):
        return
    values = as_float(facts.host(first.inputs[0]))
    if not np.isfinite(values).all():
        return
    rms = float(np.sqrt(np.mean(np.square(values))))
    if rms > LARGE:
        yield Finding(
            "inputs",
            "warning",
            f"The first layer with weights is given unscaled numbers: their root mean "
            f"square is {rms:.3g}",
            f"input of layer {first.path!r}",
            "Scale them to about 1: keras.layers.Rescaling(1 / 255) for pictures, "
            "keras.layers.Normalization for numbers.",
            {
                "root_mean_square": rms,
                "smallest": float(values.min()),
                "largest": float(values.max()),
            },
            kind="scale",
        )
