"""Workers on this machine: started, watched, and ended together.

Each is a plain process of the same command, told by `TF_CONFIG` where it stands. The
launcher imports no framework and trains nothing: whatever happens to a worker, it is
there to say so and to end the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import click
from click.core import ParameterSource

from loopscope import cluster
from loopscope.backend.base import cores
from loopscope.cli.common import LOST
from loopscope.errors import UsageError
from loopscope.run.identity import THREADS

GRACE_S = 15.0
"""Once a worker has failed, or the chief has ended, so long the others may go on."""

SAVING_S = 60.0
"""Once a signal came, so long the chief may save after another worker has ended."""

KILL_S = 5.0
"""From SIGTERM to SIGKILL."""

POLL_S = 0.05
SAID_LINES = 20
SIGNALS = (signal.SIGTERM, signal.SIGINT)

LAUNCHER = "LOOPSCOPE_LAUNCHER"
"""Number of a pipe that ends when the launcher does, however that may be."""


@dataclass
class Worker:
    """One of the processes.

    Attributes:
        rank: 0 is the chief.
        process: Leads a process group of its own.
        said: What it writes; `None` for the chief, whose output is the command's.
        ended_s: When it was seen to have ended.
        told: Whether the launcher has ended it.
    """

    rank: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None
    ended_s: float | None = None
    told: bool = False

    @property
    def code(self) -> int:
        """Its exit code, as a shell has it."""
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        """Send a signal to it and to what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def relaunched(workers: int | None) -> bool:
    """Whether this process is to start workers of its command, rather than to train.

    Raises:
        UsageError: It is a worker itself.
    """
    if workers is None:
        return False
    here = cluster.place(os.environ)
    if here is not None:
        raise UsageError(
            f"--workers starts workers, and this process is one already: "
            f"{here.told_by} says it is worker {here.rank} of {here.size}. Leave "
            "--workers away, or take these variables out of the environment."
        )
    return workers > 1


def launch(count: int) -> int:
    """Run the command that click is at as so many workers; its exit code."""
    words = _words(click.get_current_context())
    command = [sys.executable, "-m", "loopscope.cli", *words]
    held, kept = os.pipe()
    workers: list[Worker] = []
    signals: list[int] = []

    def forward(number: int) -> None:
        signals.append(number)
        for worker in workers:
            if worker.ended_s is None:
                # The worker alone: what it has started is its own to end.
                worker.process.send_signal(number)

    with contextlib.ExitStack() as stack:
        stack.callback(os.close, kept)
        stack.enter_context(_handled(forward))
        stack.callback(_end, workers)
        ports = tuple(_free_ports(count))
        for rank in range(count):
            said = stack.enter_context(tempfile.TemporaryFile()) if rank else None
            process = subprocess.Popen(
                command,
                env=_environment(cluster.local(rank, ports), held),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[held],
                # Ctrl-C comes to the launcher alone, which passes it on.
                start_new_session=True,
            )
            workers.append(Worker(rank, process, said))
        os.close(held)
        _watch(workers, signals)
        return _told(workers, signals)


def end_with_launcher() -> None:
    """In a worker: end when the launcher is gone, even if it was killed.

    As on SIGTERM: a run that is recorded is saved first.
    """
    number = os.environ.pop(LAUNCHER, None)
    if number is None:
        return

    def wait() -> None:
        with open(int(number), "rb") as pipe:
            pipe.read()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SAVING_S)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _watch(workers: Sequence[Worker], signals: Sequence[int]) -> None:
    """Wait until all have ended; end those that stay after another one has failed."""
    limit, killing = float("inf"), False
    while running := [w for w in workers if w.ended_s is None]:
        time.sleep(POLL_S)
        now = time.monotonic()
        for worker in running:
            if worker.process.poll() is None:
                continue
            worker.ended_s = now
            worker.signal(signal.SIGKILL)  # What it has left behind.
            if worker.rank == 0 or (worker.code and not signals):
                limit = min(limit, now + GRACE_S)
            elif signals:
                limit = min(limit, now + SAVING_S)
        if len(signals) > 1:
            limit = min(limit, now + KILL_S)
        if now < limit:
            continue
        for worker in running:
            worker.told = worker.ended_s is None
            worker.signal(signal.SIGKILL if killing else signal.SIGTERM)
        limit, killing = now + KILL_S, True


def _told(workers: Sequence[Worker], signals: Sequence[int]) -> int:
    """Say which worker has failed, if one has; the exit code of the command."""
    chief, codes = workers[0], {worker.code for worker in workers}
    if signals:
        return chief.code or next((c for c in codes if c), 0)
    failed = [w for w in workers if w.code and not w.told]
    if not failed:
        return chief.code
    # Not those that have lost it: what they have lost, even if it ended in peace.
    own = [w for w in failed if w.code != LOST] or [w for w in workers if not w.told]
    cause = min(own, key=lambda w: (w.ended_s, w.process.returncode))
    if len(codes) == 1 and cause.process.returncode > 0:
        return chief.code  # All failed alike, and the chief has said why.
    seconds = max(w.ended_s or 0.0 for w in workers) - (cause.ended_s or 0.0)
    count = len(workers)
    click.echo(
        f"loopscope: worker {cause.rank} of {count} (process {cause.process.pid}) "
        f"{_end_of(cause)}. Without it the others cannot go on: they had ended "
        f"{seconds:.1f} s later. Start all of them again; a run that was recorded goes "
        f"on with `loopscope resume DIR --workers {count}`.",
        err=True,
    )
    for line in _last_lines(cause):
        click.echo(f"[worker {cause.rank}] {line}", err=True)
    return 1 if cause.process.returncode < 0 else cause.code or LOST


def _end_of(worker: Worker) -> str:
    code = worker.process.returncode
    if code >= 0:
        return f"has ended with exit code {code}" if code else "has ended too early"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _last_lines(worker: Worker) -> list[str]:
    if worker.said is None:
        return []
    worker.said.seek(0)
    text = worker.said.read().decode(errors="replace")
    return text.splitlines()[-SAID_LINES:]


def _end(workers: Sequence[Worker]) -> None:
    """Leave no process behind."""
    for worker in workers:
        if worker.ended_s is None:
            worker.signal(signal.SIGKILL)
            worker.process.wait()


def _environment(here: cluster.Place, held: int) -> dict[str, str]:
    # So many threads that the workers of a machine have a core for each of them.
    threads = str(max(1, cores() // here.size))
    return {
        **dict.fromkeys(THREADS, threads),
        **os.environ,
        cluster.TF_CONFIG: cluster.tf_config(here),
        LAUNCHER: str(held),
    }


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; all are held until all are found."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _words(context: click.Context) -> list[str]:
    """The command that was given, less `--workers`."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        value = context.params.get(name)
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if name == "workers" or not given:
            continue
        if isinstance(parameter, click.Argument):
            arguments.append(str(value))
        elif isinstance(value, bool):
            options.append(parameter.opts[0])
        else:
            options += [parameter.opts[0], str(value)]
    return [str(context.command.name), *options, "--", *arguments]


@contextlib.contextmanager
def _handled(forward: Callable[[int], None]) -> Iterator[None]:
    """Pass signals on for the duration of a block."""

    def heard(number: int, frame: Any) -> None:
        forward(number)

    before = {number: signal.signal(number, heard) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
