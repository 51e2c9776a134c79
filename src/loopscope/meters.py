"""The metrics of a phase: reset together, read together.

Keras's metric objects do the work; here is only which of them belong to a phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loopscope.backend.base import Backend
from loopscope.data.feed import on_host

Initial = dict[int, tuple[tuple[Any, Any], ...]]
"""By the identity of a metric: its variables with their values after a reset."""


class Meters:
    """Metric objects and the running means of a step's own outputs.

    Args:
        model: A compiled model whose metrics count, or `None`.
        metrics: Metric objects that an own step updates.
        backend: Reads and sets their variables.
        keras: Whether the results are those that Keras's `fit` reports: the model's
            metrics, or the logs of the last step where these have other names.
        initial: Where the values of metrics after a reset are kept; may be shared.
    """

    def __init__(
        self,
        model: Any | None,
        metrics: list[Any],
        backend: Backend,
        *,
        keras: bool = False,
        initial: Initial | None = None,
    ) -> None:
        self._model, self._backend, self._keras = model, backend, keras
        of_model = {id(m) for m in self._model_metrics()}
        self._metrics = [m for m in metrics if id(m) not in of_model]
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._last_logs: Any = None
        self._results: dict[str, Any] | None = None
        self._initial: Initial = {} if initial is None else initial

    def reset(self) -> None:
        """Set every metric back to its initial state."""
        self._sums, self._steps, self._results = {}, 0, None
        self._last_logs = None
        if self._model is not None and _is_keras(self._model.reset_metrics):
            for metric in self._model.metrics:
                self._reset(metric)
        elif self._model is not None:
            self._model.reset_metrics()
        for metric in self._metrics:
            self._reset(metric)

    def _reset(self, metric: Any) -> None:
        """Reset one metric; Keras's own by the values that its first reset has set.

        An assignment of a value at hand takes a tenth of the time of making zeros.
        """
        keras, variables = _is_keras(metric.reset_state), metric.variables
        known = self._initial.get(id(metric), ())
        same = [id(v) for v in variables] == [id(v) for v, _ in known]
        if keras and known and same:
            self.resume(list(known))
            return
        metric.reset_state()
        if keras:
            values = [(v, self._backend.read(v)) for v in metric.variables]
            self._initial[id(metric)] = tuple(values)

    def add(
        self, outputs: Mapping[str, np.ndarray], steps: int, logs: Any = None
    ) -> None:
        """Take in the outputs of some steps, and the logs of the last one."""
        self._results, self._last_logs = None, logs
        if not self._keras:
            for name, values in outputs.items():
                total = self._sums.get(name, 0.0) + float(values.sum(dtype=np.float64))
                self._sums[name] = total
        self._steps += steps

    def results(self) -> dict[str, Any]:
        """Every metric's value by name.

        A step's own output counts as its mean over the steps, unless a metric
        has its name. Waits for the device.
        """
        if not self._steps:
            return {}  # Keras's metrics may not even be built yet.
        if self._results is None:
            found = self._of_keras() if self._keras else self._of_own_step()
            self._results = _numbers(found)
        return self._results

    def _of_keras(self) -> dict[str, Any]:
        assert self._model is not None
        results: dict[str, Any] = dict(self._model.get_metrics_result())
        logs = self._last_logs
        if logs is None or (isinstance(logs, dict) and set(logs) == set(results)):
            return results
        return dict(logs)

    def _of_own_step(self) -> dict[str, Any]:
        results = dict(self._model.get_metrics_result() if self._model else {})
        for metric in self._metrics:
            value = metric.result()
            named = value if isinstance(value, dict) else {metric.name: value}
            for name, part in named.items():
                results[_free(name, results)] = part
        means = {n: s / self._steps for n, s in self._sums.items()}
        return {**means, **results}

    def memory(self) -> dict[str, Any]:
        """What is kept outside of the metrics' variables; plain data."""
        return {
            "sums": dict(self._sums),
            "steps": self._steps,
            "last_logs": self._last_logs,
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Set back what `memory` gave; the variables are set by whoever has them."""
        self._sums, self._steps = dict(memory["sums"]), memory["steps"]
        self._last_logs, self._results = memory["last_logs"], None

    def suspend(self) -> list[tuple[Any, Any]]:
        """What `resume` needs to undo everything that happens in between."""
        variables = [
            v for m in (*self._model_metrics(), *self._metrics) for v in m.variables
        ]
        return [(v, self._backend.read(v)) for v in variables]

    def resume(self, suspended: list[tuple[Any, Any]]) -> None:
        """Set the metrics back to where `suspend` found them."""
        for variable, value in suspended:
            self._backend.assign(variable, value)

    def _model_metrics(self) -> list[Any]:
        return list(self._model.metrics) if self._model is not None else []


def _is_keras(method: Any) -> bool:
    """Whether a method is Keras's own, so that it does the same each time."""
    return str(getattr(method, "__module__", "")).startswith("keras.")


def _free(name: str, taken: Mapping[str, Any]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """Results on the host; a metric's own dict is taken apart, as in Keras's logs."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        flat.update(_numbers(value) if isinstance(value, dict) else {name: value})
    return {name: _number(value) for name, value in flat.items()}


def _number(value: Any) -> Any:
    array = on_host(value)
    return float(array) if array.ndim == 0 and array.dtype.kind not in "OSU" else array
