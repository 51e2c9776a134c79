"""Runs, gears and steps as plotly figures. plotly is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from loopscope.errors import ExtraError

BLUE, ORANGE, GREY = "#4488aa", "#cc6600", "#999999"

NOT_METRICS = ("epoch", "first_step", "steps", "seconds")
"""What is said of an epoch beside its metrics."""

Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Steps, and the mean, least and greatest value at each point."""


def metrics(
    epochs: Sequence[Mapping[str, Any]], *, but: Collection[str] = ()
) -> list[str]:
    """The names of the metrics of epochs, those of validation without their `val_`."""
    names = [n for row in epochs for n in row if n not in NOT_METRICS]
    kinds = dict.fromkeys(n.removeprefix("val_") for n in names)
    return [name for name in kinds if name not in but]


def run(
    title: str,
    panels: Sequence[str],
    curves: Mapping[str, Curve],
    epochs: Sequence[Mapping[str, Any]],
) -> Any:
    """A run: what each step returned, and the metrics of its epochs.

    Args:
        title: Of the figure.
        panels: What is shown, from top to bottom.
        curves: By name of an output.
        epochs: Of `Run.epochs`.
    """
    go, figure = _panels(panels)
    # An epoch's metric is that of all its steps: it stands where the last one does.
    ends = [row["first_step"] + row["steps"] - 1 for row in epochs]
    for place, name in enumerate(panels, 1):
        if name in curves:
            for trace in _band(go, name, curves[name]):
                figure.add_trace(trace, row=place, col=1)
        for shown, colour in ((name, BLUE), (f"val_{name}", ORANGE)):
            values = [row.get(shown) for row in epochs]
            if any(value is not None for value in values):
                trace = go.Scatter(
                    x=ends,
                    y=values,
                    name=f"{shown}, by epoch",
                    mode="lines+markers",
                    line={"color": colour, "dash": "dot"},
                )
                figure.add_trace(trace, row=place, col=1)
    figure.update_xaxes(title="step", row=len(panels), col=1)
    return _laid_out(figure, title, 240 * len(panels) + 140)


def gears(reports: Sequence[Mapping[str, Any]]) -> Any:
    """Gears side by side: what so many steps take in each, compiling included.

    A gear that compiles starts late and rises slowly; where it crosses eager's line it
    has paid.

    Args:
        reports: `GearReport.as_dict()` of each.
    """
    go, figure = _panels(["milliseconds per step", "seconds, compiling included"])
    there = [r for r in reports if r["available"]]
    figure.add_trace(
        go.Bar(
            x=[r["gear"] for r in there],
            y=[r["ms_per_step"] for r in there],
            marker_color=[ORANGE if r["chosen"] else BLUE for r in there],
            text=[f"{r['ms_per_step']:.3g}" for r in there],
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    paid = [r["break_even_step"] for r in there if r["break_even_step"]]
    last = max(1000, 2 * max(paid, default=0))
    steps = np.linspace(0, last, 100)
    for r in there:
        seconds = r["compile_seconds"] + steps * r["ms_per_step"] / 1e3
        line = {"dash": "dash"} if r["gear"] == "eager" else {}
        trace = go.Scatter(x=steps, y=seconds, name=r["gear"], mode="lines", line=line)
        figure.add_trace(trace, row=2, col=1)
    for r in there:
        if r["break_even_step"]:
            at = r["break_even_step"]
            trace = go.Scatter(
                x=[at],
                y=[r["compile_seconds"] + at * r["ms_per_step"] / 1e3],
                name=f"{r['gear']} has paid",
                mode="markers",
                marker={"symbol": "x", "color": GREY},
                showlegend=False,
            )
            figure.add_trace(trace, row=2, col=1)
    figure.update_xaxes(title="steps", row=2, col=1)
    return _laid_out(figure, "Gears, the chosen one in orange", 620)


def step(found: Mapping[str, Any]) -> Any:
    """An opened step: the loss of each example, and gradients and updates over depth.

    Args:
        found: `OpenedStep.as_dict()`, with `"step"`, and under `"hover"` a text for
            each example of the batch.
    """
    panels = ["loss of each example", "norm of the gradient", "update / weight"]
    go, figure = _panels(panels)
    losses = found["loss_per_example"]
    if losses is not None:
        order = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")
        figure.add_trace(
            go.Bar(
                x=[str(i) for i in order],
                y=[losses[i] for i in order],
                hovertext=[found["hover"][i] for i in order],
                marker_color=BLUE,
                showlegend=False,
            ),
            row=1,
            col=1,
        )
    figure.update_xaxes(title="position in the batch", type="category", row=1, col=1)
    gradients, updates = found["gradients"], found["updates"]
    for place, records, value in ((2, gradients, "norm"), (3, updates, "ratio")):
        figure.add_trace(
            go.Bar(
                x=[r["path"] for r in records],
                y=[r[value] for r in records],
                marker_color=BLUE,
                showlegend=False,
            ),
            row=place,
            col=1,
        )
        figure.update_yaxes(type="log", row=place, col=1)
    loss = "" if found["loss"] is None else f", loss {found['loss']:.4g}"
    return _laid_out(figure, f"Step {found['step']:,}{loss}", 800)


def _band(go: Any, name: str, curve: Curve) -> list[Any]:
    """The mean of a curve, within its least and greatest values."""
    steps, mean, low, high = curve
    traces = []
    if (low != high).any():
        none = {"width": 0}
        traces = [
            go.Scatter(x=steps, y=high, line=none, showlegend=False, hoverinfo="skip"),
            go.Scatter(
                x=steps,
                y=low,
                line=none,
                fill="tonexty",
                fillcolor="rgba(68, 136, 170, 0.2)",
                showlegend=False,
                hoverinfo="skip",
            ),
        ]
    kept = {"color": BLUE, "width": 1}
    return [*traces, go.Scatter(x=steps, y=mean, name=f"{name}, by step", line=kept)]


def _panels(titles: Sequence[str]) -> tuple[Any, Any]:
    """Plotly's objects, and an empty figure with panels below each other."""
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ExtraError(
            "Figures need plotly, which is not installed. Install it by: "
            "pip install 'loopscope[view]'"
        ) from error
    rows = max(1, len(titles))
    spacing = 0.0 if rows == 1 else min(0.15, 0.5 / rows)
    made = make_subplots(rows, 1, subplot_titles=titles, vertical_spacing=spacing)
    return graph_objects, made


def _laid_out(figure: Any, title: str, height: int) -> Any:
    return figure.update_layout(
        title=title, height=height, template="plotly_white", margin={"t": 80, "b": 50}
    )
