"""A recorded run, to be looked at and gone back into."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import RunError, UsageError
from loopscope.experiment import BUILT_IN, Experiment, load
from loopscope.figures import html, plots
from loopscope.look.diff import StepDifference, between, difference, of_moment
from loopscope.look.opened import OpenedStep
from loopscope.look.why import Why
from loopscope.replay import Replayer, Rewound, Segment
from loopscope.run import reading
from loopscope.run.branch import branch
from loopscope.run.folder import Folder
from loopscope.run.identity import Difference


class Run:
    """A run folder, opened with `open_run`. Nothing here changes it.

    Args:
        folder: Where it lies.
        experiment: What was recorded; `None`: made again as the run says.
    """

    def __init__(self, folder: Folder, experiment: Experiment | None) -> None:
        self._folder, self._given = folder, experiment
        self._replayer: Replayer | None = None
        self.path = folder.path
        self.manifest: Mapping[str, Any] = folder.manifest
        """What run.json says: docs/run-format.md."""

    @property
    def summary(self) -> reading.Summary:
        """What it is and how far it has come."""
        return reading.summary(self._folder)

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """Every step's outputs: `"step"` and an array a name, of shape `(steps,)`."""
        return reading.steps(self._folder)

    @property
    def signals(self) -> dict[str, np.ndarray]:
        """What `Loop(watch=...)` measured: `"step"` and one array a signal.

        Each of shape `(m,)`: `gradient_norm/PATH`, `weight_norm/PATH`,
        `update_ratio/PATH` of layers, and of their outputs `activation_mean/PATH`,
        `activation_std/PATH`, `activation_zeros/PATH`.
        """
        return reading.signals(self._folder)

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Every epoch that is over: epoch, first_step, steps, seconds, metrics."""
        return reading.epochs(self._folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened: id, step, kind, time (seconds since 1970), and more."""
        with reading.journal(self._folder) as journal:
            return journal.events()

    def curve(
        self, name: str = "loss", points: int = 1000
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A step's output in at most `points` points: step, mean, least, greatest."""
        return reading.curve(self._folder, name, points)

    def plot(self, *names: str, points: int = 1000) -> Any:
        """Curves of its steps and the metrics of its epochs, as a plotly figure.

        Args:
            *names: Of outputs of a step (`"loss"`), of metrics (`"accuracy"`, with
                `"val_accuracy"` beside it) and of signals; if none is named, all but
                signals.
            points: At most so many a curve; each is a mean, with the least and the
                greatest value around it.

        Returns:
            A `plotly.graph_objects.Figure`.

        Raises:
            RunError: The run records nothing of such a name.
            ExtraError: plotly is not installed.
        """
        outputs = [name for name in self.steps if name != "step"]
        epochs = self.epochs
        shown = names or (*outputs, *plots.metrics(epochs, but=outputs))
        known, signals = plots.metrics(epochs), self.signals if names else {}
        curves = {}
        for name in shown:
            if name in signals:
                values = signals[name]
                curves[name] = (signals["step"], values, values, values)
            elif name in outputs or name not in known:
                curves[name] = self.curve(name, points)
        return plots.run(str(self.path), shown, curves, epochs)

    def _repr_html_(self) -> str:
        steps = self.steps
        curve = self.curve("loss", 240)[:2] if "loss" in steps else None
        return html.run(self.summary.as_dict(), self.epochs, curve)

    def rewind(self, step: int, *, look: bool = True) -> Rewound:
        """Run a past step again, from the nearest checkpoint before it; open it up.

        The first call makes the experiment and compiles its step (seconds); each one
        restores a checkpoint and runs at most as many steps as lie between two. Does
        not change the run. Whether the bits are the recorded ones is in the result.

        Args:
            step: Its global number, counted from 0.
            look: Whether to open it up: it is executed once more in gear eager, and
                every layer's output is kept.

        Raises:
            UsageError: The run has no such step.
            RunError: It cannot be replayed, or the experiment cannot be made.
        """
        return self._replay().rewind(step, look=look)

    def why(self, step: int) -> Why:
        """The short story of a step: what carried its loss, what was done with it.

        Looks into the step and up to five before it, and runs the step, and the one
        before, at half the learning rate and with clipped gradients as well. About a
        second for a small model. Does not change the run.

        Args:
            step: Its global number, counted from 0.

        Raises:
            UsageError: The run has no such step.
            RunError: It cannot be replayed.
        """
        return self._replay().why(step)

    def diff(
        self,
        step: int | None = None,
        *,
        other: Run | None = None,
        other_step: int | None = None,
        gear: str | None = None,
    ) -> tuple[int, int, StepDifference]:
        """Two steps side by side: where they part.

        The same step of this run and another one; two steps of this run; or one step
        in the gear of the run and in another gear (then outputs and variables are
        compared: a compiled gear shows nothing in between).

        Args:
            step: Its number; if not given, the first one that the two runs have
                recorded another loss for.
            other: Another run.
            other_step: The step to compare with, if it is another number.
            gear: Another gear.

        Returns:
            The two numbers, and what differs.

        Raises:
            UsageError: There is nothing to compare, or no such step.
            RunError: A step cannot be replayed or not be opened up.
        """
        if sum(given is not None for given in (other, gear)) > 1:
            raise UsageError("Compare with another run or in another gear, not both.")
        if gear is not None:
            if step is None:
                raise UsageError("Which step? Expected its number with a gear.")
            moments = self._replay().in_gears(step, gear)
            return step, step, between(*map(of_moment, moments))
        if other is None and (other_step is None or step is None):
            raise UsageError(
                "There is nothing to compare with. Expected another run, another step, "
                "or another gear."
            )
        if step is None:
            assert other is not None
            step = _first_difference(self, other)
        elsewhere = step if other_step is None else other_step
        looks = (self._opened(step), (other or self)._opened(elsewhere))
        return step, elsewhere, difference(*looks)

    def _opened(self, step: int) -> OpenedStep:
        look = self.rewind(step).look
        if look is None:
            raise RunError(f"Step {step} of {self.path} cannot be opened up.")
        return look

    def verify(
        self, *, whole: bool = False, progress: Callable[[Segment], None] | None = None
    ) -> Verification:
        """Replay three stretches between checkpoints, or all; compare every bit.

        Args:
            whole: All of them: takes about as long as the training did.
            progress: Told each stretch when it is done.
        """
        replayer, segments = self._replay(), []
        for segment in replayer.verify(whole=whole):
            segments.append(segment)
            if progress is not None:
                progress(segment)
        return Verification(tuple(segments), tuple(replayer.differences))

    def branch(
        self,
        step: int,
        path: str | os.PathLike[str],
        *,
        learning_rate: float | None = None,
        gear: str | None = None,
    ) -> None:
        """Make a new run that shares this one's past up to a step.

        Train it with `fit(..., run=path, resume=True)` or `loopscope resume PATH`: up
        to the step it repeats this run, then it goes on with what was changed.

        Args:
            step: The first step that is not this run's.
            path: Of the new run folder.
            learning_rate: From this step on.
            gear: From this step on.

        Raises:
            UsageError: The run has no such step.
            RunError: There is a run at `path`, or no checkpoint before the step.
        """
        branch(
            self._folder,
            Folder(Path(path)),
            step,
            learning_rate=learning_rate,
            gear=gear,
        )

    def close(self) -> None:
        """Let go of the experiment's data."""
        if self._replayer is not None:
            self._replayer.close()
            self._replayer = None

    def _replay(self) -> Replayer:
        used_up = self._replayer is not None and not self._replayer.reusable
        if used_up and self._given is None:
            self.close()  # A new experiment reads its data from the start.
        if self._replayer is None:
            experiment = self._given or experiment_of(self._folder)
            self._replayer = Replayer(self._folder, experiment)
        return self._replayer


class Verification:
    """What a replay of stretches of a run has found.

    Attributes:
        segments: Each stretch.
        differences: What is not as it was when the run was recorded.
    """

    def __init__(
        self, segments: Sequence[Segment], differences: Sequence[Difference]
    ) -> None:
        self.segments, self.differences = segments, differences

    @property
    def verified(self) -> bool:
        """Whether every bit that was compared is the recorded one."""
        return all(segment.verified for segment in self.segments)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        from dataclasses import asdict

        apart = [s.first_difference for s in self.segments if s.first_difference]
        return {
            "verified": self.verified,
            "same_identity": not self.differences,
            "differences": [d.as_dict() for d in self.differences],
            "steps": sum(s.stop - s.first for s in self.segments),
            "largest_relative_difference": max(
                (s.largest_relative_difference for s in self.segments), default=0.0
            ),
            "first_difference": asdict(apart[0]) if apart else None,
            "segments": [{**asdict(s), "verified": s.verified} for s in self.segments],
        }


def open_run(
    path: str | os.PathLike[str], *, experiment: Experiment | None = None
) -> Run:
    """Open a recorded run, live or finished.

    Example:
        ```python
        run = loopscope.open_run("runs/mnist")
        print(run.steps["loss"][-1], run.rewind(1234).learning_rate)
        ```

    Args:
        path: The run folder.
        experiment: The loop and data that were recorded, for a run that was begun by
            `fit` in a script; others say themselves how they are made.

    Returns:
        The run. Opening it reads its manifest, no more, and imports no framework.

    Raises:
        RunError: There is no run, or it is damaged.
    """
    return Run(Folder(Path(path)), experiment)


def _refuse_code_in_runs(folder: Folder, name: str, place: str) -> None:
    """Refuse a function whose file lies in a run folder, whichever.

    A run is data that somebody may have got from anywhere. What it names has to be
    there already, and to be put there by somebody else than the run.

    Args:
        folder: The run that names it.
        name: `package.module:function`, or `/file.py:function`.
        place: A folder in which modules are looked for after all others.

    Raises:
        RunError: It does.
    """
    module = name.rpartition(":")[0]
    if module.endswith(".py"):
        files = [Path(module)]
    else:
        package = module.partition(".")[0]
        starts = map(Path, ("", *sys.path, place))
        named = [start / end for start in starts for end in (package, f"{package}.py")]
        files = [file for file in named if file.exists()]
    for file in files:
        found = _run_around(file)
        if found is not None:
            own = found == folder.path.resolve()
            its = "its own folder" if own else f"the folder of the run {str(found)!r}"
            raise RunError(
                f"The run {str(folder.path)!r} names code inside of {its} ({file}). "
                "Nothing in a run folder is executed; keep code elsewhere.",
                code="code_inside",
                file=str(file),
            )


def _run_around(file: Path) -> Path | None:
    """The run folder that a file lies in, or that it is; `None` if in none."""
    place = file.resolve()
    return next((p for p in (place, *place.parents) if Folder(p).exists), None)


def _first_difference(one: Run, other: Run) -> int:
    """The first step for which two runs have recorded another output.

    Raises:
        UsageError: There is none.
    """
    a, b = one.steps, other.steps
    _, mine, others = np.intersect1d(a["step"], b["step"], return_indices=True)
    apart = np.zeros(len(mine), bool)
    for name in (set(a) & set(b)) - {"step"}:
        was, now = a[name][mine], b[name][others]
        apart |= (was != now) & ~(np.isnan(was) & np.isnan(now))
    if not apart.any():
        raise UsageError(
            f"The {len(mine)} steps that both runs have recorded are the same, bit for "
            "bit. Name a step to compare all the same."
        )
    return int(a["step"][mine][apart.argmax()])


def experiment_of(folder: Folder) -> Experiment:
    """Make the experiment of a run again, as its manifest says.

    Raises:
        RunError: It was begun by a script, not by name; or its code lies in the folder.
        ExperimentError: It cannot be made.
    """
    origin = folder.manifest["origin"]
    if not origin.get("experiment"):
        script = " ".join(folder.manifest["script"])
        raise RunError(
            f"The run {str(folder.path)!r} was begun by `fit` in a script ({script}), "
            "so it cannot be made again by name. To go on, run the script with "
            "`fit(..., run=..., resume=True)`; to look into it, give "
            "`open_run(path, experiment=loopscope.Experiment(loop, x=..., ...))`.",
            code="by_script",
            script=script,
        )
    name, place = origin["function"], folder.manifest["working_folder"]
    _refuse_code_in_runs(folder, name, place)
    known = place in sys.path or _run_around(Path(place)) is not None
    if not known and Path(place).is_dir():
        sys.path.append(place)
    # A manifest may name a function, not what to call it with: options are for the
    # built-in ones, whose arguments do nothing but choose.
    built_in = name in BUILT_IN.values()
    options = origin.get("options") if built_in else None
    experiment = load(name, seed=origin["seed"], options=options)
    experiment.loop.origin = origin
    experiment.arguments.update(origin.get("arguments", {}))
    if origin.get("gear"):
        experiment.loop.gear = origin["gear"]
    if origin.get("watch"):
        experiment.loop.watch = origin["watch"]
    return experiment
