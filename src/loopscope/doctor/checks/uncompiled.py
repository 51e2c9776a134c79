"""A step that was asked to run eagerly, where compiling it pays."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.doctor.measuring import PAYS
from loopscope.gear import EAGER, compiled


def check(facts: Facts) -> Iterator[Finding]:
    """Run the step in the first compiled gear as well."""
    if facts.gear != EAGER or not facts.asked or facts.first.error is not None:
        return
    other = compiled(facts.backend.gears)
    eager, quick = facts.pace(EAGER), facts.pace(other)
    if eager is None or quick is None or eager.step_s < PAYS * quick.step_s:
        return
    saved_s = eager.step_s - quick.step_s
    yield Finding(
        "uncompiled",
        "warning",
        "The step runs eagerly: compiled it would be "
        f"{eager.step_s / quick.step_s:.1f} times as fast",
        "argument gear='eager' (or run_eagerly=True)",
        f"Use gear='auto', or gear={other.name!r}, which was measured; eager is for "
        "debugging.",
        {
            "eager_ms": 1e3 * eager.step_s,
            "compiled_ms": 1e3 * quick.step_s,
            "compile_s": quick.compile_s or 0.0,
            "pays_after_steps": round((quick.compile_s or 0.0) / saved_s),
        },
        kind="asked",
    )
