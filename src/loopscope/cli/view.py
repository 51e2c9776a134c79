"""`loopscope view`: runs in a browser."""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import click

from loopscope.cli.common import command, json_option, print_json

NEEDED = ("starlette", "uvicorn", "plotly")
"""The packages of the extra `view`."""


@click.command()
@click.argument(
    "path",
    metavar="[DIR]",
    default="runs",
    type=click.Path(path_type=Path),
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="0: any that is free.  [default: 8765, or any if that is taken]",
)
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
@click.option("--beside", is_flag=True, hidden=True, help="End with standard input.")
@json_option
@command
def view(
    path: Path, port: int | None, no_open: bool, beside: bool, as_json: bool
) -> int:
    """Show the runs in DIR in a browser, live ones while they train.

    DIR is a run, or a folder with runs in it; `runs` if not given. The page is served
    to this machine alone, until Ctrl-C. Its address has a token in it: whoever has
    that may pause, save and stop a live run, and have its steps run again.
    """
    from loopscope.errors import RunError, UsageError

    needed()
    from loopscope.view.page import server

    if not path.is_dir():
        raise RunError(
            f"There is no folder {str(path)!r}. Expected a run, or a folder with runs "
            "in it: `loopscope view runs`. `loopscope train EXPERIMENT --run DIR` "
            "records one."
        )
    try:
        listening = server.listen(port)
    except OSError as error:
        raise UsageError(
            f"Port {port} cannot be had: {error.strerror}. Give another one, or "
            "--port 0 for any that is free."
        ) from error
    address = server.Address(listening.getsockname()[1], server.new_token())

    if beside:
        threading.Thread(target=_end_with_input, daemon=True).start()

    def ready() -> None:
        if as_json:
            said = {"address": str(address), "port": address.port}
            print_json({**said, "token": address.token, "folder": str(path)})
            sys.stdout.flush()
        else:
            click.echo(f"{path} is shown at {address}\nCtrl-C ends it.")
        if not no_open:
            import webbrowser

            webbrowser.open(str(address))

    try:
        server.serve(path, listening, address.token, ready)
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()
    return 0


def _end_with_input() -> None:
    """End this process in order once nobody holds its standard input any more."""
    while sys.stdin.read(1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def needed() -> None:
    """Say what is missing where the extra is not installed.

    Raises:
        UsageError: A package that the page needs is not there.
    """
    from loopscope.errors import UsageError

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"The page needs packages that are not installed: {', '.join(missing)}. "
            "Install the extra: `pip install 'loopscope[view]'`."
        )
