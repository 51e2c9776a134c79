"""`loopscope doctor`: look for the classic bugs of training loops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    print_json,
    start_backend,
)

if TYPE_CHECKING:
    from loopscope.doctor.examine import Examination


@click.command()
@click.argument("experiment")
@backend_option
@click.option("--check", "checks", multiple=True, help="Make only this; repeatable.")
@click.option("--steps", default=30, show_default=True, help="Of a script, to watch.")
@json_option
@command
def doctor(
    experiment: str,
    backend: str | None,
    checks: tuple[str, ...],
    steps: int,
    as_json: bool,
) -> int:
    """Run some steps of EXPERIMENT and report what is wrong with it.

    Each finding has what was measured, where, and what to change. Exits 1 if there is
    one. Nothing is trained or recorded. EXPERIMENT may also be a script, `file.py`,
    with a loop of its own: it is run, watched for some steps, and ended.
    """
    start_backend(backend)
    found: Examination
    if experiment.endswith(".py"):
        from loopscope.doctor.script import examine_script

        found = examine_script(Path(experiment), steps=steps)
    else:
        from loopscope.experiment import load

        found = load(experiment).doctor(checks=checks or None)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(str(found))
    return 0 if found.healthy else 1
