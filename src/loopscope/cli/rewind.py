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
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Write the step into a file: .npz, .safetensors or .html.",
)
@json_option
@command
def rewind(path: Path, step: int, save: Path | None, as_json: bool) -> int:
    """Run step N of the run in DIR again, bit for bit, and open it up.

    From the nearest checkpoint, in the gear that was used; the run stays as it is.
    Exits 1 if any step on the way gives another loss than the recorded one, and says
    where and why. What is inside the step is seen by executing it once more eagerly.
    """
    from loopscope.errors import RunError
    from loopscope.look import file

    if save is not None:
        file.check(save)
    start_backend_of(path)
    from loopscope.runs import open_run
    from loopscope.view import text

    rewound = open_run(path).rewind(step)
    found = rewound.as_dict()
    if save is not None:
        if rewound.look is None:
            raise RunError(f"Step {step} could not be opened up: nothing was saved.")
        rewound.look.save(save)
    if as_json:
        print_json(found)
    else:
        text.console().print(text.rewound(found), soft_wrap=True)
        if rewound.look is not None:
            text.console().print(text.opened(found), soft_wrap=True)
        if rewound.first_difference is not None:
            click.echo(str(rewound.first_difference), err=True)
    return 0 if rewound.identical else 1
