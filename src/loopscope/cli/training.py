"""What `train` and `resume` share: training an experiment, and saying how it went."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopscope.cli.common import LOST, print_json
from loopscope.errors import UsageError, WorkerError


def train_and_tell(made: Any, changes: dict[str, Any], *, as_json: bool) -> None:
    """Train an experiment with some changed arguments; the chief prints its metrics."""
    from loopscope.events import EpochEnd, Resumed
    from loopscope.view import text
    from loopscope.view.progress import ProgressLine

    loop, out = made.loop, text.console()
    chief = loop.together.chief
    total = changes.get("epochs") or made.arguments.get("epochs", 1)
    changes = {"verbose": 0, **changes}
    began_at = loop.step

    def say(event: Any) -> None:
        nonlocal began_at
        if isinstance(event, EpochEnd):
            out.print(
                f"epoch {event.epoch + 1}/{total} - {event.wall_s:.1f} s - "
                f"{text.metrics(event.logs)}"
            )
        elif isinstance(event, Resumed):
            began_at = event.step
            if event.epoch < total:
                out.print(
                    f"goes on at step {event.step}, epoch {event.epoch + 1}/{total}"
                )
            else:
                out.print(f"all {total} epochs are trained; nothing is left to do")

    line = ProgressLine()
    if chief and not as_json:
        loop.subscribe(line)
        loop.subscribe(say)
    began = time.perf_counter()
    with line.shown(), _leaving(loop.together.several):
        history = made.fit(**changes)
    seconds = time.perf_counter() - began
    if not chief:
        return
    metrics = {name: values[-1] for name, values in history.history.items()}
    state = loop.state.sha256()
    run = changes.get("run")
    result = {
        "steps": loop.step,
        "epochs": len(history.epoch),
        "gear": loop.gear.name if loop.gear else None,
        "metrics": metrics,
        "seconds": seconds,
        "state_sha256": state,
    }
    if run is not None:
        result["run"] = str(run)
    if as_json:
        print_json(result)
        return
    out.print(
        f"{loop.step - began_at} steps in gear {result['gear']}, {seconds:.1f} s, "
        f"state {state[:12]}"
    )
    if run is not None:
        out.print(f"recorded in {run}", soft_wrap=True)


@contextmanager
def _leaving(several: bool) -> Iterator[None]:
    """A block that one of several workers may fail in, and then ends at once.

    At its exit a framework would wait for the others, which wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if several:
            # Called before what the framework has registered.
            atexit.register(_leave, _code_of(error))
        raise


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _code_of(error: BaseException) -> int:
    """The exit code of the program that ends in this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else bool(error.code)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, WorkerError):
        return LOST
    return 2 if isinstance(error, UsageError) else 1


def fresh_run(name: str) -> Path:
    """A folder for a run that was given none: runs/NAME-TIME."""
    # An experiment may be named by its file: the function's name is enough.
    name = name.rpartition(":")[2]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{name}-{stamp}"
    count = 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{name}-{stamp}-{count}"
    return path
