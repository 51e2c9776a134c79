"""The metrics of a phase: reset together, read together.

Keras's metric objects do the work; here is only which of them belong to a phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loopscope.backend.base import Backend


class Meters:
    """Metric objects and the running means of a step's own outputs.

    Args:
        model: A compiled model whose metrics count, or `None`.
        metrics: Metric objects that an own step updates.
        backend: Reads and sets their variables.
    """

    def __init__(self, model: Any | None, metrics: list[Any], backend: Backend) -> None:
        self._model, self._backend = model, backend
        of_model = {id(m) for m in self._model_metrics()}
        self._metrics = [m for m in metrics if id(m) not in of_model]
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._results: dict[str, Any] | None = None

    def reset(self) -> None:
        """Set every metric back to its initial state."""
        self._sums, self._steps, self._results = {}, 0, None
        for metric in (*self._model_metrics(), *self._metrics):
            metric.reset_state()

    def add(self, outputs: Mapping[str, np.ndarray], steps: int) -> None:
        """Take in the outputs of some steps."""
        self._results = None
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
        if self._results is not None:
            return self._results
        results = dict(self._model.get_metrics_result() if self._model else {})
        for metric in self._metrics:
            value = metric.result()
            named = value if isinstance(value, dict) else {metric.name: value}
            for name, part in named.items():
                results[_free(name, results)] = part
        results = {name: _number(value) for name, value in results.items()}
        means = {n: s / self._steps for n, s in self._sums.items()}
        self._results = {**means, **results}
        return self._results

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


def _free(name: str, taken: Mapping[str, Any]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _number(value: Any) -> Any:
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array
