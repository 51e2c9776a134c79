"""One training in a folder, ended in one way or another and started again.

child.py trains; here its processes are started, killed and judged: how they ended,
what they said, and whether their run can be read afterwards.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from loopscope.run import reading
from loopscope.run.folder import Folder

CHILD = Path(__file__).with_name("child.py")
PATIENCE_S = 240.0
"""Nobody needs so long for a start; what does is hung."""

# How a process is ended: by the driver, so many seconds at most after one of the words
# of the child's. After the first a run folder is opened; after the second, compiled.
EARLY = (("fit", 0.6),)
LATER = (("training", 1.6), ("going", 0.8), ("going", 0.8))
TIMED = {
    "early": (EARLY, signal.SIGKILL),
    "random": (LATER, signal.SIGKILL),
    "SIGTERM": (LATER, signal.SIGTERM),
    "SIGINT": (LATER, signal.SIGINT),
}
# Or by itself, at one of so many passages of a point (child.py).
AIMED = {
    "fsync-before": 40,
    "fsync-after": 40,
    "replace-before": 20,
    "replace-after": 20,
    "unlink-before": 12,
    "unlink-after": 12,
    "half-written": 20,
    "commit-before": 20,
    "commit-after": 20,
    "half-removed": 6,
    "cut-before": 1,
    "cut-after": 1,
    "checkpoints-cut": 1,
    "log-shortened": 1,
    "close-before": 1,
    "close-after": 1,
}
KINDS = (*TIMED, *AIMED)
ENDS = ("state_sha256", "history", "epochs", "csv")
"""What a child's result says of the end of a training."""

LEFT_BY = {
    signal.SIGTERM: {128 + signal.SIGTERM},
    signal.SIGINT: {128 + signal.SIGINT, -signal.SIGINT},
}
"""The exit codes of a training that a signal has told to leave."""


@dataclass(frozen=True)
class Kill:
    """One way to end a process.

    Attributes:
        kind: One of `KINDS`.
        word: Of the child's, after which it is timed; none, where it is aimed.
        delay_s: So long after it.
        number: The passage, where it is aimed.
    """

    kind: str
    word: str = ""
    delay_s: float = 0.0
    number: int = 0

    @property
    def signal(self):
        return TIMED[self.kind][1] if self.word else signal.SIGKILL

    def __str__(self):
        how = f"{self.word}+{self.delay_s:.2f}s" if self.word else self.number
        return f"{self.kind}:{how}"


def drawn(kind, draw):
    """A kill of a kind, its instant left to chance."""
    if kind in TIMED:
        word, most_s = draw.choice(TIMED[kind][0])
        return Kill(kind, word, draw.uniform(0, most_s))
    return Kill(kind, number=draw.randint(1, AIMED[kind]))


@dataclass
class Start:
    """What became of a process.

    Attributes:
        code: It ended with.
        errors: What it wrote to standard error.
        hung: Whether it had to be ended for taking too long.
    """

    code: int
    errors: str
    hung: bool


@dataclass
class Training:
    """A folder in which a training is started again and again.

    Attributes:
        case: Of `CASES`.
        path: Of the folder.
        kills: Still to come.
        killed: Those that have ended a process.
        missed: Those before which training was over.
        problems: What is not as it should be, one line each.
        starts: How many processes there were.
        result: What the last one has left.
    """

    case: str
    path: Path
    kills: list[Kill] = field(default_factory=list)
    killed: list[Kill] = field(default_factory=list)
    missed: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    result: dict = field(default_factory=dict)

    @property
    def run(self):
        return Folder(self.path / "run")

    def through(self):
        """Start it until it has come to its end, killing it on the way."""
        self.path.mkdir(parents=True)
        finished = False
        while not finished and not self.problems:
            kill = self.kills.pop(0) if self.kills else None
            finished = self._judge(kill, self._start(kill))
        self.missed += self.kills
        if finished:
            self.result = self._result()

    def again(self):
        """Start it once more, now that it is over; what is not as it was."""
        self._result_path.unlink()
        over = self._judge(None, self._start(None))
        now = self._result() if over else {}
        return [
            f"{n} is not the same" for n in ENDS if over and now[n] != self.result[n]
        ]

    @property
    def _result_path(self):
        return self.path / "result.json"

    def _result(self):
        return json.loads(self._result_path.read_text())

    def _start(self, kill):
        self.starts += 1
        command = [sys.executable, str(CHILD), str(self.path), self.case]
        if kill is not None and not kill.word:
            command += ["--aim", f"{kill.kind}:{kill.number}"]
        errors = self.path / f"errors-{self.starts}.txt"
        with (
            errors.open("w") as file,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            ) as process,
        ):
            hung = threading.Event()
            patience = threading.Timer(PATIENCE_S, lambda: (hung.set(), process.kill()))
            patience.start()
            try:
                _listen(process, kill)
            except BaseException:
                process.kill()
                raise
            finally:
                patience.cancel()
        return Start(process.returncode, errors.read_text(), hung.is_set())

    def _judge(self, kill, start):
        """Note what became of a kill; whether training is over."""
        number = kill.signal if kill is not None else 0
        left = start.code in LEFT_BY.get(number, ())
        over = bool(list(self.run.checkpoints_path.glob("*-end.json")))
        wrong = _complaint(start, interrupted=left and number == signal.SIGINT)
        if not wrong and start.code == 0:
            self.missed += [kill] if kill is not None else []
            return True
        # A signal does what it always does where nothing is trained any more.
        plainly = start.code == -number and (number == signal.SIGKILL or over)
        if not wrong and (left or plainly):
            self.killed.append(kill)
            wrong = _unreadable(self.run, saved=left and not over)
        elif not wrong:
            wrong = f"ended with {start.code}"
        if wrong:
            self.problems.append(f"start {self.starts}, {kill}: {wrong}")
        return False


def _complaint(start, *, interrupted):
    """What a process has to say that none should, whenever it is ended."""
    lines = start.errors.strip().splitlines()
    if start.hung:
        return f"hung for {PATIENCE_S:.0f} s"
    if "Traceback" in start.errors and not (
        interrupted and "\nKeyboardInterrupt" in start.errors
    ):
        return lines[-1]
    return next((line for line in lines if "damaged" in line), "")


def _listen(process, kill):
    """Listen to a child until it ends; at the kill's word, end it."""
    for line in process.stdout:
        if kill is not None and line.strip() == kill.word:
            with suppress(subprocess.TimeoutExpired):
                process.wait(kill.delay_s)
            process.send_signal(kill.signal)


def _unreadable(run, *, saved):
    """What is wrong with a run whose writer was ended; nothing, if all is well.

    Args:
        run: The run.
        saved: Whether it must have been saved where it stood.
    """
    if not list(run.checkpoints_path.glob("*.json")):
        return ""
    summary = reading.summary(run)
    if saved and not summary.problem and summary.resumable_step != summary.steps:
        return f"left at step {summary.steps}, saved at {summary.resumable_step}"
    return summary.problem
