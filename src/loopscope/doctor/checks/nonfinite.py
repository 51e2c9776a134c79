"""NaN or infinity in a step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.look.opened import OpenedStep


def check(facts: Facts) -> Iterator[Finding]:
    """Look at gradients and weights as well: a ReLU can hide a NaN from the loss."""
    for number, look in enumerate(facts.looks):
        first = look.first_nonfinite
        if first is None or _skipped(facts, look):
            continue
        when = facts.moments[number]
        yield Finding(
            "nonfinite",
            "error",
            f"Numbers stop being finite in {when}, in the {first.what} {first.name}",
            str(first),
            "Look at the inputs of that operation: a logarithm or root of what is not "
            "positive, a division by 0, an overflow; or lower the learning rate.",
            {"loss": float("nan") if look.loss is None else look.loss},
        )
        return


def _skipped(facts: Facts, look: OpenedStep) -> bool:
    """Whether loss scaling has found a gradient too large, and skipped the step."""
    kept = all(np.isfinite(u.norm) for u in look.updates)
    finite = look.loss is not None and bool(np.isfinite(look.loss))
    return facts.scales_loss and kept and finite
