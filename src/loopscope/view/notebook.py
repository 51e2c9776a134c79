"""Where a training stands, in a notebook: a bar, and below it the epochs so far.

One output of the cell that is written over, by IPython's own means: no widget, and no
package but the one that a notebook runs on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

from loopscope.events import (
    ChunkEnd,
    EpochBegin,
    EpochEnd,
    Event,
    GearChosen,
    PhaseBegin,
    PhaseEnd,
)
from loopscope.figures.html import fragment, short, table

REDRAW_S = 0.1
"""The least time between two pictures: each is a message to the browser."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class NotebookLine:
    """Listens to a loop and shows its running pass and the epochs that are over."""

    def __init__(self) -> None:
        self._phase, self._steps, self._done = "", 0, 0
        self._total: int | None = None
        self._epoch, self._gear = "", ""
        self._loss: float | None = None
        self._began = self._drawn = 0.0
        self._over: list[tuple[int, float, Mapping[str, Any]]] = []
        self._output: Any = None

    @contextmanager
    def shown(self) -> Iterator[NotebookLine]:
        """Show it for the duration of a block; the epochs stay after it."""
        from IPython.display import HTML, display

        self._output = display(HTML(self.html()), display_id=True)
        try:
            yield self
        finally:
            self._phase = ""
            self._draw()

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case EpochBegin(epoch=epoch, epochs=epochs):
                self._epoch = f"epoch {epoch + 1}" + (f"/{epochs}" if epochs else "")
            case PhaseBegin(phase=phase, steps=steps):
                self._phase, self._total, self._done = phase, steps, 0
                self._began, self._loss = time.monotonic(), None
            case ChunkEnd(steps=steps, outputs=outputs):
                self._done += steps
                loss = outputs.get("loss") if isinstance(outputs, dict) else None
                self._loss = None if loss is None else float(loss[-1])
                if time.monotonic() - self._drawn > REDRAW_S:
                    self._draw()
            case PhaseEnd():
                self._phase = ""
            case EpochEnd(epoch=epoch, logs=logs, wall_s=wall_s):
                self._over.append((epoch, wall_s, dict(logs)))
                self._draw()
            case GearChosen(reason=reason):
                self._gear = f"gear: {reason}"

    def html(self) -> str:
        """What is shown now."""
        parts = [f"<p>{escape(self._gear)}</p>"] if self._gear else []
        if self._phase:
            parts.append(self._bar())
        if self._over:
            names = list(
                dict.fromkeys(name for *_, logs in self._over for name in logs)
            )
            rows = (
                (str(n + 1), f"{s:.1f}", *(_of(logs, name) for name in names))
                for n, s, logs in self._over
            )
            parts.append(table(("epoch", "s", *names), rows))
        return fragment(*parts)

    def _bar(self) -> str:
        most = "" if self._total is None else f' max="{self._total}"'
        value = "" if self._total is None else f' value="{self._done}"'
        words = [self._epoch, self._phase, f"{self._done:,}"]
        words[-1] += "" if self._total is None else f"/{self._total:,}"
        words += [] if self._loss is None else [f"loss {self._loss:.4f}"]
        spent = time.monotonic() - self._began
        if self._done:
            words.append(f"{1e3 * spent / self._done:.2f} ms/step")
        said = escape(" · ".join(w for w in words if w))
        return f'<p><progress aria-label="{said}"{value}{most}></progress> {said}</p>'

    def _draw(self) -> None:
        from IPython.display import HTML

        self._drawn = time.monotonic()
        if self._output is not None:
            self._output.update(HTML(self.html()))


def _of(logs: Mapping[str, Any], name: str) -> str:
    return short(logs[name]) if name in logs else ""
