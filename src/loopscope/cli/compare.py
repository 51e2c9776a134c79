"""`loopscope compare`: every gear on one experiment, side by side."""

from __future__ import annotations

import click

from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    print_json,
    seed_option,
    start_backend,
)

TOLERANCE = 1e-5
"""A gear that differs from eager by more, without a reason, is bad news."""


@click.command()
@click.argument("experiment")
@backend_option
@seed_option
@json_option
@command
def compare(experiment: str, backend: str | None, seed: int, as_json: bool) -> int:
    """Measure every gear on EXPERIMENT; nothing is trained.

    Compile seconds, milliseconds per step, the step from which compiling has paid,
    and the largest relative difference from eager in one step from the same state.
    The gear that auto takes bears a star. Exits 1 if a gear that runs differs from
    eager by more than 1e-5 for no stated reason.
    """
    name = start_backend(backend)
    from loopscope.experiment import load

    made = load(experiment, seed=seed)
    arguments = {
        key: value
        for key, value in made.arguments.items()
        if key in ("x", "y", "sample_weight", "batch_size")
    }

    def progress(gear: str) -> None:
        if not as_json:
            click.echo(f"measuring {gear} ...", err=True)

    reports = [r.as_dict() for r in made.loop.compare(**arguments, progress=progress)]
    if as_json:
        print_json({"experiment": experiment, "backend": name, "gears": reports})
    else:
        from loopscope.view import text

        text.console().print(text.gears(reports))
    wrong = [
        r
        for r in reports
        if r["available"]
        and not r["reason"]
        and not r["max_relative_difference"] <= TOLERANCE
    ]
    return 1 if wrong else 0
