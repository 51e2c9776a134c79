"""A statement about speed, and whether it holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One statement about speed.

    Attributes:
        statement: What is to be reached.
        reached: What was.
        met: Whether; `None` where it could not be measured.
        why: What is known about a miss, in words.
    """

    statement: str
    reached: str
    met: bool | None
    why: str = ""


def percent(shares: Sequence[float]) -> str:
    """Shares of some rounds: the median, the least and the most."""
    return (
        f"{statistics.median(shares):+.1f} ({min(shares):+.1f} to {max(shares):+.1f})"
    )


def table_of(made: list[Target]) -> list[str]:
    """A section with every target, and with what is known about those missed."""
    lines = [
        "## Targets",
        "",
        "| statement | reached | met |",
        "|---|---|---|",
        *(f"| {t.statement} | {t.reached} | {_yes(t)} |" for t in made),
    ]
    missed = [t for t in made if not t.met]
    if missed:
        lines += ["", "### Not met", ""]
        lines += [
            f"- {t.statement}. Reached: {t.reached}.{' ' + t.why if t.why else ''}"
            for t in missed
        ]
    return lines


def _yes(target: Target) -> str:
    if target.met is None:
        return "not measured"
    return "yes" if target.met else "**no**"
