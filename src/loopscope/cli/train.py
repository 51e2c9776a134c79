"""`loopscope train`: train an experiment."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from loopscope.cli.beside import shown, view_option
from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    no_run_option,
    print_json,
    run_option,
    seed_option,
    start_backend,
    workers_option,
)


@click.command()
@click.argument("experiment")
@run_option
@no_run_option
@click.option("--resume", is_flag=True, help="Go on if --run is there already.")
@click.option("--gear", help="How steps are executed.  [default: the experiment's]")
@click.option(
    "--watch",
    type=int,
    metavar="K",
    help="Measure the signals of every K-th step.  [default: the experiment's]",
)
@click.option("--epochs", type=int, help="Passes.  [default: the experiment's]")
@click.option("--estimate", is_flag=True, help="Only say how long it would take.")
@workers_option
@view_option
@backend_option
@seed_option
@json_option
@command
def train(
    experiment: str,
    run: Path | None,
    no_run: bool,
    resume: bool,
    gear: str | None,
    watch: int | None,
    epochs: int | None,
    estimate: bool,
    workers: int | None,
    view: bool,
    backend: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Train EXPERIMENT, print its metrics, and record it if asked to.

    The built-in experiment is recorded in any case, under runs/. SIGTERM and Ctrl-C
    end a recorded training after the chunk that runs, saved: `loopscope resume` goes
    on. --estimate measures some steps, prints what the whole training would take in
    each gear, and trains nothing.

    --workers N trains on N processes, which divide each batch: the same loop, the
    same numbers up to rounding. A process that TF_CONFIG, torchrun or srun has made a
    worker joins the others without it.

    --view records a run and shows it in a browser. The page ends with the training; on
    a terminal it stays until Ctrl-C.
    """
    from loopscope.cli.launch import end_with_launcher, launch, relaunched

    if relaunched(workers):
        assert workers is not None
        return launch(workers)
    end_with_launcher()
    start_backend(backend)
    from loopscope.backend import join
    from loopscope.cli.training import fresh_run, train_and_tell
    from loopscope.errors import UsageError
    from loopscope.experiment import BUILT_IN, load

    with join():
        made = load(experiment, seed=seed)
    together = made.loop.together
    changes: dict[str, Any] = {}
    if gear is not None:
        made.loop.gear = gear
    if watch is not None:
        made.loop.watch = watch
    if epochs is not None:
        changes["epochs"] = epochs
    if estimate:
        if together.several:
            raise UsageError(
                "--estimate measures one process. Leave --workers away, and the "
                "variables of a launcher (TF_CONFIG, WORLD_SIZE, SLURM_STEP_NUM_TASKS)."
            )
        found = made.estimate(**changes)
        print_json(found.as_dict()) if as_json else click.echo(str(found))
        return 0
    made.loop.origin = {
        **made.loop.origin,
        "arguments": dict(changes),
        "gear": gear,
        "watch": watch,
    }
    if run is None and (view or experiment in BUILT_IN) and not no_run:
        run = together.of_chief(lambda: fresh_run(experiment))
    if run is not None and not no_run:
        changes["run"] = run
        changes["resume"] = resume
    page = view and together.chief
    with shown(changes.get("run"), as_json=as_json) if page else nullcontext():
        train_and_tell(made, changes, as_json=as_json)
    return 0
