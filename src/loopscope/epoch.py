"""One epoch of an own outer loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loopscope.data.split import unpack

if TYPE_CHECKING:
    from loopscope.loop import Loop


@dataclass(frozen=True)
class StepReport:
    """One step, as the body of an own loop sees it.

    Attributes:
        index: Position in the epoch, counted from 0.
        number: The step's global number, counted from 0 over the loop's life.
        samples: Examples seen in this epoch so far.
        outputs: What the step returned, floats by name (`"loss"` for a scalar).
    """

    index: int
    number: int
    samples: int
    outputs: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The loss of this step's batch."""
        return self.outputs["loss"]


class Epoch:
    """One pass over the training data, and what belongs to it.

    Made by `Loop.epochs`, which has just reset the metrics.

    Attributes:
        index: The epoch's number, counted from 0.
        epochs: The number at which training stops.
    """

    def __init__(self, loop: Loop, index: int, epochs: int) -> None:
        self.index = index
        self.epochs = epochs
        self._loop = loop
        self._began = time.perf_counter()
        self._wall_s: float | None = None
        self.meters = loop.meters("train")
        self.meters.reset()
        self._validation: dict[str, Any] = {}

    def train(
        self,
        data: Any,
        *,
        every: int | None = 1,
        steps: int | None = None,
        batch_size: int | None = None,
        shuffle: bool = True,
    ) -> Iterator[StepReport]:
        """Train on `data` once; the body runs after steps 0, `every`, 2 `every`, ...

        What lies between two runs of the body is executed as one chunk in the
        fused gears. Leave the body at any time: the variables are as the step that
        was reported last has left them.

        Args:
            data: A source (`Loop.source`), an iterable of batches, arrays, or a
                tuple (x, y) or (x, y, sample_weight) of arrays.
            every: How often the body runs; `None`: not at all.
            steps: Stop after so many steps.
            batch_size: Examples of a step, for arrays.
            shuffle: Whether the epoch has an order of its own, for arrays.

        Yields:
            A `StepReport`. Its values are on the host already.
        """
        loop = self._loop
        source = loop.source(
            *_parts(data),
            batch_size=batch_size,
            shuffle=shuffle,
            steps_per_epoch=None,
        )
        chunks = loop.run_pass(
            "train",
            source,
            self.meters,
            epoch=self.index,
            epochs_left=self.epochs - self.index,
            limit=steps,
            every=every,
        )
        for chunk in chunks:
            last = chunk.index + chunk.steps - 1
            if every is not None and last % every == 0:
                yield StepReport(
                    last,
                    chunk.step + chunk.steps - 1,
                    chunk.samples,
                    {name: float(v[-1]) for name, v in chunk.outputs.items()},
                )

    def validate(
        self, data: Any, *, batch_size: int | None = None, steps: int | None = None
    ) -> dict[str, Any]:
        """Run the test step over `data`.

        Its metrics start from zero, and the training metrics of this epoch are left
        as they are, even where both use the same objects.

        Returns:
            The metrics by name; in `Epoch.metrics` they begin with `val_`.
        """
        source = self._loop.source(
            *_parts(data), batch_size=batch_size, shuffle=False, steps_per_epoch=steps
        )
        logs: dict[str, Any] = self._loop.test(source, limit=steps)
        self._validation = {f"val_{name}": value for name, value in logs.items()}
        return logs

    @property
    def metrics(self) -> dict[str, Any]:
        """Training metrics of the epoch so far, and those of the last validation."""
        return {**self.meters.results(), **self._validation}

    @property
    def seconds(self) -> float:
        """Wall time since the epoch began, validation included."""
        if self._wall_s is not None:
            return self._wall_s
        return time.perf_counter() - self._began

    def close(self) -> dict[str, Any]:
        """Stop the clock. Called by the loop when the epoch is over."""
        self._wall_s = self.seconds
        return self.metrics


def _parts(data: Any) -> tuple[Any, Any, Any]:
    return unpack(data) if isinstance(data, tuple) else (data, None, None)
