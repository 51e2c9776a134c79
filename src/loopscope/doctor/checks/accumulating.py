"""Gradients that add up from step to step, and are applied in each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.errors import TraceError
from loopscope.look.opened import OpenedStep
from loopscope.look.stats import norm

ROUNDING = 1e-4
"""Of a sum of two gradients: what may differ."""


def check(facts: Facts) -> Iterator[Finding]:
    """Look for variables that a step applies as gradients, and see what they keep.

    Those that keep a part of what they held, as momentum does, are meant to.
    """
    first, later = facts.first.look, facts.settled.look
    if facts.own:
        yield from _left(facts)
    if not facts.own or first is None or later is None or first is later:
        return
    applied = _applied(first)
    found = [path for path in _applied(later) if path in applied]
    adding = _adding(facts, found) if found else []
    if not adding:
        return
    change = later.others[adding[0]]
    yield Finding(
        "accumulating",
        "error",
        f"Gradients add up in {len(adding)} variables, which every step applies and "
        "none sets to 0",
        ", ".join(adding[:4]) + (", ..." if len(adding) > 4 else ""),
        "Assign 0 to them after they were applied; or leave it to Keras: "
        "Adam(..., gradient_accumulation_steps=n).",
        {
            "norm_before": norm(change.before),
            "norm_after": norm(change.after),
            "kept_of_what_it_held": 1.0,
        },
        kind="assigned",
    )


def _left(facts: Facts) -> Iterator[Finding]:
    """What PyTorch's `backward()` has left, and the next one adds to."""
    left = [
        str(variable.path)
        for variable in facts.model.trainable_variables
        if getattr(variable.value, "grad", None) is not None
    ]
    if not left:
        return
    try:
        facts.runner.trace("train", facts.source.specs)
    except TraceError as error:
        if error.accumulates:
            yield Finding(
                "accumulating",
                "error",
                "`backward()` adds to the gradients of the step before, in "
                f"{len(left)} variables",
                ", ".join(left[:4]) + (", ..." if len(left) > 4 else ""),
                "Call `model.zero_grad()` in the step, before `loss.backward()`.",
                {"variables": len(left)},
                kind="backward",
            )


def _applied(look: OpenedStep) -> list[str]:
    """Variables that hold after the step what the optimizer got as a gradient."""
    gradients = [g.values for g in look.gradients if g.values is not None]
    return [
        path
        for path, change in look.others.items()
        if any(_same(change.after, gradient) for gradient in gradients)
    ]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.any(a)) and np.array_equal(a, b)


def _adding(facts: Facts, paths: list[str]) -> list[str]:
    """Those in which a step leaves what it adds plus all that was there before."""
    shapes = {p: tuple(v.shape) for p, v in facts.runner.state if p in paths}
    none, one = (
        facts.after_a_step({p: np.full(s, held) for p, s in shapes.items()})
        for held in (0.0, 1.0)
    )
    return [
        path
        for path in paths
        if np.all(np.abs(one[path] - none[path] - 1) < ROUNDING * (1 + abs(none[path])))
    ]
