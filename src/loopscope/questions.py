"""What can be asked of a loop: how fast it is, how long it takes, what a step does.

None of it trains: each question is answered on the loop's own step and state, which
are set back. `Loop` takes these functions in as its methods.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopscope import checks, keras_methods, showing, trials
from loopscope import compare as comparing
from loopscope import estimate as estimating
from loopscope.checks import build, build_quietly
from loopscope.data.feed import Segment
from loopscope.data.source import Source, is_arrays
from loopscope.doctor import examine as examining
from loopscope.doctor.facts import Facts
from loopscope.errors import DataError, UsageError
from loopscope.events import Phase
from loopscope.gear import Gear
from loopscope.look.alternatives import Alternative, alternatives
from loopscope.look.opened import OpenedStep
from loopscope.look.opening import open_step
from loopscope.showing import Line, listing
from loopscope.step import ModelStep

if TYPE_CHECKING:
    from loopscope.loop import Loop


@dataclass(frozen=True)
class Ahead:
    """Steps that are about to run: their data, and where these are from."""

    segment: Segment
    source: Source
    epoch: int
    index: int
    fetch_s: float


def compare(
    self: Loop,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    progress: Callable[[str], None] = lambda gear: None,
) -> comparing.Comparison:
    """Measure every gear on this loop's train step. The loop stays as it is.

    Costs about a second a gear, and compiling it (seconds; a fused loop of
    convolutions under XLA can take minutes).

    Args:
        x: Data as in `fit`.
        y: Data as in `fit`.
        sample_weight: Data as in `fit`.
        batch_size: Examples of a step, for arrays.
        progress: Told the name of each gear before it is measured.

    Returns:
        A list with a `GearReport` for every gear there is, those that the backend
        lacks included. A notebook shows it as a table, `plot()` as a figure.
    """
    source = self.source(x, y, sample_weight, batch_size=batch_size)
    chosen = self.prepare("train", source)
    return comparing.compare(self._runner, source, chosen=chosen, progress=progress)


def estimate(
    self: Loop,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    epochs: int = 1,
    validation_data: Any = None,
    steps_per_epoch: int | None = None,
    gears: Collection[str] | None = None,
) -> estimating.Estimate:
    """How long a training would take, and from where on a gear pays.

    Measures some steps as `auto` does, and sets everything back: about a second,
    and compiling. What it has compiled, and what `auto` remembers, is there for
    the training that follows.

    Example:
        ```python
        print(loop.estimate(x_train, y_train, batch_size=64, epochs=5))
        ```

    Args:
        x: Data as in `fit`.
        y: Data as in `fit`.
        sample_weight: Data as in `fit`.
        batch_size: Examples of a step, for arrays.
        epochs: Passes.
        validation_data: As in `fit`.
        steps_per_epoch: As in `fit`.
        gears: The names of gears to measure, `"eager"` among them where compiling
            as such is the question. If not given, those that `auto` would try; for
            a loop whose gear is known, that one and the surest.

    Returns:
        Seconds by gear, and the number of steps after which each is ahead of the
        surest one. `print` shows a table. Time in which a step waits for data, and
        callbacks, are not in it.

    Raises:
        UsageError: Data that no step could be run on, or no such gear.
    """
    checks.count("epochs", epochs, least=1)
    with contextlib.ExitStack() as held:
        source, validation = keras_methods.sources(
            self,
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            validation_data=validation_data,
            steps_per_epoch=steps_per_epoch,
            hold=held,
        )
        return self.forecast(source, validation, epochs=epochs, gears=gears)


def forecast(
    self: Loop,
    source: Source,
    validation: Source | None = None,
    *,
    epochs: int = 1,
    gears: Collection[str] | None = None,
) -> estimating.Estimate:
    """`estimate`, for sources that are there already."""
    chosen, tested = self._gear, self._test_gear
    with self._settled(source):
        if validation is not None:
            self.prepare("test", validation)
        return estimating.estimate(
            self._runner,
            source,
            validation,
            epochs=epochs,
            gear=chosen,
            test_gear=tested,
            gears=gears,
            cache=self._cache,
        )


def look(
    self: Loop, x: Any = None, y: Any = None, sample_weight: Any = None
) -> OpenedStep:
    """Open up a train step on one batch, from the state as it stands.

    Executes it eagerly, once, and sets everything back: tens of milliseconds, and
    in memory every layer's output. In a listener of `ChunkBegin`, or in the
    `on_train_batch_begin` of a callback, it needs no data: it opens the step that
    comes next.

    Example:
        ```python
        step = loop.look(x_train[:64], y_train[:64])
        print(step.loss_per_example[step.worst[:5]], step.first_nonfinite)
        ```

    Args:
        x: One batch: arrays as in `fit`, all of whose rows are taken, or an
            iterable of batches, whose first one is.
        y: As in `fit`.
        sample_weight: As in `fit`.

    Returns:
        The step, with NumPy arrays.

    Raises:
        UsageError: No data, and no step is about to run.
    """
    if x is None:
        ahead = self._ahead
        if ahead is None:
            raise UsageError(
                "There is no step to look into. Expected a batch, "
                "`loop.look(x, y)`, or a call where a step is about to run: in a "
                "callback's `on_train_batch_begin`."
            )
        return _look(self, ahead, self._gear)
    size = sys.maxsize if is_arrays(x, self.backend) else None
    source = self.source(x, y, sample_weight, batch_size=size, shuffle=False)
    chosen = self._gear
    with self._ready(source):
        began = time.perf_counter()
        data = source.open(0)
        try:
            segment = data.take(1)
            if segment is None:
                raise DataError("The data are empty: expected one batch.")
            fetch_s = time.perf_counter() - began
            return _look(self, Ahead(segment, source, 0, 0, fetch_s), chosen)
        finally:
            data.close()


def doctor(
    self: Loop,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
    validation_data: Any = None,
    checks: Collection[str] | None = None,
    progress: Callable[[str], None] = lambda check: None,
) -> examining.Examination:
    """Look for the classic bugs of training loops, by running steps and measuring.

    Runs some ten train steps and sets everything back: about a second for a small
    model. docs/doctor.md lists the checks.

    Example:
        ```python
        print(loop.doctor(x_train, y_train, validation_data=(x_val, y_val)))
        ```

    Args:
        x: Data as in `fit`.
        y: Data as in `fit`.
        sample_weight: Data as in `fit`.
        batch_size: Examples of a step, for arrays.
        shuffle: As in `fit`.
        validation_data: As in `fit`: the test step is examined as well.
        checks: The names of those to make; all, if not given.
        progress: Told the name of each check before it is made.

    Returns:
        What was found. The loop stays as it is.

    Raises:
        UsageError: Data that no step could be run on, or no such check.
    """
    with contextlib.ExitStack() as held:
        source, validation = keras_methods.sources(
            self,
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            shuffle=shuffle,
            validation_data=validation_data,
            hold=held,
        )
        return self.examine(source, validation, checks=checks, progress=progress)


def examine(
    self: Loop,
    source: Source,
    validation: Source | None = None,
    *,
    checks: Collection[str] | None = None,
    progress: Callable[[str], None] = lambda check: None,
) -> examining.Examination:
    """`doctor`, for sources that are there already."""
    self._stage("train")
    stage = self._runner.stages["train"]
    if isinstance(stage.step, ModelStep):
        build_quietly(self.model, source.specs, "train")
    if not stage.own:
        build(self.model, source.specs, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The checks say it themselves.
        self.settle("train", source.specs)
        if validation is not None:
            with contextlib.suppress(UsageError):
                self._stage("test")
                self.settle("test", validation.specs)
    facts = Facts(
        self._runner,
        source,
        gear=self._gear,
        asked=self.choice is None,
        validation=validation,
    )
    return examining.examine(facts, checks, progress=progress)


def show(self: Loop, callbacks: Any = None) -> None:
    """Print the loop as code: the steps, and where each callback is called.

    Args:
        callbacks: As `fit` would get them.
    """
    print(listing(self.lines(callbacks)), end="")


def lines(self: Loop, callbacks: Any = None) -> list[Line]:
    """The loop as code, as `show` prints it, line by line.

    Args:
        callbacks: As `fit` would get them.
    """
    own: dict[str, Callable[..., Any] | None] = {}
    phases: tuple[Phase, ...] = ("train", "test")
    for phase in phases:
        given, is_own = self.given(phase)
        own[phase] = given if is_own else None
        if not is_own and checks.overrides(self.model, f"{phase}_step"):
            own[phase] = getattr(self.model, f"{phase}_step")
    listed = list(getattr(callbacks, "callbacks", callbacks) or [])
    return showing.lines(
        self.model, gear=self._gear, steps=own, callbacks=listed, watch=self.watch
    )


def find_lr(
    self: Loop,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
) -> trials.LearningRates:
    """Train a little with a growing learning rate, and see where the loss falls.

    On the live variables, which are set back. A notebook shows the curve.

    Args:
        x: Data as in `fit`.
        y: Data as in `fit`.
        sample_weight: Data as in `fit`.
        batch_size: Examples of a step, for arrays.
        start: The first learning rate.
        end: The last one, unless the loss has grown fourfold before.
        steps: So many, geometrically spaced.

    Returns:
        Rates, losses, and the rate at which the loss falls fastest.

    Raises:
        UsageError: No range, or an optimizer whose learning rate is a schedule.
    """
    source = self.source(x, y, sample_weight, batch_size=batch_size)
    with self._ready(source) as gear:
        return trials.find_lr(
            self._runner, source.sample(), gear, start=start, end=end, steps=steps
        )


def overfit(
    self: Loop,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    batches: int = 1,
    steps: int = 200,
) -> trials.Overfitted:
    """Train on the same few batches: a loop that cannot learn one is broken.

    On the live variables, which are set back.

    Args:
        x: Data as in `fit`.
        y: Data as in `fit`.
        sample_weight: Data as in `fit`.
        batch_size: Examples of a step, for arrays.
        batches: How many.
        steps: At most so many; it ends when the loss is a hundredth.

    Returns:
        The losses, and whether the last is less than a tenth of the first.
    """
    checks.count("batches", batches, least=1)
    checks.count("steps", steps, least=1)
    source = self.source(x, y, sample_weight, batch_size=batch_size)
    with self._ready(source) as gear:
        return trials.overfit(
            self._runner, source.sample(), gear, batches=batches, steps=steps
        )


def otherwise(
    self: Loop,
    before: Sequence[Any],
    segments: tuple[Segment, Segment],
    *,
    clipnorm: float | None,
) -> list[Alternative]:
    """Run a step as it was and otherwise; each time, the loss of the next one.

    The loop stays as it is.

    Args:
        before: `state.snapshot()` before the step.
        segments: The data of the step, and of the one after it.
        clipnorm: To clip all gradients together to; not tried if `None`.
    """
    return alternatives(
        self._runner, before, segments, gear=self._gear, clipnorm=clipnorm
    )


def moment(self: Loop, gear: Gear, segment: Segment) -> comparing.Moment:
    """What the first step of a segment does in a gear; the loop stays as it is."""
    return comparing.one_step(self._runner, gear, segment)


def _look(self: Loop, ahead: Ahead, gear: Gear | None) -> OpenedStep:
    return open_step(
        self._runner,
        ahead.segment,
        step=self.step,
        gear=gear,
        examples=ahead.source.examples(ahead.epoch, ahead.index),
        fetch_s=ahead.fetch_s / ahead.segment.steps,
    )


def first_step_difference(self: Loop, source: Source) -> float:
    """How far this loop's gear is from eager in one step from the state of now.

    The largest over outputs and variables of ‖a - b‖ / ‖a‖. The loop
    stays as it is.
    """
    gear = self.prepare("train", source)
    return comparing.first_step_difference(self._runner, source, gear)
