"""A training loop for Keras 3 that can be looked into.

Importing this package imports neither Keras nor a framework: each public name
is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopscope import datasets, events
    from loopscope.backend import join
    from loopscope.drop_in import evaluate, fit, predict
    from loopscope.experiment import Experiment
    from loopscope.loop import Loop
    from loopscope.run.recording import Recording
    from loopscope.runs import open_run
    from loopscope.sharded import Sharded
    from loopscope.step import value_and_grad
    from loopscope.view.progress import progress

__version__ = "0.1.0"

_HOME = {
    "Experiment": "loopscope.experiment",
    "Loop": "loopscope.loop",
    "Recording": "loopscope.run.recording",
    "Sharded": "loopscope.sharded",
    "datasets": "",
    "evaluate": "loopscope.drop_in",
    "events": "",
    "fit": "loopscope.drop_in",
    "join": "loopscope.backend",
    "open_run": "loopscope.runs",
    "predict": "loopscope.drop_in",
    "progress": "loopscope.view.progress",
    "value_and_grad": "loopscope.step",
}

__all__ = [
    "Experiment",
    "Loop",
    "Recording",
    "Sharded",
    "datasets",
    "evaluate",
    "events",
    "fit",
    "join",
    "open_run",
    "predict",
    "progress",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOME[name]:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
