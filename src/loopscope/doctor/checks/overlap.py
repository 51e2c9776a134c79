"""Examples that are both trained on and validated on."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding

SHARE = 0.01
"""Of the validation data that may be in the training data."""

DISTINCT = 0.9
"""Of the validation data that have to differ: rows of few numbers repeat by nature."""


def check(facts: Facts) -> Iterator[Finding]:
    """Compare the hashes of all rows, for data in arrays."""
    train, test = facts.hashes(facts.source), facts.hashes(facts.validation)
    if train is None or test is None or len(set(test)) < DISTINCT * len(test):
        return
    known = set(train)
    shared = sum(row in known for row in test)
    if shared > 1 and shared > SHARE * len(test):
        yield Finding(
            "overlap",
            "error",
            f"{shared} of {len(test)} examples of the validation data are among the "
            "training data",
            "argument validation_data",
            "Split the data before training, and drop what is there twice.",
            {"shared": shared, "share": shared / len(test)},
        )
