"""Trainable variables that nothing trains, and optimizers that are applied twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.look.probe import Applied


def check(facts: Facts) -> Iterator[Finding]:
    """Follow each variable from its gradient to its update."""
    seen = facts.settled
    if seen.look is None or not seen.probe.applied:
        return
    yield from _twice(seen.probe.applied)
    yield from _left_out(facts, seen.probe.applied)
    # A last layer of zeros lets nothing through in the first step: a later one counts.
    gradients = seen.look.gradients
    silent = [g.path for g in gradients if g.stats is None or not g.stats.norm]
    if silent:
        yield Finding(
            "variables",
            "error",
            f"No gradient reaches {len(silent)} of {len(gradients)} variables",
            _some(silent),
            "Compute the loss from them with Keras or backend operations: NumPy, "
            "stop_gradient and argmax cut the way. Set trainable=False for those that "
            "are to stay.",
            {"variables": len(silent)},
            kind="silent",
        )
    accumulates = any(
        getattr(a.optimizer, "gradient_accumulation_steps", None)
        for a in seen.probe.applied
    )
    still = [u.path for u in seen.look.updates if not u.norm and u.path not in silent]
    if still and not accumulates:
        yield Finding(
            "variables",
            "error",
            f"{len(still)} variables have a gradient, but the optimizer does not move "
            "them",
            _some(still),
            "Look at the learning rate, and at whether the float type can hold so "
            "small an update.",
            {
                "variables": len(still),
                "learning_rate": float("nan")
                if seen.look.learning_rate is None
                else seen.look.learning_rate,
            },
            kind="still",
        )


def _twice(applied: list[Applied]) -> Iterator[Finding]:
    counts = Counter(
        (id(a.optimizer), id(variable), variable.path)
        for a in applied
        for variable in a.variables
    )
    repeated = [path for (_, _, path), times in counts.items() if times > 1]
    if repeated:
        yield Finding(
            "variables",
            "error",
            "An optimizer is applied twice to the same variables in one step",
            _some(repeated),
            "Apply it once a step, to the gradients of the whole loss.",
            {"variables": len(repeated), "times": max(counts.values())},
            kind="twice",
        )


def _left_out(facts: Facts, applied: list[Applied]) -> Iterator[Finding]:
    given = {id(v) for a in applied for v in a.variables}
    trainable = getattr(facts.model, "trainable_variables", [])
    left = [v.path for v in trainable if id(v) not in given]
    if left and len(left) < len(trainable):
        yield Finding(
            "variables",
            "warning",
            f"The optimizer is not given {len(left)} of the model's {len(trainable)} "
            "trainable variables",
            _some(left),
            "Give it model.trainable_variables, or set trainable=False for those that "
            "are to stay.",
            {"variables": len(left)},
            kind="left_out",
        )


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
