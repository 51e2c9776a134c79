"""Memory that grows with every step."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

LEAST = 1024
"""Bytes of a step: a number for each one harms nobody."""

STEPS = 10_000


def check(facts: Facts) -> Iterator[Finding]:
    """Count the bytes of all arrays that are alive, after some steps and some more.

    A compiled step cannot keep arrays: what it holds is in variables.
    """
    if not facts.own or not facts.eager or facts.first.error is not None:
        return
    if facts.growth < LEAST:
        return
    grown = [
        (change.after.line, name)
        for name, change in facts.settled.changed.items()
        if change.after.kind == "container"
        and change.after.length > change.before.length
    ]
    where = "; ".join(f"{line}, {name!r}" for line, name in grown)
    yield Finding(
        "memory",
        "error" if facts.growth * STEPS > 2**30 else "warning",
        f"Each step leaves {facts.growth / 1e3:.3g} kB of arrays behind: "
        f"{facts.growth * STEPS / 1e6:.3g} MB after {STEPS:,} steps",
        where or "arrays that the step makes and something keeps",
        "Keep numbers, not arrays: float(loss); return what is to be seen as a scalar, "
        "or update a metric; or empty the container in each epoch.",
        {"bytes_per_step": facts.growth},
    )
