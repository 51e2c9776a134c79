"""`loopscope train`: train an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    no_run_option,
    print_json,
    run_option,
    seed_option,
    start_backend,
)


@click.command()
@click.argument("experiment")
@run_option
@no_run_option
@click.option("--gear", help="How steps are executed.  [default: the experiment's]")
@click.option(
    "--watch",
    type=int,
    metavar="K",
    help="Measure the signals of every K-th step.  [default: the experiment's]",
)
@click.option("--epochs", type=int, help="Passes.  [default: the experiment's]")
@click.option("--estimate", is_flag=True, help="Only say how long it would take.")
@backend_option
@seed_option
@json_option
@command
def train(
    experiment: str,
    run: Path | None,
    no_run: bool,
    gear: str | None,
    watch: int | None,
    epochs: int | None,
    estimate: bool,
    backend: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train EXPERIMENT, print its metrics, and record it if asked to.

    The built-in experiment is recorded in any case, under runs/. SIGTERM and Ctrl-C
    end a recorded training after the chunk that runs, saved: `loopscope resume` goes
    on. --estimate measures some steps, prints what the whole training would take in
    each gear, and trains nothing.
    """
    start_backend(backend)
    from loopscope.cli.training import fresh_run, train_and_tell
    from loopscope.experiment import BUILT_IN, load

    made = load(experiment, seed=seed)
    changes: dict[str, Any] = {}
    if gear is not None:
        made.loop.gear = gear
    if watch is not None:
        made.loop.watch = watch
    if epochs is not None:
        changes["epochs"] = epochs
    if estimate:
        found = made.estimate(**changes)
        print_json(found.as_dict()) if as_json else click.echo(str(found))
        return
    made.loop.origin = {
        **made.loop.origin,
        "arguments": dict(changes),
        "gear": gear,
        "watch": watch,
    }
    if run is None and experiment in BUILT_IN and not no_run:
        run = fresh_run(experiment)
    if run is not None and not no_run:
        changes["run"] = run
    train_and_tell(made, changes, as_json=as_json)
