"""`loopscope doctor`: look for the classic bugs of training loops."""

from __future__ import annotations

import click

from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    print_json,
    start_backend,
)


@click.command()
@click.argument("experiment")
@backend_option
@click.option(
    "--check", "checks", multiple=True, help="Make only this one; repeatable."
)
@json_option
@command
def doctor(
    experiment: str, backend: str | None, checks: tuple[str, ...], as_json: bool
) -> int:
    """Run some steps of EXPERIMENT and report what is wrong with it.

    Each finding has what was measured, where, and what to change. Exits 1 if there is
    one. Nothing is trained or recorded.
    """
    start_backend(backend)
    from loopscope.experiment import load

    found = load(experiment).doctor(checks=checks or None)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(str(found))
    return 0 if found.healthy else 1
