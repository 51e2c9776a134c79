"""Runs, gears and findings as HTML, for notebooks. Asks for nothing from elsewhere.

What shows itself hands over plain data, such as its `as_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from loopscope.figures.cells import measured

STYLE = """
.loopscope { font: 14px/1.45 system-ui, sans-serif; color-scheme: light dark; }
.loopscope table { border-collapse: collapse; margin: .3em 0 1em; }
.loopscope th, .loopscope td { padding: .15em .7em .15em 0; text-align: right; }
.loopscope th { font-weight: 600; border-bottom: 1px solid #8886; }
.loopscope th:first-child, .loopscope td:first-child { text-align: left; }
.loopscope .examples { display: flex; flex-wrap: wrap; gap: .6em; }
.loopscope figure { margin: 0; width: 7.5em; font-size: 12px; }
.loopscope img { width: 5em; height: 5em; image-rendering: pixelated; }
.loopscope .bad { color: #c22; font-weight: 600; }
.loopscope .bar { fill: #48a; }
.loopscope .line { fill: none; stroke: #48a; }
.loopscope .chosen { font-weight: 600; }
.loopscope dt { font-weight: 600; }
.loopscope summary { cursor: pointer; font-weight: 600; }
"""

WIDTH, HEIGHT = 480, 120
"""Of a curve, in pixels."""


def fragment(*parts: str) -> str:
    """What a notebook shows: parts, under one style."""
    return f'<div class="loopscope"><style>{STYLE}</style>{"".join(parts)}</div>'


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, escaped: bool = False
) -> str:
    """A table; every column but the first is aligned to the right."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{c if escaped else escape(c)}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def short(value: Any) -> str:
    """A value in few characters."""
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gears(reports: Sequence[Mapping[str, Any]]) -> str:
    """`GearReport`s as a table; the gear of the training stands out."""
    columns = ("gear", "compile s", "ms/step", "pays after", "difference", "note")
    rows = []
    for r in reports:
        name = _chosen(r["gear"]) if r["chosen"] else escape(r["gear"])
        if not r["available"]:
            rows.append((name, "", "", "", "", escape(r["reason"])))
            continue
        rows.append((name, *measured(r), escape(r["reason"])))
    return fragment(table(columns, rows, escaped=True))


def estimate(line: str, rows: Sequence[Sequence[str]], reason: str, chosen: str) -> str:
    """What a training would take; the gear that it would run in stands out.

    Args:
        line: All of it in short.
        rows: What each gear would take, below the heads of the columns; none where
            none could be measured.
        reason: Why the gear that it would run in is that one.
        chosen: The name of that gear.
    """
    shown = ""
    if rows:
        head, *body = rows
        cells = (
            (_chosen(name) if name == chosen else escape(name), *map(escape, others))
            for name, *others in body
        )
        shown = table(head, cells, escaped=True)
    why = f"<p>why this gear: {escape(reason)}</p>"
    return fragment(f"<p>{escape(line)}</p>", shown, why)


def findings(found: Sequence[Mapping[str, Any]], *, checks: int | None = None) -> str:
    """`Finding`s, each with its evidence and what to change.

    Args:
        found: `Finding.as_dict()` of each.
        checks: How many were made, to say so where nothing was found.
    """
    if not found:
        made = "1 check" if checks == 1 else f"{checks or 0} checks"
        return fragment(f"<p>{made}, nothing found</p>")
    return fragment(*(_finding(f) for f in found))


def failed(checks: Mapping[str, str]) -> str:
    """Checks that could not be made, with the reason; nothing where all could."""
    if not checks:
        return ""
    return fragment(table(("could not be checked", ""), checks.items()))


def run(
    summary: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    curve: tuple[np.ndarray, np.ndarray] | None,
) -> str:
    """A recorded run: what it is, its loss, and its epochs.

    Args:
        summary: `Summary.as_dict()`.
        epochs: Of `Run.epochs`.
        curve: Steps and losses, where there are some.
    """
    said = ("status", "experiment", "backend", "gear", "epochs", "steps", "loss")
    rows = [(name, short(summary[name])) for name in said if summary[name] is not None]
    problem = summary["problem"]
    parts = [
        f"<h3>{escape(str(summary['path']))}</h3>",
        f'<p class="bad">{escape(problem)}</p>' if problem else "",
        table(("run", ""), rows),
        "" if curve is None else line(*curve, label="loss by step"),
    ]
    if epochs:
        names = tuple(dict.fromkeys(name for row in epochs for name in row))
        cells = ([short(row.get(name)) for name in names] for row in epochs)
        parts.append(table(names, cells))
    return fragment(*parts)


def rewound(found: Mapping[str, Any]) -> str:
    """What running a past step again has shown, but for the step itself.

    Args:
        found: `Rewound.as_dict()`.
    """
    same = found["identical"]
    verdict = "the recorded bits" if same else "NOT the recorded bits"
    apart = found["first_difference"]
    rows = [
        ("step", f"{found['step']:,}"),
        ("epoch", str(found["epoch"])),
        ("batch of the epoch", str(found["batch_index"])),
        ("gear", found["gear"]),
        ("loss, recorded", _exact(found["loss_recorded"])),
        ("loss, now", _exact(found["loss_replayed"])),
        ("replayed from step", f"{found['checkpoint_step']:,}"),
    ]
    if apart is not None:
        rows.append(("first departs at step", f"{apart['step']:,}"))
    mark = "" if same else ' class="bad"'
    return fragment(table(("run again", ""), rows), f"<p{mark}>{verdict}</p>")


def line(x: np.ndarray, y: np.ndarray, *, label: str) -> str:
    """A curve as SVG, with its extremes written beside it."""
    keep = np.isfinite(y)
    if keep.sum() < 2:
        return ""
    x, y = x[keep].astype(np.float64), y[keep].astype(np.float64)
    across = 60 + (x - x[0]) / ((x[-1] - x[0]) or 1) * (WIDTH - 70)
    up = HEIGHT - 20 - (y - y.min()) / ((y.max() - y.min()) or 1) * (HEIGHT - 30)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="11" fill="currentColor" '
        f'role="img" aria-label="{escape(label)}">'
        f'<polyline class="line" points="{points}"/>'
        f'<text x="2" y="14">{y.max():.4g}</text>'
        f'<text x="2" y="{HEIGHT - 20}">{y.min():.4g}</text>'
        f'<text x="60" y="{HEIGHT - 4}">{escape(label)}</text></svg>'
    )


def _finding(found: Mapping[str, Any]) -> str:
    bad = ' class="bad"' if found["severity"] == "error" else ""
    numbers = ", ".join(f"{k} {short(v)}" for k, v in found["measured"].items())
    said = (
        ("measured", numbers),
        ("where", found["where"]),
        ("change", found["change"]),
        ("more", found["link"]),
    )
    rows = ((f"{escape(k)}", escape(str(v))) for k, v in said if v)
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in rows)
    head = f"{found['severity']}: {found['message']} [{found['check']}]"
    return f"<p{bad}>{escape(head)}</p><dl>{listed}</dl>"


def _chosen(gear: str) -> str:
    return f'<span class="chosen">{escape(gear)} *</span>'


def _exact(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"
