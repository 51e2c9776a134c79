"""From a probe's notes to an opened step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from loopscope.data.feed import Segment
from loopscope.gear import Gear
from loopscope.look.opened import (
    Change,
    Gradient,
    LayerOutput,
    NonFinite,
    OpenedStep,
    Update,
    leaves,
)
from loopscope.look.probe import Judged, Probe, is_finite
from loopscope.look.stats import as_float, is_number, norm, stats
from loopscope.runner import Runner
from loopscope.step import LOGS

PARTS = ("x", "y", "sample_weight")
APART = 1e-3
"""Relative: from here on the mean loss of the examples is not called the loss."""


class Seen:
    """What one eager execution of a step has shown.

    Args:
        runner: Has executed it.
        probe: Was around it.
        segment: Its data.
        batch: As the step got it.
        outputs: As the program gave them.
        before: Every variable's value before, by the variable's identity.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        probe: Probe,
        segment: Segment,
        batch: tuple[Any, ...],
        outputs: Mapping[str, Any],
        before: Mapping[int, Any],
    ) -> None:
        self._backend, self._model = runner.backend, runner.model
        self._probe, self._segment = probe, segment
        self._found = runner.stages["train"].found
        self._own = runner.stages["train"].own
        read = self._backend.to_numpy
        was = {**before, **{id(v): value for v, value in probe.born}}
        self._changes = {
            path: (v, Change(read(was[id(v)]), read(self._backend.read(v))))
            for path, v in runner.renewed()
            if id(v) in was
        }
        self._paths = {id(v): path for path, (v, _) in self._changes.items()}
        self._batch = {
            name: _tree(self._host, part)
            for name, part in zip(PARTS, batch, strict=False)
        }
        self._outputs = scalars(outputs)

    def opened(
        self,
        *,
        step: int,
        gear: Gear | None,
        examples: np.ndarray | None,
        learning_rate: float | None,
        phases: Mapping[str, float],
    ) -> OpenedStep:
        """Everything that was seen."""
        judged, missing = self._judged(), self._missing()
        losses = self._losses(judged)
        per_example = self._loss_per_example(judged)
        total = self._outputs.get("loss")
        if per_example is None:
            missing.append(
                "the loss per example: no keras.losses.Loss object computed one "
                "for each example of the batch"
            )
        elif total is not None and np.isfinite(total):
            mean = float(per_example.mean()) + losses.get("regularization", 0.0)
            if abs(mean - total) > APART * abs(total):
                missing.append(
                    "weights of the losses: their mean over the examples is "
                    f"{mean:.6g}, what the step returns {total:.6g}"
                )
        updates, gradients = self._updates(), self._gradients()
        kinds = self._kinds({u.path for u in updates})
        return OpenedStep(
            step=step,
            gear=gear.name if gear is not None else None,
            batch=self._batch,
            examples=examples,
            layers=self._layers(),
            predictions=[self._host(j.y_pred) for _, _, j in judged],
            labels=[self._host(j.y_true) for _, _, j in judged],
            outputs=self._outputs,
            losses=losses,
            loss_per_example=per_example,
            gradients=gradients,
            updates=updates,
            optimizer=kinds["optimizer"],
            metrics=kinds["metrics"],
            seeds=kinds["seeds"],
            others=kinds["others"],
            learning_rate=learning_rate,
            phases=dict(phases),
            first_nonfinite=self._first_nonfinite(gradients),
            missing=tuple(missing),
        )

    # The data.

    def _host(self, value: Any) -> Any:
        """On the host; what is no dense array as it is."""
        try:
            return np.array(self._backend.to_numpy(value))
        except (TypeError, ValueError, NotImplementedError):
            return value

    @property
    def _size(self) -> int:
        return self._segment.feed.batch_size

    # Forward.

    def _layers(self) -> list[LayerOutput]:
        found = []
        for call in self._probe.calls:
            gradients = call.gradients or [None] * len(call.outputs)
            for i, (output, gradient) in enumerate(
                zip(call.outputs, gradients, strict=True)
            ):
                values = self._host(output)
                if not isinstance(values, np.ndarray):
                    continue
                found.append(
                    LayerOutput(
                        path=f"{call.path}#{i}" if i else call.path,
                        call=call.number,
                        kind=type(call.layer).__name__,
                        shape=values.shape,
                        dtype=values.dtype.name,
                        stats=stats(values) if is_number(values) else None,
                        values=values,
                        gradient=None if gradient is None else self._host(gradient),
                    )
                )
        return found

    def _judged(self) -> list[tuple[str, float, Judged]]:
        """Each call of a loss, with its name and weight where `compile` gave some."""
        calls = self._probe.judged
        compiled = getattr(self._model, "_compile_loss", None)
        parts = list(getattr(compiled, "_flat_losses", None) or ())
        if [id(p.loss) for p in parts] == [id(j.loss) for j in calls]:
            return [
                (p.name, 1.0 if p.loss_weights is None else float(p.loss_weights), j)
                for p, j in zip(parts, calls, strict=True)
            ]
        names = _unique([j.loss.name for j in calls])
        return [(name, 1.0, j) for name, j in zip(names, calls, strict=True)]

    def _losses(self, judged: Sequence[tuple[str, float, Judged]]) -> dict[str, float]:
        values = {n: w * _number(self._host(j.value)) for n, w, j in judged}
        added = [_number(self._host(loss)) for loss in self._probe.regularization]
        return {**values, **({"regularization": sum(added)} if added else {})}

    def _loss_per_example(
        self, judged: Sequence[tuple[str, float, Judged]]
    ) -> np.ndarray | None:
        total: np.ndarray | None = None
        for _, weight, call in judged:
            part = weight * self._unreduced(call)
            if part.shape != (self._size,):
                return None
            total = part if total is None else total + part
        return total

    def _unreduced(self, call: Judged) -> np.ndarray:
        """The loss of each example: the mean over every axis but the first."""
        import keras

        def tensor(value: Any) -> Any:
            return keras.ops.convert_to_tensor(value, dtype=call.loss.dtype)

        y_true, y_pred = (
            keras.tree.map_structure(tensor, v) for v in (call.y_true, call.y_pred)
        )
        values = as_float(self._host(call.loss.call(y_true, y_pred)))
        mask = getattr(call.y_pred, "_keras_mask", None)
        for factor in (call.sample_weight, mask):
            if factor is not None:
                factor = as_float(self._host(factor))
                if factor.ndim > values.ndim and factor.shape[-1] == 1:
                    factor = factor[..., 0]
                extra = (1,) * (values.ndim - factor.ndim)
                values = values * factor.reshape(factor.shape + extra)
        if values.ndim < 2:
            return np.asarray(values)
        return np.asarray(values.reshape(len(values), -1).mean(axis=1))

    # Backward.

    def _applied(self) -> Iterator[tuple[Any, Any]]:
        """Every trained variable and its gradient: the last one it was given."""
        found = {
            id(v): (v, g)
            for call in self._probe.applied
            for v, g in zip(call.variables, call.gradients, strict=False)
        }
        yield from found.values()

    def _gradients(self) -> list[Gradient]:
        found = []
        for variable, gradient in self._applied():
            values = None if gradient is None else self._host(gradient)
            path = self._paths.get(id(variable), variable.path)
            seen = None if values is None else stats(values)
            found.append(Gradient(path, seen, values))
        return found

    def _updates(self) -> list[Update]:
        found = []
        for variable, _ in self._applied():
            path = self._paths.get(id(variable))
            if path is None:
                continue
            change = self._changes[path][1]
            with np.errstate(all="ignore"):
                moved = as_float(change.after) - as_float(change.before)
            was, far = norm(change.before), norm(moved)
            ratio = far / was if was else None
            found.append(Update(path, far, was, ratio, change.before, moved))
        return found

    # What was changed.

    def _kinds(self, trained: set[str]) -> dict[str, dict[str, Change]]:
        optimizers = [getattr(self._model, "optimizer", None), *self._found.optimizers]
        optimizers += [call.optimizer for call in self._probe.applied]
        of_optimizer = {id(v) for o in optimizers if o is not None for v in o.variables}
        of_metric = {id(v) for m in self._probe.metrics for v in m.variables}
        found: dict[str, dict[str, Change]] = {
            kind: {} for kind in ("optimizer", "metrics", "seeds", "others")
        }
        for path, (variable, change) in self._changes.items():
            if id(variable) in of_optimizer:
                found["optimizer"][path] = change
            elif id(variable) in of_metric:
                found["metrics"][path] = change
            elif "seed_generator" in path:
                found["seeds"][path] = change
            elif path not in trained and _moved(change):
                found["others"][path] = change
        return found

    # What is not finite.

    def _first_nonfinite(self, gradients: Sequence[Gradient]) -> NonFinite | None:
        """Where it began; `None` if all that the step leaves behind is finite.

        A mask of minus infinity that ends in zeros is nobody's fault.
        """
        left: list[Any] = [np.array(list(self._outputs.values()))]
        left += [g.values for g in gradients if g.values is not None]
        left += [change.after for _, change in self._changes.values()]
        if all(map(is_finite, left)):
            return None
        for name, array in leaves(self._batch):
            if not is_finite(array):
                return NonFinite(
                    "batch", name, examples=self._rows(array), outputs=[array]
                )
        for path, (_, change) in self._changes.items():
            if not is_finite(change.before):
                return NonFinite("variable", path, outputs=[change.before])
        for found in self._probe.origins:
            examples = next((r for r in map(self._rows, found.outputs) if r), ())
            return NonFinite(
                "operation",
                found.name,
                found.layer,
                found.phase,
                examples,
                found.inputs,
                found.outputs,
            )
        return None

    def _rows(self, array: np.ndarray) -> list[int]:
        """The positions in the batch that are not finite, where rows are examples."""
        if array.ndim == 0 or array.shape[0] != self._size:
            return []
        rows = as_float(array).reshape(self._size, -1)
        return np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist()

    def _missing(self) -> list[str]:
        probe, missing = self._probe, list(self._backend.unseen)
        if not probe.calls:
            missing.append("layers: the step computes them where nobody can look")
        if not probe.applied:
            missing.append("gradients: no Keras optimizer applied any")
        return missing


def _tree(host: Any, value: Any) -> Any:
    import keras

    return keras.tree.map_structure(host, value)


def scalars(outputs: Mapping[str, Any]) -> dict[str, float]:
    """The step's outputs by name: the program has stacked them."""
    named = {n: v for n, v in outputs.items() if n != LOGS}
    if not named and isinstance(outputs.get(LOGS), dict):
        named = outputs[LOGS]
    return {n: float(v[0]) for n, v in named.items() if np.ndim(v) == 1}


def _number(value: np.ndarray) -> float:
    return float(as_float(value).mean())


def _moved(change: Change) -> bool:
    return change.before.tobytes() != change.after.tobytes()


def _unique(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}#{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]
