"""Two opened steps side by side: where they part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loopscope.compare import Moment, relative
from loopscope.look.opened import OpenedStep, leaves

Part = tuple[str, str, np.ndarray]
"""Kind, name and values."""


@dataclass(frozen=True)
class Parting:
    """Something that two steps do not have alike.

    Attributes:
        kind: `"batch"`, `"weight"`, `"random state"`, `"layer"`, `"output"`,
            `"gradient"`, `"update"` or `"after"`: in this order they come about.
        name: The part, path or name.
        relative: ‖a - b‖ / ‖a‖; infinite where the shapes differ or one is missing.
    """

    kind: str
    name: str
    relative: float

    def __str__(self) -> str:
        """On one line."""
        return f"{self.kind} {self.name}: relative difference {self.relative:.1e}"


@dataclass(frozen=True)
class StepDifference:
    """What two steps have alike, and what not.

    Attributes:
        compared: How many parts were compared.
        partings: Those that differ in a bit, in the order in which they come about.
    """

    compared: int
    partings: Sequence[Parting]

    @property
    def first(self) -> Parting | None:
        """Where they part first."""
        return self.partings[0] if self.partings else None

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "compared": self.compared,
            "first": None if self.first is None else asdict(self.first),
            "partings": [asdict(p) for p in self.partings],
        }


def difference(a: OpenedStep, b: OpenedStep) -> StepDifference:
    """Compare two opened steps, part by part, in the order of the execution."""
    return between(list(_parts(a)), list(_parts(b)))


def between(a: Sequence[Part], b: Sequence[Part]) -> StepDifference:
    """Compare parts in the order of `a`, by name; else by place.

    Names that Keras counts up differ between builds of one model in a process.
    """
    found, compared = [], 0
    for kind in dict.fromkeys(kind for kind, _, _ in (*a, *b)):
        mine = {name: values for k, name, values in a if k == kind}
        other = {name: values for k, name, values in b if k == kind}
        if set(mine) != set(other) and len(mine) == len(other):
            other = dict(zip(mine, other.values(), strict=True))
        for name in dict.fromkeys([*mine, *other]):
            compared += 1
            was, now = mine.get(name), other.get(name)
            if was is None or now is None or was.shape != now.shape:
                found.append(Parting(kind, name, float("inf")))
            elif was.tobytes() != now.tobytes():
                found.append(Parting(kind, name, relative(was, now)))
    return StepDifference(compared, found)


def _parts(step: OpenedStep) -> Iterator[Part]:
    for path, leaf in leaves(step.batch):
        yield "batch", path, leaf
    for update in step.updates:
        yield "weight", update.path, update.before
    for path, change in step.seeds.items():
        yield "random state", path, change.before
    for output in step.layers:
        name = f"{output.path} ({output.call + 1})" if output.call else output.path
        yield "layer", name, output.values
    yield from of_outputs(step.outputs)
    for gradient in step.gradients:
        if gradient.values is not None:
            yield "gradient", gradient.path, gradient.values
    for update in step.updates:
        yield "update", update.path, update.values


def of_moment(moment: Moment) -> list[Part]:
    """What a step in a compiled gear shows: its outputs, and the state after it."""
    after = [("after", path, value) for path, value in moment.after.items()]
    return [*of_outputs(moment.outputs), *after]


def of_outputs(outputs: Mapping[str, Any]) -> Iterator[Part]:
    """What a step returned, as parts."""
    for name, value in outputs.items():
        yield "output", name, np.asarray(value)
