"""Where a training stands between two steps: all that the next step reads.

The loop gives one (`Loop.standing`) and can be set to one (`Loop.stand`), on the same
model or on another of the same build. How it is kept is for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cursor:
    """A position in the data.

    Attributes:
        epoch: The number of the epoch.
        index: Steps done of its pass over the training data.
        samples: Examples seen in them.
        begun: Whether those who listen were told that the epoch began.
    """

    epoch: int = 0
    index: int = 0
    samples: int = 0
    begun: bool = False


@dataclass(frozen=True, eq=False)
class Standing:
    """Everything that the next step reads.

    Attributes:
        step: Steps trained: the next one has this number.
        cursor: Where in the data.
        seed: Of the order of examples.
        gear: The name of the gear that training runs in.
        test_gear: The name of the gear that validation runs in.
        stopped: Whether training was told to end.
        state: Every variable's value by path, in order; on the device, or NumPy.
        meters: What the metrics of the open epoch keep outside of variables.
        logs: The metrics of the last epoch that is over.
        passes: Steps of each epoch before this one, by its number.
        specs: Of the batches that each phase's step was made for.
        tests: How many passes over validation data there were.
    """

    step: int
    cursor: Cursor
    seed: int
    gear: str | None
    test_gear: str | None
    stopped: bool
    state: Mapping[str, Any]
    meters: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, Any] = field(default_factory=dict)
    passes: Sequence[tuple[int, int]] = ()
    specs: Mapping[str, Any] = field(default_factory=dict)
    tests: int = 0
