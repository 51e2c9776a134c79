"""How long a training will take, gear by gear, before it begins.

Measured as `auto` measures (`choose.py`), and undone as its trials are.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loopscope.choose import Trial, break_even, choose, in_words, measure
from loopscope.data.source import Source
from loopscope.errors import GearError
from loopscope.figures import html
from loopscope.gear import GEARS, Gear, resolve
from loopscope.runner import Runner


@dataclass(frozen=True)
class GearEstimate:
    """What a training would take in one gear.

    Attributes:
        gear: Its name.
        step_s: Seconds a step.
        compile_s: Seconds of compiling, for every batch size there is.
        total_s: Seconds of the whole training, compiling and validation included;
            `None` where the number of steps is not known.
        break_even_steps: After how many steps it is ahead of the surest gear measured;
            0 for that one, `None` if never.
    """

    gear: str
    step_s: float
    compile_s: float
    total_s: float | None
    break_even_steps: int | None


@dataclass(frozen=True)
class Estimate:
    """What a training would take, measured on a few of its steps.

    Attributes:
        steps: Train steps in all; `None` where the data do not say.
        epochs: Passes over the data.
        gears: Those that were measured, the surest first.
        chosen: The name of the gear that training would run in.
        reason: Why that one, in a line.
        validation_s: Seconds of all validation; `None` where there is none, or the
            data do not say how many steps.
        wall_s: Seconds that measuring has taken.
    """

    steps: int | None
    epochs: int
    gears: tuple[GearEstimate, ...]
    chosen: str
    reason: str
    validation_s: float | None
    wall_s: float

    @property
    def total_s(self) -> float | None:
        """Seconds of the whole training in the gear that it would run in."""
        return next((g.total_s for g in self.gears if g.gear == self.chosen), None)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "total_s": self.total_s}

    def _repr_html_(self) -> str:
        return html.estimate(self._line(), self._table(), self.reason, self.chosen)

    def __str__(self) -> str:
        """A line and a table."""
        if not self.gears:
            return f"{self._line()}\n{self.reason}"
        rows = [
            (f"{gear} *" if gear == self.chosen else gear, *cells)
            for gear, *cells in self._table()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = (
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        return "\n".join([self._line(), *table])

    def _line(self) -> str:
        steps = "an unknown number of" if self.steps is None else f"{self.steps:,}"
        line = f"{steps} steps in {_counted(self.epochs, 'epoch')}"
        if self.total_s is not None:
            line += f": about {in_words(self.total_s)} in {self.chosen}"
        if self.validation_s is not None:
            line += f", {in_words(self.validation_s)} of it validation"
        return line

    def _table(self) -> list[tuple[str, ...]]:
        """What was measured of each gear, below the heads of the columns."""
        if not self.gears:
            return []
        surest = self.gears[0].gear
        head = ("gear", "compile s", "ms/step", "in all", f"ahead of {surest} after")
        return [head, *(self._row(g, first=g.gear == surest) for g in self.gears)]

    def _row(self, found: GearEstimate, *, first: bool) -> tuple[str, ...]:
        paid = found.break_even_steps
        after = "never" if paid is None else _counted(paid, "step")
        return (
            found.gear,
            f"{found.compile_s:.2f}",
            f"{1e3 * found.step_s:.3f}",
            "" if found.total_s is None else in_words(found.total_s),
            "" if first else after,
        )


def estimate(
    runner: Runner,
    source: Source,
    validation: Source | None,
    *,
    epochs: int,
    gear: Gear | None,
    test_gear: Gear | None,
    gears: Collection[str] | None,
    cache: bool,
) -> Estimate:
    """What training on a source would take. The state stays.

    Args:
        runner: Has the train step, traced on the source's batches, and the test step
            if there are validation data.
        source: Gives a sample of its batches, which is not used up.
        validation: As `source`, for the test step after each epoch.
        epochs: Passes.
        gear: That training would run in; `None` for that which `auto` would take.
        test_gear: That the test step would run in; as `gear`.
        gears: The names of those to measure; otherwise `gear` and the surest one, or
            those that `auto` tries.
        cache: Whether `auto` may use what was measured before.

    Raises:
        GearError: The backend has no such gear.
    """
    began = time.perf_counter()
    steps = None if source.steps is None else source.steps * epochs
    copies = 2 if source.ragged else 1
    if gear is None and gears is None:
        choice = choose(runner, source, steps=steps, cache=cache)
        trials, chosen, reason = choice.trials, choice.train.name, choice.reason
        test_gear = choice.test
    else:
        trials = _measured(runner, source, _listed(runner, gear, gears))
        best = min(trials, key=lambda n: trials[n].total_s(steps or 1, copies))
        chosen = best if gear is None else gear.name
        reason = "the quickest of those measured" if gear is None else "asked for"
    validation_s = None
    if validation is not None and validation.steps is not None:
        runs_in = test_gear or GEARS[chosen]
        with runner.state.kept():
            trial = measure(runner, runs_in, validation.sample(), phase="test")
        validation_s = trial.total_s(validation.steps * epochs, 1)
    return Estimate(
        steps=steps,
        epochs=epochs,
        gears=_side_by_side(trials, steps, copies, validation_s or 0.0),
        chosen=chosen,
        reason=reason,
        validation_s=validation_s,
        wall_s=time.perf_counter() - began,
    )


def _listed(
    runner: Runner, gear: Gear | None, names: Collection[str] | None
) -> list[Gear]:
    """The gears to measure, in the order of the backend; eager defines the others."""
    backend = runner.backend
    wanted = {backend.gears[0], gear} if names is None else {gear}
    for name in names or ():
        found = resolve(
            name,
            backend.gears,
            backend=backend.name,
            lacking=backend.lacking,
        )
        if found is None:
            raise GearError("Expected the names of gears. Received: gears=['auto']")
        wanted.add(found)
    known = [g for g in backend.gears if g in wanted]
    return sorted(known, key=lambda g: not g.run_eagerly)


def _measured(
    runner: Runner, source: Source, gears: Collection[Gear]
) -> dict[str, Trial]:
    segment, stage = source.sample(), runner.stages["train"]
    trials = {}
    with runner.state.kept():
        for gear in gears:
            # So that it is seen to compile; what is made now is kept for training.
            stage.programs = {
                k: p for k, p in stage.programs.items() if k[0] != gear.name
            }
            trials[gear.name] = measure(runner, gear, segment)
    return trials


def _side_by_side(
    trials: Mapping[str, Trial], steps: int | None, copies: int, validation_s: float
) -> tuple[GearEstimate, ...]:
    surest = next(iter(trials.values()), None)
    return tuple(
        GearEstimate(
            name,
            trial.step_s,
            trial.compile_s * copies,
            None if steps is None else trial.total_s(steps, copies) + validation_s,
            break_even(trial, surest, copies) if surest is not None else None,
        )
        for name, trial in trials.items()
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


__all__ = ["Estimate", "GearEstimate", "estimate"]
