"""A gear that was asked for, and is slower than one that compiles less."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.gear import EAGER, Gear

SLOWER = 1.5
"""So many times slower than the plainer gear is no accident."""

LEAST_S = 5e-3
"""A step that is faster than this is fast enough in any gear."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare a gear that compiles by XLA with the first one that `auto` tries.

    That one, where it does so itself, is compared with eager.
    """
    gear = facts.gear
    if gear is None or not gear.jit_compile or not facts.asked:
        return
    if facts.first.error is not None:
        return
    plain = facts.backend.gears[0]
    other = EAGER if gear == plain else plain
    slow_s = _step_s(facts, gear)
    if not LEAST_S <= slow_s < float("inf"):  # Or it cannot run at all.
        return
    if slow_s < SLOWER * _step_s(facts, other):
        return
    # Once more: something else may have kept the machine busy.
    slow_s = min(slow_s, _step_s(facts, gear, anew=True))
    quick_s = _step_s(facts, other, anew=True)
    if slow_s < LEAST_S or slow_s < SLOWER * quick_s:
        return
    yield Finding(
        "compiling",
        "warning",
        f"Compiling does not pay here: a step in gear {gear.name!r} takes "
        f"{slow_s / quick_s:.1f} times as long as in {other.name!r}",
        f"argument gear={gear.name!r}",
        f"Use gear='auto', or gear={other.name!r}.",
        {f"{gear.name}_ms": 1e3 * slow_s, f"{other.name}_ms": 1e3 * quick_s},
    )


def _step_s(facts: Facts, gear: Gear, *, anew: bool = False) -> float:
    pace = facts.pace(gear, anew=anew)
    return float("inf") if pace is None else pace.step_s
