"""Live signals: what a step's layers and optimizers do, measured inside its program.

The step is not changed. While it is traced (or, in gear eager, run), notes are taken of
what layers gave and what optimizers applied; what is asked of them is computed in one
`cond`, so that a step where nothing is due pays for little more than a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopscope.backend.base import Backend, Step
from loopscope.hooks import build_optimizer, calls, given_to_apply, hooked, updates

SIGNALS = "loopscope/signals"
"""The entry of a step's outputs that holds its signals, one number each."""

_CURRENT: ContextVar[Notes | None] = ContextVar("notes", default=None)


@dataclass(frozen=True)
class _Change:
    """What an optimizer was given for a variable, and what has become of it.

    Attributes:
        layer: The path of the layer that the variable belongs to.
        given: The gradient, or `None`.
        scale: What the loss was multiplied by; `None` without loss scaling.
        before: The variable's value.
        after: The variable's value.
    """

    layer: str
    given: Any
    scale: Any
    before: Any
    after: Any

    def gradient(self, backend: Backend) -> Any:
        """Dense, and of the loss itself."""
        import keras

        if self.given is None:
            return None
        dense = keras.ops.cast(backend.dense(self.given), "float32")
        return dense if self.scale is None else dense / self.scale


@dataclass
class _Call:
    """A layer that is being called."""

    path: str
    calls_others: bool = False


@dataclass
class Notes:
    """What is noted of one step.

    Attributes:
        level: Where a tensor has to be made for the step to be able to use it.
        outputs: The first output of each layer that calls no other, by path.
        changes: One for each variable of each call of an optimizer.
    """

    level: Any
    outputs: dict[str, Any] = field(default_factory=dict)
    changes: list[_Change] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Readings:
    """The signals of some steps, as the program gives them.

    Attributes:
        names: Of the signals.
        values: float32 of shape `(steps, len(names))`; where they were not due, zeros.
        due: bool of shape `(steps,)`.
    """

    names: tuple[str, ...]
    values: np.ndarray
    due: np.ndarray

    def by_name(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The signals of some of the steps, of those that were due if not given.

        Of layers: `gradient_norm/PATH`, `weight_norm/PATH` (before the step) and
        `update_ratio/PATH`; of their outputs: `activation_mean/PATH`,
        `activation_std/PATH` and `activation_zeros/PATH`.
        """
        values = self.values[self.due if rows is None else rows]
        found = dict(zip(self.names, values.T, strict=True))
        for name in self.names:
            kind, _, path = name.partition("/")
            if kind == "update_norm":
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = found.pop(name) / found[f"weight_norm/{path}"]
                found[f"update_ratio/{path}"] = ratio
        return found

    def gradient_norms(self) -> np.ndarray:
        """The norm of all gradients together, of the steps that were due."""
        columns = [n.startswith("gradient_norm/") for n in self.names]
        of_layers = self.values[self.due][:, columns].astype(np.float64)
        norms: np.ndarray = np.sqrt(np.square(of_layers).sum(axis=1))
        return norms


class Watcher:
    """Makes steps give their signals along with their outputs.

    Args:
        backend: Where they run.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.names: tuple[str, ...] = ()
        """Of the signals, in order; known once a step was traced or run."""
        self._stack: list[_Call] = []
        self._applying = False

    def watched(self, step: Step) -> Step:
        """A step that takes whether its signals are due, and then the batch.

        Where they are not due, numbers come back that mean nothing.
        """

        def told(due: Any, *batch: Any) -> Any:
            if due is False:
                return {**step(*batch), SIGNALS: self._none()}
            notes = Notes(self._backend.level())
            with self._noting(notes):
                outputs = step(*batch)
            return {**outputs, SIGNALS: self._signals(notes, due)}

        told.__module__ = getattr(step, "__module__", "")
        return told

    def _none(self) -> Any:
        import keras

        return keras.ops.zeros((len(self.names),), "float32")

    def _signals(self, notes: Notes, due: Any) -> Any:
        import keras

        wanted = dict(_wanted(notes, self._backend))
        if due is not True or not self.names:
            self.names = tuple(wanted)
        chosen = [wanted.get(name, _nothing) for name in self.names]

        def measured() -> Any:
            found = [keras.ops.cast(signal(), "float32") for signal in chosen]
            return keras.ops.stack(found) if found else self._none()

        return measured() if due is True else keras.ops.cond(due, measured, self._none)

    @contextmanager
    def _noting(self, notes: Notes) -> Iterator[None]:
        self._stack, self._applying = [], False
        token = _CURRENT.set(notes)
        try:
            with hooked([*calls(self._layer), *updates(self._apply)]):
                yield
        finally:
            _CURRENT.reset(token)

    def _reached(self) -> Notes | None:
        """The notes, where what is made now can be used by the step itself."""
        notes = _CURRENT.get()
        here = notes is not None and self._backend.level() == notes.level
        return notes if here else None

    def _layer(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(layer: Any, *arguments: Any, **named: Any) -> Any:
            outer = self._stack[-1] if self._stack else None
            if outer is not None:
                outer.calls_others = True
            path = layer.name if outer is None else f"{outer.path}/{layer.name}"
            entry = _Call(path)
            self._stack.append(entry)
            try:
                outputs = real(layer, *arguments, **named)
            finally:
                self._stack.pop()
            notes = self._reached()
            if notes is not None and not entry.calls_others:
                self._note_outputs(notes, path, outputs)
            return outputs

        return call

    def _note_outputs(self, notes: Notes, path: str, outputs: Any) -> None:
        import keras

        for leaf in keras.tree.flatten(outputs):
            if self._backend.is_tensor(leaf) and self._backend.is_floating(leaf):
                notes.outputs.setdefault(path, leaf)
                return

    def _apply(self, real: Callable[..., Any]) -> Callable[..., Any]:
        import keras

        def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
            notes = self._reached()
            if notes is None or self._applying:
                return real(optimizer, grads, trainable_variables)
            gradients, variables = given_to_apply(optimizer, grads, trainable_variables)
            read, scale = self._backend.read, None
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                build_optimizer(optimizer, variables)
                scale = read(optimizer.dynamic_scale)
            before = [read(v) for v in variables]
            self._applying = True
            try:
                result = real(optimizer, gradients, trainable_variables)
            finally:
                self._applying = False
            for variable, gradient, was in zip(
                variables, gradients, before, strict=True
            ):
                path = str(getattr(variable, "path", variable.name))
                layer, now = path.rpartition("/")[0], read(variable)
                notes.changes.append(_Change(layer, gradient, scale, was, now))
            return result

        return apply


def handing_out(
    differentiate: Callable[..., tuple[Any, list[Any]]],
    fn: Callable[[], Any],
    variables: Sequence[Any],
    has_aux: bool,
    backend: Backend,
) -> tuple[Any, list[Any]]:
    """`differentiate(fn, variables, has_aux)`, handing out what is noted inside of it.

    What a function computes while it is differentiated can be had only from what it
    returns.
    """
    notes = _CURRENT.get()
    if notes is None:
        return differentiate(fn, variables, has_aux)
    outer, known = notes.level, dict(notes.outputs)

    def noted() -> tuple[Any, tuple[Any, list[Any]]]:
        notes.level = backend.level()
        notes.outputs = dict(known)
        value = fn()
        return value[0] if has_aux else value, (value, list(notes.outputs.values()))

    try:
        (_, (value, tensors)), grads = differentiate(noted, variables, True)
    finally:
        notes.level = outer
    notes.outputs = dict(zip(notes.outputs, tensors, strict=True))
    return value, grads


def _wanted(notes: Notes, backend: Backend) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every signal by name, and how it is computed."""
    import keras

    ops = keras.ops
    for path, output in notes.outputs.items():

        def of(statistic: Callable[[Any], Any], output: Any = output) -> Any:
            return lambda: statistic(ops.cast(output, "float32"))

        yield f"activation_mean/{path}", of(_mean)
        yield f"activation_std/{path}", of(_std)
        yield f"activation_zeros/{path}", of(_zeros)
    for path, changes in _by_layer(notes).items():

        def norms(
            of: Callable[[_Change], Any], changes: Any = changes
        ) -> Callable[[], Any]:
            return lambda: _norm([of(change) for change in changes])

        yield f"gradient_norm/{path}", norms(lambda c: c.gradient(backend))
        yield f"weight_norm/{path}", norms(lambda c: c.before)
        yield f"update_norm/{path}", norms(lambda c: c.after - c.before)


def _by_layer(notes: Notes) -> dict[str, list[_Change]]:
    layers: dict[str, list[_Change]] = {}
    for change in notes.changes:
        layers.setdefault(change.layer, []).append(change)
    return layers


def _norm(tensors: Sequence[Any]) -> Any:
    """The Euclidean norm of tensors taken together; 0 where there is none."""
    import keras

    ops = keras.ops
    squares = [
        _sum(ops.square(ops.cast(t, "float32"))) for t in tensors if t is not None
    ]
    return ops.sqrt(sum(squares[1:], squares[0])) if squares else 0.0


def _std(output: Any) -> Any:
    import keras

    return keras.ops.sqrt(_mean(keras.ops.square(output - _mean(output))))


def _zeros(output: Any) -> Any:
    """The share of zeros."""
    import keras

    return _mean(keras.ops.cast(keras.ops.equal(output, 0), "float32"))


def _mean(tensor: Any) -> Any:
    import keras

    size = keras.ops.cast(keras.ops.size(tensor), "float32")
    return _sum(tensor) / size


def _sum(tensor: Any) -> Any:
    """The sum of a float32 tensor, column by column.

    XLA adds up a whole tensor one number after the other, but the rows of a matrix all
    columns at once: 5 times faster on a CPU for the tutorial's largest kernel. A second
    `sum` would be merged into the first; the product with ones is not.
    """
    import keras

    ops = keras.ops
    if len(tensor.shape) < 2 or not tensor.shape[-1]:
        return ops.sum(tensor)
    columns = ops.sum(ops.reshape(tensor, (-1, tensor.shape[-1])), axis=0)
    return ops.dot(columns, ops.ones_like(columns))


def _nothing() -> Any:
    return float("nan")


__all__ = ["SIGNALS", "Readings", "Watcher", "handing_out"]
