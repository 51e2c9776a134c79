"""Tables and lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output: styled on a terminal, plain lines elsewhere."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=160)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table; every column but the first is aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def gears(reports: Sequence[Mapping[str, Any]]) -> Table:
    """`GearReport`s as a table."""
    columns = (
        "gear",
        "compile s",
        "ms/step",
        "pays after",
        "largest difference",
        "note",
    )
    rows = []
    for r in reports:
        name = f"{r['gear']} *" if r["chosen"] else r["gear"]
        if not r["available"]:
            rows.append((name, "-", "-", "-", "-", r["reason"]))
            continue
        paid = r["break_even_step"]
        rows.append(
            (
                name,
                f"{r['compile_seconds']:.2f}",
                f"{r['ms_per_step']:.3f}",
                "never" if paid is None else f"{paid:,} steps",
                f"{r['max_relative_difference']:.1e}",
                r["reason"],
            )
        )
    return table(columns, rows)


def metrics(logs: Mapping[str, Any]) -> str:
    """Metrics on one line."""
    return " - ".join(
        f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in logs.items()
    )
