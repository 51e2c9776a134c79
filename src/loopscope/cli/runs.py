"""`loopscope runs`: what runs there are."""

from __future__ import annotations

from pathlib import Path

import click

from loopscope.cli.common import command, json_option, print_json


@click.command()
@click.argument(
    "path",
    metavar="[DIR]",
    default="runs",
    type=click.Path(path_type=Path),
)
@json_option
@command
def runs(path: Path, as_json: bool) -> None:
    """List the runs in DIR and below it, newest first; DIR is `runs` if not given."""
    from loopscope.run import reading

    found = [s.as_dict() for s in reading.summaries(path)]
    if as_json:
        print_json(found)
        return
    from loopscope.view import text

    text.console().print(text.runs(found))
