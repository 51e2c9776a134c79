"""`--view`: the page of a run beside its training, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from loopscope.errors import UsageError

view_option = click.option(
    "--view", "view", is_flag=True, help="Show the run in a browser while it trains."
)


@contextmanager
def shown(run: Path | None, *, as_json: bool) -> Iterator[None]:
    """Show a run for the duration of a block, in which it is recorded.

    The page ends with the block. On a terminal it stays after it, which is said, until
    Ctrl-C: a short training is over before anybody has looked at it.

    Args:
        run: Its folder, which need not be there yet.
        as_json: Whether standard output is for one JSON document.

    Raises:
        UsageError: Nothing is recorded, or the page cannot be served.
    """
    from loopscope.cli.view import needed

    if run is None:
        raise UsageError(
            "--view shows a run, and nothing is recorded. Give --run DIR, and leave "
            "--no-run away."
        )
    needed()
    run.mkdir(parents=True, exist_ok=True)
    try:
        with _page(run, opens=sys.stdout.isatty()) as (process, address):
            click.echo(f"shown at {address}", err=as_json)
            yield
            if sys.stdout.isatty() and not as_json:
                click.echo(f"The page stays at {address}; Ctrl-C ends it.")
                with contextlib.suppress(KeyboardInterrupt):
                    process.wait()
    finally:
        with contextlib.suppress(OSError):
            run.rmdir()  # If training was refused, there is nothing in it.


@contextmanager
def _page(run: Path, *, opens: bool) -> Iterator[tuple[subprocess.Popen[str], str]]:
    program = [sys.executable, "-P", "-m", "loopscope.cli"]
    command = [*program, "view", str(run), "--json"]
    process = subprocess.Popen(
        [*command, "--beside", *([] if opens else ["--no-open"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for the training, which saves and ends first.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        text = ""
        while line := process.stdout.readline():
            text += line
            if line.startswith("}"):
                break
        try:
            address = str(json.loads(text)["address"])
        except ValueError as error:
            raise UsageError(
                "The page could not be served; what it has said stands above. "
                "`loopscope view` serves it as well, from another terminal."
            ) from error
        yield process, address
    finally:
        # It ends when its standard input does: with this process, however it ends.
        process.stdin.close()
        process.wait()
        process.stdout.close()
