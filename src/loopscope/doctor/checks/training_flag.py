"""A train step that calls the model as if it were not training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.look.stats import as_float

CHANCE = 1e-6
"""The chance of dropping nothing below which it was no chance."""


def check(facts: Facts) -> Iterator[Finding]:
    """See what Dropout drops and whether BatchNorm learns its statistics."""
    import keras

    look, told = facts.first.look, set()
    for call in facts.first.probe.calls:
        layer = call.layer
        if id(layer) in told:
            continue
        if isinstance(layer, keras.layers.Dropout) and _inert(facts, call):
            told.add(id(layer))
            yield Finding(
                "training_flag",
                "error",
                f"Dropout with rate {layer.rate:g} drops nothing in the train step",
                f"layer {call.path!r}",
                "Call the model with training=True in the train step.",
                {"rate": layer.rate, "values": int(np.prod(call.inputs[0].shape))},
                kind="dropout",
            )
        if look is not None and isinstance(layer, keras.layers.BatchNormalization):
            frozen = not layer.trainable
            if not frozen and layer.moving_mean.path not in look.others:
                told.add(id(layer))
                yield Finding(
                    "training_flag",
                    "error",
                    "The moving statistics of BatchNorm do not move in the train step",
                    f"layer {call.path!r}",
                    "Call the model with training=True in the train step; to freeze "
                    "the layer on purpose set its trainable=False.",
                    {"moved": 0.0},
                    kind="batch_norm",
                )


def _inert(facts: Facts, call: object) -> bool:
    layer, given = call.layer, call.inputs  # type: ignore[attr-defined]
    if not given or not layer.rate:
        return False
    before = as_float(facts.host(given[0]))
    after = as_float(facts.host(call.outputs[0]))  # type: ignore[attr-defined]
    if before.shape != after.shape:
        return False
    chance = (1 - layer.rate) ** np.count_nonzero(before)
    return bool(chance < CHANCE and np.array_equal(before, after))
