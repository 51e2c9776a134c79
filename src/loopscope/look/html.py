"""An opened step as HTML, for notebooks and files. Asks for nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope.figures.html import fragment as shown_as
from loopscope.figures.html import short, table
from loopscope.look.pictures import pictures
from loopscope.look.shown import KEPT_SIDE, small

if TYPE_CHECKING:
    from loopscope.look.opened import Change, OpenedStep

SHOWN = 16
"""How many examples are shown, the worst first."""


def page(step: OpenedStep) -> str:
    """A whole document, for a file: no script is in it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>step {step.step}</title></head><body>{fragment(step)}</body></html>\n"
    )


def fragment(step: OpenedStep) -> str:
    """What a notebook shows where scripts do not run."""
    first = step.first_nonfinite
    bad = (
        "" if first is None else f'<p class="bad">Not finite: {escape(str(first))}</p>'
    )
    missing = "".join(f"<li>{escape(m)}</li>" for m in step.missing)
    parts = [
        f"<h2>Step {step.step}</h2>",
        f"<p>{escape(_losses(step))}</p>",
        bad,
        _examples(step),
        "<h3>Layers</h3>",
        table(
            ("layer", "shape", "mean", "std", "min", "max", "zeros", "gradient"),
            (
                (
                    o.path if not o.call else f"{o.path} ({o.call + 1})",
                    "x".join(map(str, o.shape)),
                    *_some(o.stats, "mean", "std", "min", "max"),
                    "" if o.stats is None else f"{o.stats.zeros:.0%}",
                    "" if o.gradient_norm is None else short(o.gradient_norm),
                )
                for o in step.layers
            ),
        ),
        "<h3>Gradients and updates</h3>",
        _updates(step),
        "<h3>Time, executed eagerly</h3>",
        table(
            ("phase", "ms"), ((name, f"{ms:.2f}") for name, ms in step.phases.items())
        ),
        _changes("Optimizer", step.optimizer),
        _changes("Metrics", step.metrics),
        _changes("Random generators", step.seeds),
        _changes("Other variables", step.others),
        f"<h3>Not seen</h3><ul>{missing}</ul>" if missing else "",
    ]
    return shown_as(*parts)


def _losses(step: OpenedStep) -> str:
    parts = ", ".join(f"{n} {v:.6g}" for n, v in step.losses.items())
    line = f"loss {short(step.loss)}" + (f" ({parts})" if parts else "")
    if step.loss_difference is not None:
        line += (
            f"; recorded {short(step.loss_recorded)} in gear {step.gear}, relative "
            f"difference {step.loss_difference:.1e}"
        )
    if step.learning_rate is not None:
        line += f"; learning rate {step.learning_rate:.6g}"
    return line


def _examples(step: OpenedStep) -> str:
    order = step.worst
    if order is None or step.loss_per_example is None:
        return ""
    shown = pictures(step.picture_input())
    figures = []
    for i in order[:SHOWN].tolist():
        words = [f"loss {step.loss_per_example[i]:.4g}"]
        label, predicted = step.label(i), step.predicted(i)
        words += [] if label is None else [f"label {label}"]
        words += [] if predicted is None else [f"predicted {predicted}"]
        row = i if step.examples is None else int(step.examples[i])
        image = (
            ""
            if shown is None
            else f'<img alt="example {row}" src="{small(shown[i], KEPT_SIDE)}"><br>'
        )
        caption = "<br>".join(escape(w) for w in (f"example {row}", *words))
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return (
        f"<h3>Examples, the largest loss first</h3>"
        f'<div class="examples">{"".join(figures)}</div>'
    )


def _updates(step: OpenedStep) -> str:
    updates = {u.path: u for u in step.updates}
    rows = []
    for g in step.gradients:
        u = updates.get(g.path)
        rows.append(
            (
                escape(g.path),
                "none" if g.stats is None else short(g.stats.norm),
                "" if g.stats is None else f"{g.stats.zeros:.0%}",
                _bars(g.histogram()[0]),
                "" if u is None else short(u.norm),
                "" if u is None or u.ratio is None else short(u.ratio),
            )
        )
    return table(
        ("variable", "gradient", "zeros", "histogram", "update", "update / weight"),
        rows,
        escaped=True,
    )


def _bars(counts: np.ndarray) -> str:
    most = counts.max(initial=0)
    if not most:
        return ""
    bars = "".join(
        f'<rect class="bar" x="{4 * i}" width="3" y="{18 - h}" height="{h}"/>'
        for i, h in enumerate(np.ceil(18 * counts / most).astype(int).tolist())
    )
    return f'<svg width="{4 * len(counts)}" height="18">{bars}</svg>'


def _changes(title: str, changes: Mapping[str, Change]) -> str:
    if not changes:
        return ""
    rows = (
        (path, _value(change.before), _value(change.after))
        for path, change in changes.items()
    )
    shown = table(("variable", "before", "after"), rows)
    return f"<details><summary>{title} ({len(changes)})</summary>{shown}</details>"


def _value(array: np.ndarray) -> str:
    if array.size <= 4:
        return " ".join(str(v) for v in array.ravel().tolist())
    return f"norm {short(float(np.linalg.norm(array.astype(np.float64))))}"


def _some(stats: Any, *names: str) -> list[str]:
    if stats is None:
        return [""] * len(names)
    return [short(getattr(stats, name)) for name in names]
