"""How a training is recorded: where, how often, how much may lie on the disk."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from loopscope.errors import UsageError


@dataclass(frozen=True)
class Recording:
    """Where and how a training is recorded; `fit(run=...)` takes one, or a path.

    Example:
        ```python
        loop.fit(x, y, epochs=5, run=loopscope.Recording("runs/a", replay_steps=500))
        ```

    Args:
        path: The run folder.
        replay_steps: The most steps between two checkpoints, so that any step can be
            had again by running no more than that.
        replay_s: Seconds of steps after which a checkpoint is made already, as long as
            checkpoints take no more than a sixtieth of the time.
        every_s: Seconds after which a checkpoint is made in any case.
        disk_bytes: The most that all checkpoints may take; beyond it older ones are
            thinned further. The first, the newest two and the best always stay.
        monitor: The metric that says which epoch's checkpoint is the best: the
            largest of an accuracy or the like, the smallest of everything else.

    Raises:
        UsageError: A path that is none, or a number that is not above 0.
    """

    path: str | os.PathLike[str]
    replay_steps: int = 2000
    replay_s: float = 0.5
    every_s: float = 60.0
    disk_bytes: int = 2**30
    monitor: str = "val_loss"

    def __post_init__(self) -> None:
        """Refuse what can be no recording."""
        if not isinstance(self.path, (str, os.PathLike)) or not os.fspath(self.path):
            raise UsageError(
                "`run` must be the path of a folder, or a `loopscope.Recording`. "
                f"Received: run={self.path!r}"
            )
        for name in ("replay_steps", "replay_s", "every_s", "disk_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                value = 0
            if not value > 0:
                raise UsageError(
                    f"`{name}` must be a number above 0. "
                    f"Received: {name}={getattr(self, name)!r}"
                )

    @classmethod
    def of(cls, run: Any) -> Recording:
        """What `fit(run=...)` was given, as a `Recording`."""
        return run if isinstance(run, cls) else cls(run)

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value of the monitored metric is the best so far."""
        if not math.isfinite(value):
            return False
        more = any(word in self.monitor for word in ("acc", "auc", "f1", "precision"))
        return best is None or (value > best if more else value < best)
