"""Batches of ever new shapes, each of which is compiled anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from loopscope.data.feed import Feed, NativeSpec, Segment, Spec
from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.gear import EAGER
from loopscope.runner import by_argument

MANY = 6
"""Programs: fewer are a ragged last batch, or some buckets."""

NEW = 2
"""Of them that only the second half of the batches needs: they do not end."""


def check(facts: Facts) -> Iterator[Finding]:
    """Count the programs that the next batches need."""
    gear = facts.trained
    if gear == EAGER or facts.first.error is not None:
        return
    needed: dict[str, Segment] = {}
    half = len(facts.shapes) // 2
    late = 0
    for number, segment in enumerate(facts.shapes):
        feed = segment.feed
        # A program that leaves axes open takes any length; XLA compiles it for each.
        key = _text(_specs(feed)) if gear.jit_compile else repr(feed.signature)
        if key not in needed:
            needed[key] = segment
            late += number >= half
    if len(needed) < MANY or late < NEW:
        return
    segments = list(needed.values())
    yield Finding(
        "retracing",
        "warning",
        f"{len(facts.shapes)} batches have {len(needed)} shapes, and in gear "
        f"{gear.name!r} the step is compiled for each",
        "; ".join(_differences(segments[-2].feed, segments[-1].feed)),
        "Pad batches to one shape, or to a few: dataset.padded_batch(n, padded_shapes="
        "...) or bucket_by_sequence_length(..., pad_to_bucket_boundary=True); sparse "
        "arrays to one number of entries.",
        {
            "batches": len(facts.shapes),
            "shapes": len(needed),
            **_cost(facts, segments[-1]),
        },
        kind="shapes",
    )


def _cost(facts: Facts, segment: Segment) -> dict[str, float]:
    """Milliseconds of a step on a new shape, and on the same once more."""
    took = []
    try:
        with facts.runner.state.kept():
            for _ in range(2):
                began = time.perf_counter()
                facts.runner.run("train", facts.trained, segment)
                took.append(1e3 * (time.perf_counter() - began))
    except Exception:
        return {}
    facts.runner.finished = 0
    return {"new_shape_ms": took[0], "known_shape_ms": took[1]}


def _specs(feed: Feed) -> Any:
    """The specs of a batch, with the lengths that it has."""
    import keras

    if feed.kind != "whole":
        return feed.specs

    def spec(given: Any, array: Any) -> Any:
        if isinstance(given, NativeSpec):
            return given
        return Spec(tuple(array.shape), given.dtype)

    return keras.tree.map_structure(spec, feed.specs, feed.arrays)


def _text(specs: Any) -> str:
    import keras

    return str([str(spec) for spec in keras.tree.flatten(specs)])


def _differences(one: Feed, other: Feed) -> Iterator[str]:
    """Each argument in which two batches differ."""
    was, now = by_argument(_specs(one)), by_argument(_specs(other))
    for path, spec in now.items():
        if spec != was.get(path):
            yield f"argument {path}: {was.get(path, 'absent')}, then {spec}"
