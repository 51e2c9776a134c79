"""Batches of one class only, shuffle buffers too small, epochs that are all alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

SHARE = 0.5
"""Of the entropy of all labels that a batch has to have, on average."""

FEWEST = 8
"""Examples of a batch: fewer have few classes by chance."""

MOST = 1000
"""Classes: more are no classes."""

BUFFER = 0.5
"""Of the examples that a shuffle buffer has to hold."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare the labels of batches with all labels; one epoch with the next."""
    batches = [_classes(batch) for batch in facts.batches]
    found = [b for b in batches if b is not None]
    if found and len(found) == len(batches) and len(found[0]) >= FEWEST:
        yield from _sorted(facts, found)
    yield from _shuffled(facts)
    yield from _repeated(facts)


def _classes(batch: tuple[Any, ...]) -> np.ndarray | None:
    y = batch[1] if len(batch) > 1 else None
    if not isinstance(y, np.ndarray):
        return None
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    return y if y.ndim == 1 and y.dtype.kind in "iub" else None


def _sorted(facts: Facts, batches: list[np.ndarray]) -> Iterator[Finding]:
    everything = facts.labels()
    if everything is None:
        everything = np.concatenate(batches)
    classes = len(np.unique(everything))
    if not 2 <= classes <= MOST:
        return
    whole = entropy(everything)
    # So many examples cannot have more.
    most = min(whole, np.log(len(batches[0])))
    mean = float(np.mean([entropy(b) for b in batches]))
    if mean < SHARE * most:
        yield Finding(
            "order",
            "error",
            "The examples of a batch have fewer classes than the data: they are sorted "
            "by class, or hardly shuffled",
            "the order of the data",
            "Shuffle before batching: shuffle=True, or dataset.shuffle(len(x)) before "
            ".batch().",
            {
                "entropy_of_a_batch": mean,
                "entropy_of_all": whole,
                "classes_of_a_batch": float(
                    np.mean([len(np.unique(b)) for b in batches])
                ),
                "classes": classes,
            },
            kind="sorted",
        )


def _shuffled(facts: Facts) -> Iterator[Finding]:
    calls = facts.source.shuffles()
    of_examples = [call for call in calls if not call.of_batches]
    if any(call.buffer >= BUFFER * call.size for call in of_examples):
        return  # Or nobody knows how many there are.
    for call in of_examples or calls:
        if call.of_batches:
            yield Finding(
                "order",
                "warning",
                "Batches are shuffled, not examples: the same examples stay together",
                call.where,
                "Shuffle before .batch().",
                {"buffer": call.buffer},
                kind="batches",
            )
        else:
            yield Finding(
                "order",
                "warning",
                f"The shuffle buffer holds {call.buffer:,} of {call.size:,} examples: "
                "those far apart in the data never meet",
                call.where,
                f"Use shuffle({call.size}), or shuffle the arrays once before.",
                {"buffer": call.buffer, "examples": call.size},
                kind="buffer",
            )


def _repeated(facts: Facts) -> Iterator[Finding]:
    source = facts.source
    first, second = source.examples(0, 0), source.examples(1, 0)
    if first is None or second is None or (source.steps or 0) < 2:
        return
    if np.array_equal(first, second):
        yield Finding(
            "order",
            "warning",
            "Every epoch goes through the same batches in the same order",
            "argument shuffle",
            "Set shuffle=True, so that the noise of the batches averages out.",
            {"steps": source.steps},
            kind="repeated",
        )


def entropy(labels: np.ndarray) -> float:
    """Of the shares of classes, in nats."""
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
