"""Losses that layers add, and that the train step leaves out."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

LEAST = 1e-5
"""The share of the loss that is worth a word."""

SAME = 1e-6
"""Relative difference below which two losses are the same."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare the loss with the losses of its data alone."""
    look = facts.first.look
    if not facts.own or look is None or look.loss is None:
        return
    added = look.losses.get("regularization", 0.0)
    data = sum(v for name, v in look.losses.items() if name != "regularization")
    if look.loss_per_example is None or abs(added) <= LEAST * abs(data):
        return
    if abs(look.loss - data) <= SAME * abs(data) < abs(added):
        yield Finding(
            "regularization",
            "error",
            "The layers add losses (regularizers, add_loss) that the train step leaves "
            "out",
            "the loss of the train step",
            "Add sum(model.losses) to the loss, or use model.compute_loss.",
            {"added_by_layers": added, "loss": look.loss},
        )
