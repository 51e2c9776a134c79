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


def rewound(found: Mapping[str, Any]) -> str:
    """A past step that was run again."""
    same = "the recorded bits" if found["identical"] else "NOT the recorded bits"
    rate = found["learning_rate"]
    lines = [
        f"step {found['step']} (epoch {found['epoch']}, batch {found['batch_index']}) "
        f"in gear {found['gear']}",
        f"loss      {_exact(found['loss_replayed'])}, recorded "
        f"{_exact(found['loss_recorded'])}: {same}",
        f"replayed  {found['replayed_steps']} steps from the checkpoint before step "
        f"{found['checkpoint_step']}, {found['seconds']:.2f} s",
        *([] if rate is None else [f"rate      {rate:.6g}"]),
        f"before    state {found['state_sha256_before'][:12]}",
        f"after     state {found['state_sha256_after'][:12]}",
    ]
    return "\n".join(lines)


def _exact(value: Any) -> str:
    return "none" if value is None else f"{value:.9g}"


def stretch(segment: Any) -> str:
    """A stretch of a run that was replayed."""
    line = f"steps {segment.first} to {segment.stop - 1}: "
    if segment.verified:
        return line + "the recorded bits"
    if segment.first_difference is not None:
        return line + str(segment.first_difference)
    return line + "the recorded losses, but another state in the end"


def verification(found: Mapping[str, Any]) -> str:
    """What a verification comes to, on one line, and what has changed."""
    largest = found["largest_relative_difference"]
    if found["verified"]:
        line = f"verified: {found['steps']} steps replayed to the recorded bits"
    else:
        line = f"not verified: largest relative difference of a loss {largest:.1e}"
    changed = [
        f"{d['path']}: was {d['was']!r}, is {d['now']!r}" for d in found["differences"]
    ]
    return "\n".join([line, *changed])


def runs(found: Sequence[Mapping[str, Any]]) -> Table:
    """`Summary`s as a table."""
    columns = ("run", "status", "experiment", "gear", "epochs", "steps", "loss", "MB")
    rows = []
    for s in found:
        status = s["status"]
        if s["writer"]:
            status += f" (pid {s['writer'].get('pid')} on {s['writer'].get('host')})"
        elif status == "interrupted" and s["resumable_step"] is not None:
            status += f", goes on at step {s['resumable_step']}"
        elif s["problem"]:
            status += f": {s['problem']}"
        rows.append(
            (
                s["path"],
                status,
                f"{s['experiment']} ({s['backend']})" if s["backend"] else "",
                s["gear"] or "",
                str(s["epochs"]),
                f"{s['steps']:,}",
                "" if s["loss"] is None else f"{s['loss']:.4f}",
                f"{s['size_bytes'] / 1e6:.1f}",
            )
        )
    return table(columns, rows)
