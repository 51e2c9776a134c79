"""Gradients that vanish on their way back, or explode."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

VANISHED = 1e-6
"""The norm of a gradient against the largest one, below which it has vanished."""

EXPLODED = 1e3
"""The norm of a gradient against that of its weight, above which it has exploded."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare the gradients of weights (not of biases) with each other."""
    look = facts.settled.look
    if look is None or look.first_nonfinite is not None:
        return
    weights = {
        u.path: u
        for u in look.updates
        # That of the keys of an attention has no gradient, and two axes.
        if u.before.ndim > 1 and not u.path.endswith("bias")
    }
    norms = {
        g.path: g.stats.norm
        for g in look.gradients
        if g.stats is not None and g.path in weights and g.stats.norm > 0
    }
    if len(norms) < 2:
        return
    largest = max(norms.values())
    vanished = [p for p, n in norms.items() if n < VANISHED * largest]
    if vanished:
        worst = min(vanished, key=lambda p: norms[p])
        yield Finding(
            "gradient_sizes",
            "warning",
            f"The gradients of {len(vanished)} weights have vanished against others",
            worst,
            "Use ReLU-like activations, normalization, residual connections, or an "
            "initializer for this activation.",
            {"norm": norms[worst], "largest_norm": largest},
            kind="vanished",
        )
    exploded = [
        p
        for p, n in norms.items()
        if weights[p].weight_norm and n > EXPLODED * weights[p].weight_norm
    ]
    if exploded:
        worst = max(exploded, key=lambda p: norms[p] / weights[p].weight_norm)
        yield Finding(
            "gradient_sizes",
            "warning",
            f"The gradients of {len(exploded)} weights are far larger than the weights",
            worst,
            "Scale the inputs and the loss, or clip: optimizer(global_clipnorm=1.0).",
            {"norm": norms[worst], "norm_of_weight": weights[worst].weight_norm},
            kind="exploded",
        )
