"""A gear that was asked for, and is slower than one that compiles less."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.gear import EAGER

SLOWER = 1.5
"""So many times slower than the plainer gear is no accident."""

LEAST_S = 2e-3
"""A step that is faster than this is fast in any gear."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare it with the first gear that `auto` tries; that one with eager."""
    gear = facts.gear
    if not facts.asked or gear is None or gear == EAGER:
        return
    if facts.first.error is not None:
        return
    mine = facts.pace(gear)
    if mine is None or mine.step_s < LEAST_S:
        return
    plain = facts.backend.gears[0]
    other = facts.pace(EAGER if gear == plain else plain)
    if other is None or mine.step_s < SLOWER * other.step_s:
        return
    name = EAGER.name if gear == plain else plain.name
    yield Finding(
        "compiling",
        "warning",
        f"Compiling does not pay here: a step in gear {gear.name!r} takes "
        f"{mine.step_s / other.step_s:.1f} times as long as in {name!r}",
        f"argument gear={gear.name!r}",
        f"Use gear='auto', or gear={name!r}.",
        {f"{gear.name}_ms": 1e3 * mine.step_s, f"{name}_ms": 1e3 * other.step_s},
    )
