"""A step, opened up: plain records, values as NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.figures import plots
from loopscope.look import file, html
from loopscope.look.shown import KEPT_SIDE, in_notebook, shown
from loopscope.look.stats import Stats, histogram, norm
from loopscope.step import loss_of

WORST = 8
"""How many examples are named in plain data, the largest loss first."""


@dataclass(frozen=True)
class LayerOutput:
    """What one call of a layer has given.

    Attributes:
        path: The names of the layers it was called in, and its own, joined by "/".
        call: 0 for the first call under this path: a shared layer has more.
        kind: The layer's class.
        shape: Of the output, batch axis included. A layer with several outputs has
            one record for each; the paths of the later ones end in "#1", "#2".
        dtype: Of the output.
        stats: Of the output; `None` where it holds no numbers.
        values: The output.
        gradient: Of the loss with respect to the output, of the same shape; `None`
            where nothing flows back or the backend does not tell.
    """

    path: str
    call: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stats: Stats | None
    values: np.ndarray = field(repr=False)
    gradient: np.ndarray | None = field(repr=False)

    @property
    def gradient_norm(self) -> float | None:
        """The Euclidean norm of `gradient`."""
        return None if self.gradient is None else norm(self.gradient)


@dataclass(frozen=True)
class Gradient:
    """The gradient of one variable, as the optimizer got it: before any clipping.

    Attributes:
        path: Of the variable.
        stats: Of the gradient, the norm among them.
        values: The gradient, dense; `None` where nothing has reached the variable.
    """

    path: str
    stats: Stats | None
    values: np.ndarray | None = field(repr=False)

    def histogram(self, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Counts of its finite values, and the edges of the bins."""
        return histogram(self.values if self.values is not None else np.empty(0), bins)


@dataclass(frozen=True)
class Update:
    """What was added to one trainable variable.

    Attributes:
        path: Of the variable.
        norm: Of the update.
        weight_norm: Of the variable before.
        ratio: `norm / weight_norm`; `None` for a variable of zeros.
        before: The variable's value before the step.
        values: After minus before, in float64.
    """

    path: str
    norm: float
    weight_norm: float
    ratio: float | None
    before: np.ndarray = field(repr=False)
    values: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Change:
    """A variable before the step and after it."""

    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class NonFinite:
    """Where the numbers of a step first stopped being finite.

    Attributes:
        what: `"batch"`, `"variable"` (before the step) or `"operation"`.
        name: A part of the batch, a variable's path, or the framework's operation.
        layer: The path of the layer it was executed in; empty outside of layers.
        phase: `"forward"`, `"backward"`, `"apply"`, `"metrics"` or `"other"`.
        examples: Positions in the batch whose row is not finite; of a batch and of an
            output with one row an example.
        inputs: Of the operation, in order.
        outputs: Of the operation, or the part or variable itself.
    """

    what: str
    name: str
    layer: str = ""
    phase: str = ""
    examples: Sequence[int] = ()
    inputs: Sequence[np.ndarray] = field(default=(), repr=False)
    outputs: Sequence[np.ndarray] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the arrays."""
        return {
            "what": self.what,
            "name": self.name,
            "layer": self.layer,
            "phase": self.phase,
            "examples": list(self.examples),
        }

    def __str__(self) -> str:
        place = f" in layer {self.layer!r}" if self.layer else ""
        when = f", {self.phase}" if self.phase else ""
        rows = f", examples {list(self.examples)[:8]}" if self.examples else ""
        return f"{self.what} {self.name}{place}{when}{rows}"


@dataclass(frozen=True, eq=False)
class OpenedStep:
    """Everything in one training step, executed eagerly from the exact state.

    Attributes:
        step: Its global number.
        gear: In which training runs it; `None` where none is chosen yet.
        batch: By part (`"x"`, `"y"`, `"sample_weight"`), as the step got it.
        examples: The row of each example in the arrays given to `fit`, of shape `(B,)`;
            `None` for data that have no such numbers.
        layers: Every layer's output, in the order of the calls.
        predictions: What the loss was computed from, one array for each of its calls.
        labels: What it was compared with.
        outputs: What the step returned, by name.
        losses: Every part of the loss by name, weights of `compile` applied;
            `"regularization"` is what layers have added.
        loss_per_example: Of shape `(B,)`: weights applied, regularization left out;
            `None` where no `keras.losses.Loss` object computed it.
        loss_recorded: What the gear gave for the same step, where that is known.
        gradients: One for each variable of each optimizer.
        updates: One for each of them that was trained.
        optimizer: Slots and counters by path, before and after.
        metrics: The variables of metrics by path, before and after.
        seeds: The states of random generators by path, before and after.
        others: Every other variable that the step has changed (moving statistics).
        learning_rate: Before the step; `None` without an optimizer.
        phases: Milliseconds by name, of the eager execution.
        first_nonfinite: Where the numbers stopped being finite, if they did.
        missing: What could not be seen, and why.
    """

    step: int
    gear: str | None
    batch: Mapping[str, Any] = field(repr=False)
    examples: np.ndarray | None = field(repr=False)
    layers: Sequence[LayerOutput] = field(repr=False)
    predictions: Sequence[np.ndarray] = field(repr=False)
    labels: Sequence[np.ndarray] = field(repr=False)
    outputs: Mapping[str, float]
    losses: Mapping[str, float]
    loss_per_example: np.ndarray | None = field(repr=False)
    gradients: Sequence[Gradient] = field(repr=False)
    updates: Sequence[Update] = field(repr=False)
    optimizer: Mapping[str, Change] = field(repr=False)
    metrics: Mapping[str, Change] = field(repr=False)
    seeds: Mapping[str, Change] = field(repr=False)
    others: Mapping[str, Change] = field(repr=False)
    learning_rate: float | None
    phases: Mapping[str, float]
    first_nonfinite: NonFinite | None
    missing: Sequence[str]
    loss_recorded: float | None = None

    @property
    def loss(self) -> float | None:
        """The loss that the step returned: its first output, where none is named so."""
        return loss_of(self.outputs)

    @property
    def loss_difference(self) -> float | None:
        """|loss - loss_recorded| / |loss_recorded|: gears differ in rounding."""
        now, was = self.loss, self.loss_recorded
        if now is None or was is None:
            return None
        if now == was or (np.isnan(now) and np.isnan(was)):
            return 0.0
        return abs(now - was) / abs(was) if was else float("inf")

    @property
    def worst(self) -> np.ndarray | None:
        """Positions in the batch, the largest loss first; not finite before all."""
        loss = self.loss_per_example
        if loss is None:
            return None
        key = np.where(np.isfinite(loss), loss, np.inf)
        return np.argsort(-key, kind="stable")

    def label(self, i: int) -> Any:
        """What example `i` of the batch should be, if that is a class or a number."""
        return _said(self.labels[0], i) if len(self.labels) == 1 else None

    def predicted(self, i: int) -> Any:
        """What example `i` was taken for: the most likely class, or the number."""
        return _said(self.predictions[0], i) if len(self.predictions) == 1 else None

    def picture_input(self) -> Any:
        """The input of the batch, where there is one only."""
        x = self.batch.get("x")
        return x if isinstance(x, np.ndarray) else None

    def _worst(self) -> list[dict[str, Any]]:
        order, loss = self.worst, self.loss_per_example
        if order is None or loss is None:
            return []
        return [
            {
                "position": i,
                "example": None if self.examples is None else int(self.examples[i]),
                "loss": float(loss[i]),
                "label": self.label(i),
                "predicted": self.predicted(i),
            }
            for i in order[:WORST].tolist()
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into a file: `.npz` or `.safetensors` (every array), or `.html`.

        Raises:
            UsageError: The name says no kind of file, or there is no such folder.
        """
        file.save(self, Path(path))

    def plot(self) -> Any:
        """The loss of each example, gradients and updates, as a plotly figure.

        Raises:
            ExtraError: plotly is not installed.
        """
        return plots.step({**self.as_dict(), "step": self.step, "hover": self._said()})

    def _repr_html_(self) -> str:
        return in_notebook(shown(self, side=KEPT_SIDE), html.fragment(self))

    def _said(self) -> list[str]:
        """What there is to say of each example beside its loss."""
        loss = self.loss_per_example
        rows = [] if loss is None else list(range(len(loss)))
        if self.examples is not None:
            rows = self.examples.tolist()
        return [
            f"example {row}, label {self.label(i)}, taken for {self.predicted(i)}"
            for i, row in enumerate(rows)
        ]

    def as_dict(self) -> dict[str, Any]:
        """In numbers, without arrays but the loss of each example."""
        loss, first = self.loss_per_example, self.first_nonfinite
        return {
            "loss": self.loss,
            "loss_difference": self.loss_difference,
            "losses": dict(self.losses),
            "loss_per_example": None if loss is None else loss.tolist(),
            "examples": None if self.examples is None else self.examples.tolist(),
            "worst": self._worst(),
            "layers": [
                {
                    "path": o.path,
                    "call": o.call,
                    "kind": o.kind,
                    "shape": list(o.shape),
                    "dtype": o.dtype,
                    **_numbers(o.stats, "mean", "std", "min", "max", "zeros", "finite"),
                    "gradient_norm": o.gradient_norm,
                }
                for o in self.layers
            ],
            "gradients": [
                {"path": g.path, **_numbers(g.stats, "norm", "zeros", "finite")}
                for g in self.gradients
            ],
            "updates": [
                {"path": u.path, "norm": u.norm, "ratio": u.ratio} for u in self.updates
            ],
            "phases": dict(self.phases),
            "first_nonfinite": None if first is None else first.as_dict(),
            "missing": list(self.missing),
        }


def leaves(batch: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a batch by path, `"x"` or `"x/name"`."""
    import keras

    for path, leaf in keras.tree.flatten_with_path(dict(batch)):
        if isinstance(leaf, np.ndarray):
            yield "/".join(map(str, path)), leaf


def _said(values: Any, i: int) -> Any:
    """A class or a number for example `i`: of scores, the place of the largest."""
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2):
        return None
    row = values[i]
    if row.ndim == 0 or row.size == 1:
        said = row.item()
        return round(said, 6) if isinstance(said, float) else said
    return int(np.argmax(row))


def _numbers(stats: Stats | None, *names: str) -> dict[str, Any]:
    found = {} if stats is None else asdict(stats)
    return {name: found.get(name) for name in names}
