"""Which checkpoints stay.

The newest, the best, the first and the pinned ones always do. Of the others, those are
let go whose absence leaves no gap of more steps than may have to be replayed; and, when
all together are too large for the disk, those whose absence leaves the smallest gap.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """A checkpoint, as far as keeping it goes."""

    name: str
    step: int
    size_bytes: int
    pinned: bool = False


def superfluous(
    kept: Sequence[Kept],
    *,
    replay_steps: int,
    disk_bytes: int,
    always: Collection[str] = (),
) -> list[str]:
    """The names of those that may go.

    Args:
        kept: All there are, by step.
        replay_steps: The most steps between two, as long as the disk allows.
        disk_bytes: The most that all may take. Those that always stay may take more.
        always: Names of those that stay in any case, beside the first, the two newest
            and the pinned ones.
    """
    rest, gone = list(kept), []

    def gaps() -> list[tuple[int, int]]:
        """(gap left by its absence, place) of each that may go, smallest first."""
        return sorted(
            (rest[i + 1].step - rest[i - 1].step, i)
            for i in range(1, len(rest) - 2)
            if not rest[i].pinned and rest[i].name not in always
        )

    while free := gaps():
        gap, place = free[0]
        too_large = sum(k.size_bytes for k in rest) > disk_bytes
        if gap > replay_steps and not too_large:
            break
        gone.append(rest.pop(place).name)
    return gone
