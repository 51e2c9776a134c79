"""What every command shares: its options, its exits, the start of a framework."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

BACKENDS = ("tensorflow", "jax", "torch")

LOST = 3
"""Exit code of a worker that has lost another one."""

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document, nothing else."
)
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="The Keras backend.  [default: KERAS_BACKEND, else the one installed]",
)
seed_option = click.option(
    "--seed", default=0, show_default=True, help="Of weights and order of examples."
)


workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train on N processes of this machine.  [default: this one]",
)
run_option = click.option(
    "--run", type=click.Path(path_type=Path), help="Record into this folder."
)
no_run_option = click.option("--no-run", is_flag=True, help="Record nothing.")
run_argument = click.argument("path", metavar="DIR", type=click.Path(path_type=Path))


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the exits of the program.

    0; 1 for bad news, 2 for wrong use, 3 for a worker that has lost another one.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from loopscope.errors import BackendError, UsageError, WorkerError

        try:
            code = function(*args, **kwargs)
        except (UsageError, BackendError, WorkerError) as error:
            click.echo(f"loopscope: {error}", err=True)
            for note in getattr(error, "__notes__", ()):
                if not note.startswith("loopscope: raised at"):
                    click.echo(note, err=True)
            sys.exit(LOST if isinstance(error, WorkerError) else 2)
        except KeyboardInterrupt as error:
            said = [f"loopscope: {error}"] if str(error) else []
            said += getattr(
                error, "__notes__", [] if said else ["loopscope: interrupted"]
            )
            click.echo("\n" + "\n".join(said), err=True)
            sys.exit(130)
        sys.exit(code or 0)

    return run


def start_backend(name: str | None) -> str:
    """Choose the Keras backend and import it; its name.

    Raises:
        BackendError: No framework is installed, or Keras has another one.
    """
    from loopscope import backend
    from loopscope.errors import BackendError

    if name is not None:
        os.environ["KERAS_BACKEND"] = name
    elif "KERAS_BACKEND" not in os.environ:
        installed = [b for b in BACKENDS if find_spec(b) is not None]
        if not installed:
            raise BackendError(
                "No framework is installed. Install one of the extras: "
                "`pip install 'loopscope[tensorflow]'`, "
                "`pip install 'loopscope[jax]'` or `pip install 'loopscope[torch]'`."
            )
        os.environ["KERAS_BACKEND"] = installed[0]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_start():
        room = backend.current()
        # Keras loads whatever else it seeds (TensorFlow, on JAX) here.
        import keras

        keras.utils.set_random_seed(0)
    return room.name


def start_backend_of(run: Path) -> None:
    """Import the framework that a run was recorded on.

    Raises:
        RunError: There is no run.
        BackendError: The framework is not installed, or Keras has another one.
    """
    from loopscope.run.folder import Folder

    start_backend(Folder(run).manifest["identity"]["backend"])


def print_json(document: Any) -> None:
    """Print the one JSON document of a command."""
    click.echo(json.dumps(document, indent=2, allow_nan=True, default=float))


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Hold back what frameworks write to standard error while they are loaded.

    TensorFlow says which drivers it did not find before any log level counts. If
    loading fails, what was held back is written after all.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            os.dup2(kept, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
