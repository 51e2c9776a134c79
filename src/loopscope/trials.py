"""Short trainings that answer one question; everything is set back after them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from loopscope.data.feed import Segment
from loopscope.errors import UsageError
from loopscope.gear import Gear
from loopscope.runner import Runner
from loopscope.step import loss_of

DIVERGED = 4.0
"""A sweep of learning rates ends at so many times the smallest loss so far."""

SMOOTHING = 0.9
"""Of the mean over past losses that a sweep looks at."""

LEARNT = 0.1
"""Of the first loss: what is left of it when a batch has been learnt by heart."""


@dataclass(frozen=True, eq=False)
class LearningRates:
    """What a sweep over learning rates has shown.

    Attributes:
        rates: Of shape `(steps,)`, growing.
        losses: Of each step, of the same shape.
        smoothed: Their moving means.
        suggestion: The rate at which the loss falls fastest; `None` if it never does.
    """

    rates: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    smoothed: np.ndarray = field(repr=False)
    suggestion: float | None

    def _repr_html_(self) -> str:
        return curve(self.rates, self.smoothed, self.suggestion)


@dataclass(frozen=True, eq=False)
class Overfitted:
    """Whether a loop has learnt some batches by heart.

    Attributes:
        losses: Of each step, of shape `(steps,)`.
        learnt: Whether the last loss is less than a tenth of the first.
    """

    losses: np.ndarray = field(repr=False)
    learnt: bool

    def __str__(self) -> str:
        """In one sentence."""
        first, last = float(self.losses[0]), float(self.losses[-1])
        verdict = "learnt by heart" if self.learnt else "NOT learnt: the loop is broken"
        return f"loss {first:.6g} -> {last:.6g} in {len(self.losses)} steps: {verdict}"


def find_lr(
    runner: Runner,
    segment: Segment,
    gear: Gear,
    *,
    start: float,
    end: float,
    steps: int,
) -> LearningRates:
    """Train with a learning rate that grows from step to step. The state stays.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017; the
    suggestion, the steepest fall of the smoothed loss, is that of common practice.

    Raises:
        UsageError: The rates are no range, or the optimizer has a schedule.
    """
    if not 0 < start < end or steps < 2:
        raise UsageError(
            "Expected 0 < start < end and at least 2 steps. Received: "
            f"start={start}, end={end}, steps={steps}"
        )
    optimizer = getattr(runner.model, "optimizer", None)
    rates = np.geomspace(start, end, steps)
    losses, smoothed, mean, least = [], [], 0.0, float("inf")
    with runner.state.kept():
        for i, part in enumerate(_steps(segment, steps)):
            try:
                optimizer.learning_rate = float(rates[i])  # type: ignore[union-attr]
            except (AttributeError, TypeError, ValueError) as error:
                raise UsageError(
                    "Expected a compiled model whose optimizer has a number for its "
                    f"learning rate. Received: optimizer={optimizer!r}"
                ) from error
            loss = _loss(runner, gear, part)
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            losses.append(loss)
            smoothed.append(mean / (1 - SMOOTHING ** (i + 1)))
            least = min(least, smoothed[-1])
            if not np.isfinite(loss) or smoothed[-1] > DIVERGED * least:
                break
    found = np.asarray(smoothed)
    return LearningRates(
        rates[: len(losses)], np.asarray(losses), found, _steepest(rates, found)
    )


def overfit(
    runner: Runner, segment: Segment, gear: Gear, *, batches: int, steps: int
) -> Overfitted:
    """Train on the same few batches again and again. The state stays."""
    losses: list[float] = []
    with runner.state.kept():
        few = list(_steps(segment, batches))
        for i in range(steps):
            losses.append(_loss(runner, gear, few[i % len(few)]))
            done = losses[-len(few) :]
            if i >= len(few) and max(done) < LEARNT * losses[0] / 10:
                break
    last = float(np.mean(losses[-len(few) :]))
    first = float(np.mean(losses[: len(few)]))
    return Overfitted(np.asarray(losses), bool(last < LEARNT * first))


def _steps(segment: Segment, count: int) -> Iterator[Segment]:
    """So many single steps; those of a segment over again, where it has fewer."""
    for i in range(count):
        at = segment.start + i % segment.steps
        yield Segment(segment.feed, at, at + 1)


def _loss(runner: Runner, gear: Gear, part: Segment) -> float:
    done = runner.run("train", gear, part)
    runner.finished = 0
    loss = loss_of(done.outputs)
    assert loss is not None  # A train step without outputs is refused.
    return float(loss[0])


def _steepest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """Between the first rates, whose losses are noise, and the smallest loss."""
    usable = losses[np.isfinite(losses)]
    first, last = len(usable) // 10, int(usable.argmin()) if len(usable) else 0
    if last - first < 2:
        return None
    slope = np.gradient(usable, np.log(rates[: len(usable)]))[first : last + 1]
    at = int(slope.argmin())
    return float(rates[first + at]) if slope[at] < 0 else None


def curve(x: np.ndarray, y: np.ndarray, mark: float | None = None) -> str:
    """A line over a logarithmic axis as SVG, for a notebook."""
    width, height, edge = 480, 240, 40
    keep = np.isfinite(y)
    if keep.sum() < 2:
        return "<p>no curve</p>"
    across, up = np.log10(x[keep]), y[keep]
    span = (across[-1] - across[0]) or 1.0
    rise = (up.max() - up.min()) or 1.0

    def place(value: float) -> float:
        return float(edge + (value - across[0]) / span * (width - 2 * edge))

    heights = height - edge - (up - up.min()) / rise * (height - 2 * edge)
    points = " ".join(
        f"{place(a):.1f},{b:.1f}" for a, b in zip(across, heights, strict=True)
    )
    line = ""
    if mark is not None:
        at = place(float(np.log10(mark)))
        line = (
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{edge}" y2="{height - edge}" '
            f'stroke="#c60"/><text x="{at:.1f}" y="{edge - 8}">{mark:.2g}</text>'
        )
    labels = (
        f'<text x="{edge}" y="{height - 12}">{x[keep][0]:.0e}</text>'
        f'<text x="{width - 2 * edge}" y="{height - 12}">{x[keep][-1]:.0e}</text>'
        f'<text x="2" y="{edge}">{up.max():.3g}</text>'
        f'<text x="2" y="{height - edge}">{up.min():.3g}</text>'
    )
    return (
        f'<svg width="{width}" height="{height}" font-size="11" fill="currentColor">'
        f'<polyline points="{points}" fill="none" stroke="#48a"/>{line}{labels}</svg>'
    )


__all__ = ["LearningRates", "Overfitted", "find_lr", "overfit"]
