"""Observes what Keras's objects compute while one step runs eagerly.

For the duration of a `with` block the methods through which every layer, loss, metric
and optimizer is called are replaced by ones that also take notes. What the framework
alone can see (its tape, its operations) it tells through `Backend.observed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loopscope.backend.base import Backend
from loopscope.hooks import (
    Hook,
    build_optimizer,
    calls,
    given_to_apply,
    hooked,
    owner_of,
    updates,
)

CALLS = 8
"""How many calls of one layer are kept: a cell is called for every time step."""

ORIGINS = 8
"""How many operations that were the first to leave the finite numbers are kept."""


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        path: The names of the layers it was called in, and its own, joined by "/".
        number: 0 for the first call under this path.
        layer: The layer.
        inputs: Tensors that it was given.
        outputs: Tensors, as they came.
        gradients: Of the loss with respect to each, where the framework gives it.
    """

    path: str
    number: int
    layer: Any
    inputs: list[Any]
    outputs: list[Any]
    gradients: list[Any] = field(default_factory=list)


@dataclass
class Judged:
    """One call of a loss object; `value` is `None` if it has raised."""

    loss: Any
    y_true: Any
    y_pred: Any
    sample_weight: Any
    value: Any


@dataclass
class Applied:
    """One call of an optimizer."""

    optimizer: Any
    variables: list[Any]
    gradients: list[Any]


@dataclass
class Operation:
    """An operation of the framework whose output left the finite numbers.

    Attributes:
        name: The framework's, `"Log"`.
        layer: The path of the layer it was executed in; empty outside of layers.
        phase: `"forward"`, `"backward"`, `"apply"`, `"metrics"` or `"other"`.
        inputs: Copies on the host.
        outputs: Copies on the host.
    """

    name: str
    layer: str
    phase: str
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]


class Probe:
    """Takes notes while it is `around` a step.

    Args:
        backend: Where the step runs.
        metrics: The metric objects that the step updates.
        losses: Gives what the model's layers add to the loss.
    """

    def __init__(
        self, backend: Backend, metrics: Sequence[Any], losses: Callable[[], list[Any]]
    ) -> None:
        self._backend, self.metrics, self._losses = backend, list(metrics), losses
        self.calls: list[Call] = []
        self.judged: list[Judged] = []
        self.applied: list[Applied] = []
        self.origins: list[Operation] = []
        self.regularization: list[Any] = []
        """What the model's layers added to the loss, when it was last computed."""
        self.born: list[tuple[Any, Any]] = []
        """Variables that were made on the way, with their first values."""
        self.updates: dict[int, int] = {}
        """How often each metric was updated, by its identity."""
        self._updating: set[int] = set()
        self.phases: dict[str, float] = {}
        """Seconds of each phase."""
        self.compiled = self.forward_only = False
        self.batch: tuple[Any, ...] = ()
        """Of the step, as it got it."""
        self.until = float("inf")
        """When to give up, in the seconds of `time.perf_counter`."""
        self._stack: list[str] = []
        self._counts: dict[str, int] = {}
        self._open: list[list[float]] = []
        self._phase = ["other"]
        self._within_loss = False

    @contextmanager
    def around(self) -> Iterator[None]:
        """Take notes for the duration of a block."""
        with hooked(self._hooks(), also=self._backend.in_first_replica):
            yield

    def _hooks(self) -> list[Hook]:
        import keras

        hooks: list[Hook] = [
            *calls(self._layer),
            (keras.losses.Loss, "__call__", self._loss),
            *updates(self._apply),
        ]
        kinds = self._metric_kinds()
        return hooks + [(kind, "update_state", self._metric) for kind in kinds]

    def _metric_kinds(self) -> set[type]:
        """The classes whose `update_state` is called."""
        return {owner_of(type(m), "update_state") for m in self.metrics}

    # What the framework tells.

    def wanted(self) -> list[Any]:
        """Every floating output so far: gradients with respect to it are wanted."""
        return [
            output
            for call in self.calls
            for output in call.outputs
            if self._backend.is_floating(output)
        ]

    def differentiated(self, wanted: Sequence[Any], gradients: Sequence[Any]) -> None:
        """Gradients of some loss with respect to what was wanted; `None` for none."""
        found = {id(w): g for w, g in zip(wanted, gradients, strict=True)}
        for call in self.calls:
            new = [found.get(id(output)) for output in call.outputs]
            old = call.gradients or [None] * len(new)
            call.gradients = [
                b if a is None else a for a, b in zip(old, new, strict=True)
            ]

    def computed(
        self,
        name: str,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
        *,
        place: tuple[str, str] | None = None,
    ) -> None:
        """An operation was executed; `place` is its layer and phase, if not here."""
        if len(self.origins) >= ORIGINS or all(map(is_finite, outputs)):
            return
        if all(map(is_finite, inputs)):
            layer, phase = place or ("/".join(self._stack), self._phase[-1])
            copies = [[np.array(a) for a in part] for part in (inputs, outputs)]
            self.origins.append(Operation(name, layer, phase, *copies))

    def noted(self) -> list[Any]:
        """Every array that notes were taken of."""
        import keras

        notes: list[Any] = keras.tree.flatten(self._notes())
        return notes

    def resolved(self, values: Sequence[Any]) -> None:
        """Take these in the place of `noted`, which stood for them."""
        import keras

        notes = keras.tree.pack_sequence_as(self._notes(), list(values))
        self.batch, calls, judged, gradients, self.regularization = notes
        for call, found in zip(self.calls, calls, strict=True):
            call.inputs, call.outputs = found
        for one, found in zip(self.judged, judged, strict=True):
            one.y_true, one.y_pred, one.sample_weight, one.value = found
        for applied, found in zip(self.applied, gradients, strict=False):
            applied.gradients = found

    def _notes(self) -> list[Any]:
        applied = [] if self.forward_only else self.applied
        return [
            self.batch,
            [[call.inputs, call.outputs] for call in self.calls],
            [[j.y_true, j.y_pred, j.sample_weight, j.value] for j in self.judged],
            [a.gradients for a in applied],
            self.regularization,
        ]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time of a block for a phase, and not for the one around it."""
        began = time.perf_counter()
        if began > self.until:
            raise TimeoutError("Looking into the step takes longer than it may.")
        self._open.append([0.0])
        self._phase.append(phase)
        try:
            yield
        finally:
            self._phase.pop()
            took = time.perf_counter() - began
            inner = self._open.pop()[0]
            self.phases[phase] = self.phases.get(phase, 0.0) + took - inner
            if self._open:
                self._open[-1][0] += took

    # What Keras's objects do.

    def _layer(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(layer: Any, *arguments: Any, **named: Any) -> Any:
            self._stack.append(layer.name)
            path = "/".join(self._stack)
            try:
                with self.timed("forward"):
                    outputs = real(layer, *arguments, **named)
            finally:
                self._stack.pop()
            self._note_call(path, layer, (arguments, named), outputs)
            return outputs

        return call

    def _note_call(self, path: str, layer: Any, given: Any, outputs: Any) -> None:
        number = self._counts.get(path, 0)
        self._counts[path] = number + 1
        made = self._tensors(outputs)
        if number < CALLS and made:
            self.calls.append(Call(path, number, layer, self._tensors(given), made))

    def _tensors(self, tree: Any) -> list[Any]:
        import keras

        return [leaf for leaf in keras.tree.flatten(tree) if self._can_be_read(leaf)]

    def _can_be_read(self, value: Any) -> bool:
        return self._backend.is_tensor(value) and self._backend.is_concrete(value)

    def _loss(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(loss: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            outer, self._within_loss = self._within_loss, True
            noted = Judged(loss, y_true, y_pred, sample_weight, None)
            if not outer and self._tensors(y_pred):
                self.judged.append(noted)
            try:
                with self.timed("forward"):
                    noted.value = real(loss, y_true, y_pred, sample_weight)
            finally:
                self._within_loss = outer
            self._note_added()
            return noted.value

        return call

    def _note_added(self) -> None:
        added = self._tensors(self._losses())
        self.regularization = added or self.regularization

    def _metric(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def update_state(metric: Any, *arguments: Any, **named: Any) -> Any:
            # A class that calls the method of its base updates once.
            outer = id(metric) not in self._updating
            self._updating.add(id(metric))
            try:
                with self.timed("metrics"):
                    return real(metric, *arguments, **named)
            finally:
                if outer:
                    self._updating.discard(id(metric))
                    # JAX runs a forward pass twice: once to be looked at.
                    seen = bool(self._tensors((arguments, named)))
                    self.updates[id(metric)] = self.updates.get(id(metric), 0) + seen

        return update_state

    def _apply(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
            grads, variables = given_to_apply(optimizer, grads, trainable_variables)
            if build_optimizer(optimizer, variables):
                read = self._backend.read
                self.born += [(v, read(v)) for v in optimizer.variables]
            if not self.applied and not self.judged:
                self._note_added()
            if all(g is None or self._backend.is_concrete(g) for g in grads):
                self.applied.append(Applied(optimizer, variables, grads))
            with self.timed("apply"):
                return real(optimizer, grads, variables)

        return apply


def is_finite(value: Any) -> bool:
    """Whether an array holds no number that is infinite or none at all."""
    array = np.asarray(value)
    if array.dtype.kind not in "fcV":
        return True
    if array.dtype.kind == "V":
        array = array.astype(np.float32)
    return bool(np.isfinite(array).all())
