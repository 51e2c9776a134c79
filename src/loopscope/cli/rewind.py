"""`loopscope rewind`: run a past step again."""

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
def rewind(path: Path, step: int, as_json: bool) -> int:
    """Run step N of the run in DIR again, bit for bit; the run stays as it is.

    From the nearest checkpoint, in the gear that was used. Exits 1 if any step on the
    way gives another loss than the recorded one, and says where and why.
    """
    start_backend_of(path)
    from loopscope.runs import open_run
    from loopscope.view import text

    rewound = open_run(path).rewind(step)
    found = rewound.as_dict()
    if as_json:
        print_json(found)
    else:
        text.console().print(text.rewound(found), soft_wrap=True)
        if rewound.first_difference is not None:
            click.echo(str(rewound.first_difference), err=True)
    return 0 if rewound.identical else 1
