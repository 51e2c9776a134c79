"""The short story of a step: what carried its loss, and what was done with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from loopscope.look.alternatives import Alternative
from loopscope.look.opened import OpenedStep

CARRY = 0.5
"""Examples are named until they make up this share of the loss."""

NAMED = 8
"""At most so many of them, and so many layers."""

JUMP = 3.0
"""A norm has jumped that is so many times the usual one."""

SPIKE = 1.5
"""A loss stands out that is so many times the usual one."""


@dataclass(frozen=True)
class Carrier:
    """An example and its part in the loss.

    Attributes:
        position: In the batch.
        example: Its row in the arrays given to `fit`; `None` without such.
        label: What it should be.
        predicted: What it was taken for.
        loss: Its loss.
        share: Of the loss of the whole batch, 0 to 1; `None` where that is not finite.
    """

    position: int
    example: int | None
    label: Any
    predicted: Any
    loss: float
    share: float | None


@dataclass(frozen=True)
class Jump:
    """A variable whose gradient or update is another than it usually is.

    Attributes:
        path: Of the variable.
        norm: At this step.
        usual: The median of the earlier steps that were looked into.
        times: `norm / usual`.
    """

    path: str
    norm: float
    usual: float
    times: float


@dataclass(frozen=True, eq=False)
class Why:
    """Why a step's loss is what it is, as far as it can be measured.

    Attributes:
        step: Its global number.
        loss: Its loss, as recorded.
        usual_loss: The median of the recorded losses of up to 50 steps before it.
        history: The earlier steps that were looked into.
        examples: Those that carry the loss, the largest part first.
        gradients: Those that have jumped, the largest jump first.
        updates: Likewise; a gradient that the optimizer tamed is not among them.
        earlier: Had the step before it been run otherwise: this step's loss.
        later: Had this step been run otherwise: the loss of the step after it.
        look: The step, opened up.
    """

    step: int
    loss: float | None
    usual_loss: float | None
    history: Sequence[int]
    examples: Sequence[Carrier]
    gradients: Sequence[Jump]
    updates: Sequence[Jump]
    earlier: Sequence[Alternative]
    later: Sequence[Alternative]
    look: OpenedStep

    def __str__(self) -> str:
        return "\n".join(self.story())

    def story(self) -> list[str]:
        """In sentences."""
        return list(_story(self))

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the opened step."""
        first = self.look.first_nonfinite
        return {
            "step": self.step,
            "loss": self.loss,
            "usual_loss": self.usual_loss,
            "history": list(self.history),
            "examples": [asdict(e) for e in self.examples],
            "gradients": [asdict(j) for j in self.gradients],
            "updates": [asdict(j) for j in self.updates],
            "size": _size(self.look),
            "earlier": [a.as_dict() for a in self.earlier],
            "later": [a.as_dict() for a in self.later],
            "first_nonfinite": None if first is None else first.as_dict(),
            "limits": {"jump": JUMP, "spike": SPIKE, "named": NAMED},
            "story": self.story(),
        }


def why(
    look: OpenedStep,
    history: Mapping[int, OpenedStep],
    *,
    losses: np.ndarray,
    loss: float | None,
    earlier: Sequence[Alternative],
    later: Sequence[Alternative],
) -> Why:
    """Tell the story of a step.

    Args:
        look: The step.
        history: Earlier steps of the same run, by number.
        losses: Recorded losses of the steps before it.
        loss: The recorded loss of the step.
        earlier: Of the step before it.
        later: Of the step itself.
    """
    finite = losses[np.isfinite(losses)]
    return Why(
        step=look.step,
        loss=loss,
        usual_loss=float(np.median(finite)) if finite.size else None,
        history=sorted(history),
        examples=carriers(look),
        gradients=_jumps(_gradient_norms(look), map(_gradient_norms, history.values())),
        updates=_jumps(_update_norms(look), map(_update_norms, history.values())),
        earlier=earlier,
        later=later,
        look=look,
    )


def usual_gradient_norm(history: Iterable[OpenedStep]) -> float | None:
    """The median of the global gradient norms of some steps, if it is one."""
    norms = [
        float(np.sqrt(sum(n * n for n in _gradient_norms(step).values())))
        for step in history
    ]
    finite = [n for n in norms if np.isfinite(n) and n > 0]
    return median(finite) if finite else None


def carriers(look: OpenedStep) -> list[Carrier]:
    """The examples that carry a loss, or those where it is not finite."""
    loss, order = look.loss_per_example, look.worst
    if loss is None or order is None:
        return []
    total = float(np.abs(loss).sum())
    finite = np.isfinite(total) and total > 0
    found, carried = [], 0.0
    for i in order[:NAMED].tolist():
        share = abs(float(loss[i])) / total if finite else None
        if (finite and carried >= CARRY) or (not finite and np.isfinite(loss[i])):
            break
        found.append(
            Carrier(
                i,
                None if look.examples is None else int(look.examples[i]),
                look.label(i),
                look.predicted(i),
                float(loss[i]),
                share,
            )
        )
        carried += share or 0.0
    return found


def _gradient_norms(step: OpenedStep) -> dict[str, float]:
    return {g.path: g.stats.norm for g in step.gradients if g.stats is not None}


def _update_norms(step: OpenedStep) -> dict[str, float]:
    return {u.path: u.norm for u in step.updates}


def _jumps(now: Mapping[str, float], before: Any) -> list[Jump]:
    earlier: dict[str, list[float]] = {}
    for norms in before:
        for path, norm in norms.items():
            if np.isfinite(norm):
                earlier.setdefault(path, []).append(norm)
    found = []
    for path, norm in now.items():
        usual = median(earlier[path]) if path in earlier else 0.0
        times = norm / usual if usual > 0 else float("nan")
        if times >= JUMP or (usual > 0 and not np.isfinite(norm)):
            found.append(Jump(path, norm, usual, times))
    return sorted(found, key=lambda j: -j.times if np.isfinite(j.times) else -np.inf)


def _story(why: Why) -> Iterator[str]:
    yield _of_the_loss(why)
    if why.look.first_nonfinite is not None:
        yield f"Not finite: it begins with {why.look.first_nonfinite}."
    yield from _of_the_examples(why)
    yield from _of_the_gradients(why)
    if why.earlier:
        yield "This loss, had the step before been another:" + _had(why.earlier)
    if why.later:
        yield "The loss of the next step, had this one been another:" + _had(why.later)


def _of_the_loss(why: Why) -> str:
    if why.loss is None:
        return f"Step {why.step} has recorded no loss."
    line = f"Step {why.step} has a loss of {why.loss:.6g}"
    if why.usual_loss is None or not why.usual_loss > 0:
        return line + "."
    times = why.loss / why.usual_loss
    stands_out = "" if times >= SPIKE or not np.isfinite(times) else ": no spike"
    return f"{line}, {times:.2g} times the usual {why.usual_loss:.6g}{stands_out}."


def _of_the_examples(why: Why) -> Iterator[str]:
    examples, size = why.examples, _size(why.look)
    if not examples:
        return
    shares = [e.share for e in examples if e.share is not None]
    if shares:
        even = len(examples) / size
        yield (
            f"{len(examples)} of its {size} examples carry {sum(shares):.0%} of the "
            f"loss ({even:.0%} if all were alike):"
        )
    else:
        yield "Examples whose loss is not finite:"
    for e in examples:
        row = f"row {e.example}" if e.example is not None else f"position {e.position}"
        words = [f"loss {e.loss:.4g}"]
        words += [] if e.label is None else [f"label {e.label}"]
        words += [] if e.predicted is None else [f"taken for {e.predicted}"]
        yield f"  {row}: {', '.join(words)}"


def _of_the_gradients(why: Why) -> Iterator[str]:
    seen = f"the usual ({len(why.history)} earlier steps looked into)"
    if not why.history:
        return
    if not why.gradients:
        yield f"No gradient is {JUMP:.0f} times {seen} or more."
        return
    yield f"Gradients that have jumped, against {seen}:"
    tamed = {j.path for j in why.gradients} - {j.path for j in why.updates}
    for j in why.gradients[:NAMED]:
        after = "; the optimizer has kept its update usual" if j.path in tamed else ""
        yield f"  {j.path}: norm {j.norm:.4g}, {j.times:.3g} times{after}"


def _had(found: Sequence[Alternative]) -> str:
    return "".join(
        f"\n  {'none' if a.loss is None else format(a.loss, '.6g')} {a.change}"
        for a in found
    )


def _size(look: OpenedStep) -> int:
    return 0 if look.loss_per_example is None else len(look.loss_per_example)
