"""The state: every variable that a step reads or writes, in a stable order.

Order: the model's variables (seed generators included), then the optimizers',
then the metrics', then whatever else a step was seen to touch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from loopscope.backend.base import Backend

Snapshot = list[Any]


class State:
    """An ordered collection of variables with unique paths.

    Args:
        variables: Keras variables (or the framework's own, where a step made
            one). Repetitions are dropped, the first place counts.
        backend: The backend that holds their values.
    """

    def __init__(self, variables: Iterable[Any], backend: Backend) -> None:
        self._backend = backend
        self._by_path: dict[str, Any] = {}
        for variable in {id(v): v for v in variables}.values():
            self._by_path[self._free_path(variable)] = variable

    def _free_path(self, variable: Any) -> str:
        path = str(getattr(variable, "path", variable.name))
        free, count = path, 1
        while free in self._by_path:
            count += 1
            free = f"{path}#{count}"
        return free

    @property
    def variables(self) -> list[Any]:
        """The variables, in order."""
        return list(self._by_path.values())

    def __len__(self) -> int:
        return len(self._by_path)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._by_path.items())

    def snapshot(self) -> Snapshot:
        """The values of now, on the device. Later steps do not change them."""
        return [self._backend.read(v) for v in self._by_path.values()]

    def restore(self, snapshot: Snapshot) -> None:
        """Set every variable back to `snapshot`."""
        for variable, value in zip(self._by_path.values(), snapshot, strict=True):
            self._backend.assign(variable, value)

    def numpy(self) -> dict[str, np.ndarray]:
        """A copy of every value on the host, by path. Waits for the device."""
        return {p: np.array(self._host(v)) for p, v in self._by_path.items()}

    def sha256(self) -> str:
        """SHA-256 over every variable's path, dtype, shape and bytes, in order."""
        digest = hashlib.sha256()
        for path, variable in self._by_path.items():
            value = np.ascontiguousarray(self._host(variable))
            digest.update(f"{path}\0{value.dtype.name}\0{value.shape}\0".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()

    def _host(self, variable: Any) -> np.ndarray:
        return self._backend.to_numpy(self._backend.read(variable))
