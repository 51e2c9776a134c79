"""`loopscope why`: the short story of a step."""

from __future__ import annotations

from pathlib import Path

import click

from loopscope.cli.common import (
    command,
    json_option,
    print_json,
    run_argument,
    start_backend_of,
)


@click.command()
@run_argument
@click.option("--step", type=int, required=True, help="Global number, from 0.")
@json_option
@command
def why(path: Path, step: int, as_json: bool) -> int:
    """Say why step N of the run in DIR has the loss that it has.

    The examples that carry it, the gradients that have jumped against the steps before,
    and what the loss would have been at half the learning rate or with gradients
    clipped: measured, by running the steps so. The run stays as it is.
    """
    start_backend_of(path)
    from loopscope.runs import open_run

    found = open_run(path).why(step)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo("\n".join(found.story()))
    return 0
