"""What a table says of a gear, for a terminal and for a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def measured(report: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Of a `GearReport`: seconds of compiling, ms a step, when it pays, difference."""
    paid = report["break_even_step"]
    return (
        f"{report['compile_seconds']:.2f}",
        f"{report['ms_per_step']:.3f}",
        "never" if paid is None else f"{paid:,} steps",
        f"{report['max_relative_difference']:.1e}",
    )
