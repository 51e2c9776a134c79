"""Gears side by side: what each costs, and how far it is from eager in one step.

Gears are compared in one step from the same state, never by trajectories: what
rounding makes different in one step, a hundred steps make unrecognizable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loopscope.data.feed import Segment
from loopscope.data.source import Source
from loopscope.figures import html, plots
from loopscope.gear import EAGER, GEARS, Gear
from loopscope.runner import Runner

MEASURE_S = 0.5
"""How long a gear is measured, compilation apart."""


@dataclass(frozen=True)
class GearReport:
    """What a gear was measured to do with a loop's train step.

    Attributes:
        gear: Its name.
        available: Whether it runs this step on this backend.
        reason: Why not, or what to know about the difference; else empty.
        compile_seconds: The first call, less one step. Seconds.
        ms_per_step: The best of several chunks. Milliseconds.
        break_even_step: After how many steps compiling has paid against eager;
            `None` if never.
        max_relative_difference: From eager, in one step from the same state: the
            largest over outputs and variables of ‖a - b‖ / ‖a‖.
        chosen: Whether training runs in this gear, or `auto` would take it.
    """

    gear: str
    available: bool
    reason: str = ""
    compile_seconds: float | None = None
    ms_per_step: float | None = None
    break_even_step: int | None = None
    max_relative_difference: float | None = None
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


class Comparison(list[GearReport]):
    """Every gear there is, side by side: a list of reports that can be shown."""

    def as_dicts(self) -> list[dict[str, Any]]:
        """As plain data."""
        return [report.as_dict() for report in self]

    def plot(self) -> Any:
        """Time per step, and from which step on compiling has paid, with plotly.

        Raises:
            ExtraError: plotly is not installed.
        """
        return plots.gears(self.as_dicts())

    def _repr_html_(self) -> str:
        return html.gears(self.as_dicts())


@dataclass(frozen=True)
class Moment:
    """What one step has brought: its outputs, and every variable after it."""

    outputs: Mapping[str, np.ndarray]
    before: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]


def compare(
    runner: Runner,
    source: Source,
    *,
    chosen: Gear | None,
    progress: Callable[[str], None] = lambda gear: None,
) -> Comparison:
    """Every gear there is, measured on a loop's train step. The state stays.

    Args:
        runner: Has the train step, traced on the source's batches.
        source: Gives a sample of its batches, which is not used up.
        chosen: The gear that training runs in.
        progress: Told the name of each gear before it is measured.
    """
    segment = source.sample()
    runner.trace("train", source.specs)
    runner.stages["train"].programs.clear()  # So that each is seen to compile.
    before = runner.state.snapshot()
    reports: dict[str, GearReport] = {}
    try:
        progress(EAGER.name)
        reference = one_step(runner, EAGER, segment)
        slow_s, _ = _time(runner, EAGER, segment)
        reports[EAGER.name] = GearReport(
            EAGER.name,
            available=True,
            compile_seconds=0.0,
            ms_per_step=1e3 * slow_s,
            break_even_step=0,
            max_relative_difference=0.0,
            chosen=chosen == EAGER,
        )
        for gear in runner.backend.gears:
            if gear != EAGER:
                progress(gear.name)
                runner.state.restore(before)
                report = _report(runner, gear, segment, reference, slow_s, chosen)
                reports[gear.name] = report
    finally:
        runner.state.restore(before)
    names = ", ".join(g.name for g in runner.backend.gears)
    missing = f"the {runner.backend.name} backend has: {names}"
    return Comparison(
        reports.get(name) or GearReport(name, available=False, reason=missing)
        for name in GEARS
    )


def one_step(runner: Runner, gear: Gear, segment: Segment) -> Moment:
    """Run a segment's first step in a gear, and undo it."""
    state = runner.state
    values = state.numpy()
    first = Segment(segment.feed, segment.start, segment.start + 1)
    try:
        with state.kept():
            done = runner.run("train", gear, first)
            return Moment(done.outputs, values, state.numpy())
    finally:
        runner.finished = 0


def difference(one: Moment, other: Moment) -> float:
    """The largest relative difference over outputs and variables.

    For each of them ‖a - b‖ / ‖a‖. A norm over the whole array, since the first step
    of an adaptive optimizer divides each gradient by its own size: an element whose
    gradient is nothing but rounding moves as far as any other.
    """
    pairs = [(one.outputs[name], other.outputs[name]) for name in one.outputs]
    pairs += [(one.after[path], other.after[path]) for path in one.after]
    return max((relative(a, b) for a, b in pairs), default=0.0)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """‖a - b‖ / ‖a‖ in the Euclidean norm and float64; `inf` where only a is zero."""
    if a.dtype.kind not in "fiub":  # bfloat16 and its like
        a, b = a.astype("float32"), b.astype("float32")
    if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    wide_a, wide_b = a.astype("float64"), b.astype("float64")
    scale = float(np.linalg.norm(wide_a))
    distance = float(np.linalg.norm(wide_a - wide_b))
    return distance / scale if scale else float("inf")


def _report(
    runner: Runner,
    gear: Gear,
    segment: Segment,
    reference: Moment,
    slow_s: float,
    chosen: Gear | None,
) -> GearReport:
    try:
        began = time.perf_counter()
        moment = one_step(runner, gear, segment)
        first_s = time.perf_counter() - began
        step_s, _ = _time(runner, gear, segment)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return GearReport(gear.name, available=False, reason=reason)
    compile_s = max(0.0, first_s - step_s)
    paid = compile_s / (slow_s - step_s) if step_s < slow_s else None
    return GearReport(
        gear.name,
        available=True,
        reason=_note(runner, gear, reference),
        compile_seconds=compile_s,
        ms_per_step=1e3 * step_s,
        break_even_step=None if paid is None else int(np.ceil(paid)),
        max_relative_difference=difference(reference, moment),
        chosen=gear == chosen,
    )


def _note(runner: Runner, gear: Gear, reference: Moment) -> str:
    backend = runner.backend
    if backend.random_stream(gear) == backend.random_stream(EAGER):
        return ""
    draws = any(
        "seed_generator" in path
        and not np.array_equal(reference.before[path], reference.after[path])
        for path in reference.before
    )
    return (
        "draws other random numbers than eager (the framework's own doing), so the "
        "difference is not rounding"
        if draws
        else ""
    )


def _time(runner: Runner, gear: Gear, segment: Segment) -> tuple[float, int]:
    """Seconds per step, the best of several chunks; and the steps run."""
    best_s, spent, total, steps = float("inf"), 0.0, 0, 1
    while spent < MEASURE_S:
        part = Segment(segment.feed, segment.start, segment.start + steps)
        done = runner.run("train", gear, part)
        run = steps - len(done.compiled)
        if run:
            best_s = min(best_s, done.wall_s / run)
        spent += done.wall_s + sum(c.wall_s for c in done.compiled)
        total += steps
        steps = min(segment.steps, steps * 4)
        if total >= 3 and spent > MEASURE_S:
            break
    runner.finished = 0
    return best_s, total


def first_step_difference(runner: Runner, source: Source, gear: Gear) -> float:
    """How far `gear` is from eager in one step from the state of now."""
    segment = source.sample()
    eager = one_step(runner, EAGER, segment)
    return difference(eager, one_step(runner, gear, segment))
