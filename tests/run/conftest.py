"""Runs that several files look at: made once."""

import os
import selectors
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopscope.errors import RunError
from models import FUSED

PROGRAM = Path(__file__).parent / "trainings.py"


@pytest.fixture(scope="session")
def elsewhere():
    """Starts trainings.py in another process; kills it at the end if need be."""

    @contextmanager
    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, PROGRAM, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    return start


class Killed:
    """A run whose process was killed in its 18th epoch of 20.

    Attributes:
        path: Of the run.
        epochs: To which it was to go.
        seen: What another process read while it was written.
        refusals: What another process was told that wanted to write it.
        pid: Of the process.
    """

    epochs = 20

    def __init__(self, path, elsewhere):
        from loopscope.run import reading
        from loopscope.run.folder import Folder

        self.path, self.seen, self.refusals = path, [], []
        with elsewhere(path, FUSED, "train", self.epochs, 17) as process:
            self.pid = process.pid
            _line(process, "began")
            ready = selectors.DefaultSelector()
            ready.register(process.stdout, selectors.EVENT_READ)
            while not self.seen or not ready.select(0):
                self.seen.append(
                    (reading.summary(Folder(path)), reading.steps(Folder(path)))
                )
            _line(process, "held")
            for attempt in (lambda: Folder(path).lock().acquire(), self._go_on):
                try:
                    attempt()
                except RunError as error:
                    self.refusals.append(str(error))
            process.kill()
            process.wait()

    def _go_on(self):
        from trainings import remembering, train

        train(self.path, epochs=self.epochs, resume=True, more=remembering())


def _line(process, expected):
    line = process.stdout.readline().strip()
    assert line == expected, process.communicate()[1][-2000:]


@pytest.fixture(scope="session")
def killed(elsewhere, tmp_path_factory):
    return Killed(tmp_path_factory.mktemp("killed") / "run", elsewhere)
