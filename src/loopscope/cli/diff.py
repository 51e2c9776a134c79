"""`loopscope diff`: two steps side by side."""

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
@click.argument(
    "other", metavar="[OTHER]", required=False, type=click.Path(path_type=Path)
)
@click.option("--step", type=int, help="Global number, from 0.")
@click.option("--other-step", type=int, help="The step to compare it with.")
@click.option("--gear", help="Compare the gear of the run with this one.")
@json_option
@command
def diff(
    path: Path,
    other: Path | None,
    step: int | None,
    other_step: int | None,
    gear: str | None,
    as_json: bool,
) -> int:
    """Open up two steps and say where they part first.

    The same step of two runs (DIR and OTHER; without --step the first one that has
    another loss), two steps of one run (--step, --other-step), or one step in two gears
    (--step, --gear). Exits 1 if they part.
    """
    start_backend_of(path)
    from loopscope.runs import open_run
    from loopscope.view import text

    run = open_run(path)
    beside = None if other is None else open_run(other)
    a, b, found = run.diff(step, other=beside, other_step=other_step, gear=gear)
    document = {"step": a, "other_step": b, **found.as_dict()}
    if as_json:
        print_json(document)
    else:
        text.console().print(text.difference(document), soft_wrap=True)
    return 1 if found.partings else 0
