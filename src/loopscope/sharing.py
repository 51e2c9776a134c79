"""Between steps: what listeners of the chief have set, on every worker.

A callback that lowers the learning rate runs on the chief alone; without this the
next step of the others would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopscope.backend.base import Backend
from loopscope.errors import UsageError
from loopscope.state import State, changed
from loopscope.together import Together


class Sharing:
    """Lets the workers of a training have what the chief's listeners have assigned.

    Args:
        together: The workers.
        backend: Reads and assigns variables.
    """

    def __init__(self, together: Together, backend: Backend) -> None:
        self._together, self._backend = together, backend
        self._before: Mapping[str, Any] | None = None
        """The variables as steps have left them."""
        self._checked = False

    def begin(self, state: State) -> None:
        """A training begins: look, and check before the first step."""
        self._checked = False
        if self._together.several:
            # Everywhere: a first reading may change how a variable is read after it.
            state.values()
        self.look(state)

    def look(self, state: State) -> None:
        """Remember the variables as they are on every worker."""
        if self._together.several and self._together.chief:
            self._before = state.values()

    def share(self, state: State, said: Any = None) -> Any:
        """Assign on every worker what has changed since; the chief's `said` as well.

        Raises:
            UsageError: Workers have begun with other values; raised on all of them.
        """
        if not self._together.several:
            return said
        writes, before = [], self._before
        if before is not None:
            now = state.values()
            there = {path: before[path] for path in before if path in now}
            writes = list(changed(there, now, self._backend))
            self._before = None
        writes, said = self._together.agreed((writes, said))
        if not self._together.chief:
            state.write(dict(writes))
        if not self._checked:
            self._checked = True
            self._check(state)
        return said

    def _check(self, state: State) -> None:
        digests = self._together.gathered(bytes.fromhex(state.sha256()))
        others = [str(i) for i, theirs in enumerate(digests) if theirs != digests[0]]
        if others:
            raise UsageError(
                f"Other variables than the chief's on worker {', '.join(others)}. "
                "Expected the same model with the same initial values on every worker: "
                "call `keras.utils.set_random_seed` with the same seed before the "
                "model is made, or load the same weights. "
                f"Received: {len(state)} variables on worker {self._together.rank}"
            )


__all__ = ["Sharing"]
