"""`loopscope verify`: replay a run and compare every bit."""

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
@click.option("--all", "whole", is_flag=True, help="Every step, not three stretches.")
@json_option
@command
def verify(path: Path, whole: bool, as_json: bool) -> int:
    """Replay stretches of the run in DIR from their checkpoints, and compare.

    Every loss with the journal, every state at the end of a stretch with its recorded
    SHA-256. Exits 1 if anything departs, and says where and by how much.
    """
    start_backend_of(path)
    from loopscope.runs import open_run
    from loopscope.view import text

    out = text.console()
    found = open_run(path).verify(
        whole=whole,
        progress=None if as_json else lambda s: out.print(text.stretch(s)),
    )
    if as_json:
        print_json(found.as_dict())
    else:
        out.print(text.verification(found.as_dict()), soft_wrap=True)
    return 0 if found.verified else 1
