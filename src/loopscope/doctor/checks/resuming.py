"""Data that another process could not have again."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding


def check(facts: Facts) -> Iterator[Finding]:
    """Ask the source."""
    reason = facts.source.inexact()
    if reason:
        yield Finding(
            "resuming",
            "warning",
            f"This training cannot be repeated or resumed exactly: {reason}",
            "the training data",
            "Seed the shuffle, or give a keras.utils.PyDataset, Grain or arrays.",
        )
