"""`loopscope resume`: go on where a run stopped, or branch off it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from loopscope.cli.beside import shown, view_option
from loopscope.cli.common import (
    command,
    json_option,
    run_argument,
    start_backend_of,
    workers_option,
)


@click.command()
@run_argument
@click.option("--anyway", is_flag=True, help="Whatever has changed since.")
@click.option("--epochs", type=int, help="Stop at this number.  [default: as before]")
@click.option("--from-step", type=int, help="Branch off before this step.")
@click.option("--run", type=click.Path(path_type=Path), help="The branch's new folder.")
@click.option("--learning-rate", type=float, help="Of the branch, from there on.")
@click.option("--gear", help="Of the branch, from there on.")
@workers_option
@view_option
@json_option
@command
def resume(
    path: Path,
    anyway: bool,
    epochs: int | None,
    from_step: int | None,
    run: Path | None,
    learning_rate: float | None,
    gear: str | None,
    workers: int | None,
    view: bool,
    as_json: bool,
) -> int:
    """Go on with the run in DIR: at the next batch, to the bits it would have ended in.

    With --from-step and --run, a new run branches off: up to that step it is the same,
    then it goes on, with another learning rate or gear if asked. DIR stays as it is.

    --workers N goes on with N processes. Another number than before gives the same
    numbers up to rounding, not the same bits, and is said so.

    --view shows the run in a browser. The page ends with the training; on a terminal it
    stays until Ctrl-C.
    """
    from loopscope.cli.launch import end_with_launcher, launch, relaunched
    from loopscope.cluster import place
    from loopscope.errors import UsageError
    from loopscope.run.folder import Folder

    branching = (from_step, run, learning_rate, gear)
    if any(b is not None for b in branching) and None in (from_step, run):
        raise UsageError(
            "A branch needs both --from-step N and --run NEW; --learning-rate and "
            "--gear are for branches only."
        )
    several = relaunched(workers)
    if from_step is not None and (several or place(os.environ) is not None):
        raise UsageError(
            "One process makes a branch: leave --workers away and stop it with Ctrl-C, "
            "then go on with the branch: `loopscope resume NEW --workers N`."
        )
    if several:
        assert workers is not None
        return launch(workers)
    end_with_launcher()
    start_backend_of(path)
    from loopscope.backend import join
    from loopscope.cli.training import train_and_tell
    from loopscope.gear import resolve
    from loopscope.runs import experiment_of, open_run

    with join():
        made = experiment_of(Folder(path))
    if from_step is not None and run is not None:
        if gear is not None:
            backend = made.loop.backend
            resolve(gear, backend.gears, backend=backend.name, lacking=backend.lacking)
        open_run(path).branch(from_step, run, learning_rate=learning_rate, gear=gear)
        path = run
    changes: dict[str, Any] = {"run": path, "resume": "anyway" if anyway else True}
    if epochs is not None:
        changes["epochs"] = epochs
    page = view and made.loop.together.chief
    with shown(path, as_json=as_json) if page else nullcontext():
        train_and_tell(made, changes, as_json=as_json)
    return 0
