"""What a step does in Python, and does only once when it is compiled."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.doctor.rebound import rebound
from loopscope.doctor.surroundings import Change, prints


def check(facts: Facts) -> Iterator[Finding]:
    """See what changes in Python in each eager step, and in no compiled one."""
    first, later = facts.first, facts.settled
    if facts.own and not facts.eager and first.look is not None:
        yield from _read_once(facts)
    # What changes in one step only is a cache that was filled.
    if not facts.own or facts.eager or first is later or later.look is None:
        return
    changed = {n: c for n, c in later.changed.items() if n in first.changed}
    # A text that is always the same is there to show when the step is traced.
    step = facts.runner.stages["train"].step
    told = bool(first.printed) and first.printed != later.printed
    line = prints(step) if told else ""
    if not changed and not line:
        return
    compiled = facts.compiled
    for name, change in changed.items():
        if name not in compiled.changed:
            yield _frozen(name, change)
    if line and not compiled.printed:
        yield Finding(
            "side_effects",
            "warning",
            "The step prints numbers: compiled, it prints once, while it is traced",
            line,
            "Return what is to be seen, by name, in a dict of scalars; or print in the "
            "outer loop, or run in gear='eager'.",
            {"eager_steps_that_print": 2, "compiled_steps_that_print": 0},
            kind="prints",
        )


def _read_once(facts: Facts) -> Iterator[Finding]:
    for number in rebound(facts.runner.stages["train"].step):
        yield Finding(
            "side_effects",
            "error",
            f"The step reads the number {number.name!r}, which the outer loop changes: "
            "compiled, it keeps the value that it had when the step was traced",
            f"{number.read}, changed at {number.changed}",
            "Make it a keras.Variable, and assign it in the outer loop; the learning "
            "rate is one: optimizer.learning_rate = ...",
            {"value": number.value},
            kind="read_once",
        )


def _frozen(name: str, change: Change) -> Finding:
    held = change.after
    if held.kind == "random":
        message = f"The step draws random numbers from {name}: compiled, it draws them"
        mend = "Use keras.random with a keras.random.SeedGenerator."
    else:
        message = f"The step changes {name!r} in Python: compiled, it is changed"
        mend = (
            "Make it a keras.Variable and assign it, or change it in the outer loop; "
            "the number of the step is optimizer.iterations."
        )
    number = held.kind == "number"
    return Finding(
        "side_effects",
        "warning",
        f"{message} once, while the step is traced, and never again",
        f"{held.line}, {name}",
        mend,
        {
            **({"before": change.before.value, "after": held.value} if number else {}),
            "eager_steps_that_change_it": 2,
            "compiled_steps_that_change_it": 0,
        },
        kind="random" if held.kind == "random" else "changed",
    )
