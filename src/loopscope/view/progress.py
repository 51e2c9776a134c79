"""Where a training stands, on one live line of a terminal, or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from loopscope.events import ChunkEnd, Event, GearChosen, PhaseBegin, PhaseEnd
from loopscope.view.notebook import NotebookLine, in_notebook


@contextmanager
def progress(loop: Any) -> Iterator[None]:
    """Show where a training stands, for the duration of a block.

    In a notebook as a bar with the epochs below it, on a terminal as one live line;
    elsewhere not at all. Meant for an outer loop of one's own: `fit` has Keras's bar.
    Costs some microseconds a chunk, and changes no bit.

    Example:
        ```python
        with loopscope.progress(loop):
            for epoch in loop.epochs(5):
                for step in epoch.train((x, y), every=None, batch_size=64):
                    pass
        ```

    Args:
        loop: A `Loop`.

    Returns:
        A context manager.
    """
    line = NotebookLine() if in_notebook() else ProgressLine()
    loop.subscribe(line)
    try:
        with line.shown():
            yield
    finally:
        loop.unsubscribe(line)


class ProgressLine:
    """Listens to a loop and shows the steps of the running pass.

    Shows nothing where standard error is no terminal.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    @contextmanager
    def shown(self) -> Iterator[ProgressLine]:
        """Show the line for the duration of a block."""
        with self._progress:
            yield self

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case PhaseBegin(phase=phase, steps=steps):
                self._task = self._progress.add_task(phase, total=steps, loss="")
            case ChunkEnd(steps=steps, outputs=outputs) if self._task is not None:
                loss = outputs.get("loss") if isinstance(outputs, dict) else None
                text = "" if loss is None else f"loss {float(loss[-1]):.4f}"
                self._progress.update(self._task, advance=steps, loss=text)
            case PhaseEnd() if self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
            case GearChosen(reason=reason):
                self._progress.console.print(f"gear: {reason}", soft_wrap=True)
