"""Which checkpoints stay.

The newest, the best, the first and the pinned ones always do. Of the others, those are
let go whose absence leaves no gap of more steps than may have to be replayed; and, when
all together are too large for the disk, those whose absence leaves the smallest gap.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """A checkpoint, as far as keeping it goes.

    Attributes:
        name: Of its files.
        step: Steps trained.
        size_bytes: Of its files.
        pinned: Whether it stays in any case.
        run_s: Seconds that its steps have taken.
    """

    name: str
    step: int
    size_bytes: int
    pinned: bool = False
    run_s: float = 0.0


def superfluous(
    kept: Sequence[Kept],
    *,
    replay_steps: int,
    replay_s: float = math.inf,
    disk_bytes: int,
    always: Collection[str] = (),
) -> list[str]:
    """The names of those that may go.

    Args:
        kept: All there are, by step.
        replay_steps: The most steps between two, as long as the disk allows.
        replay_s: The most seconds that those steps have taken, likewise.
        disk_bytes: The most that all may take. Those that always stay may take more.
        always: Names of those that stay in any case, beside the first, the two newest
            and the pinned ones.
    """
    rest, gone = list(kept), []

    def gap(before: Kept, after: Kept) -> float:
        """What lies between two, as a share of the most that may."""
        steps = (after.step - before.step) / replay_steps
        return max(steps, (after.run_s - before.run_s) / replay_s)

    def gaps() -> list[tuple[float, int]]:
        """(gap left by its absence, place) of each that may go, smallest first."""
        return sorted(
            (gap(rest[i - 1], rest[i + 1]), i)
            for i in range(1, len(rest) - 2)
            if not rest[i].pinned and rest[i].name not in always
        )

    while free := gaps():
        left, place = free[0]
        too_large = sum(k.size_bytes for k in rest) > disk_bytes
        if not too_large and left > 1:
            break
        gone.append(rest.pop(place).name)
    return gone
