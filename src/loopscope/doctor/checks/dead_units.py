"""ReLUs that are 0 for every example."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.look.stats import as_float

SHARE = 0.5
"""Of a layer's units that may be dead."""

FEWEST = 16
"""Examples: with fewer a unit may be 0 for all by chance."""

UNITS = 8
"""A layer with fewer units is too small for a share."""


def check(facts: Facts) -> Iterator[Finding]:
    """Count the units that are 0 for a whole batch, after some steps."""
    told = set()
    for call in facts.settled.probe.calls:
        name = getattr(getattr(call.layer, "activation", None), "__name__", "")
        if name != "relu" and type(call.layer).__name__ != "ReLU":
            continue
        values = as_float(facts.host(call.outputs[0]))
        if values.ndim < 2 or values.shape[-1] < UNITS or id(call.layer) in told:
            continue
        by_unit = values.reshape(-1, values.shape[-1])
        if len(values) < FEWEST:
            continue
        dead = float(np.mean((by_unit == 0).all(axis=0)))
        if dead > SHARE:
            told.add(id(call.layer))
            yield Finding(
                "dead_units",
                "warning",
                f"{dead:.0%} of the units are 0 for every example of a batch",
                f"layer {call.path!r}",
                "Lower the learning rate, scale the inputs, or use another activation "
                "(leaky_relu, gelu).",
                {"share": dead, "units": values.shape[-1]},
            )
