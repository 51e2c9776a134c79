"""Questions that need a framework, in a process of their own.

The server stays as it is: it starts a process for a run when it is first asked about
it (`python -m loopscope.cli.asked`), keeps it for the next question, and lets it end
with the server. The two talk in lines of JSON. What a run's function does in there, it
does to that process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loopscope.errors import LoopscopeError
from loopscope.run.folder import Folder
from loopscope.view.page.refusal import Refusal, as_error
from loopscope.view.page.shelf import Shelf

PROCESSES = 2
"""At most so many are kept: each holds a framework and a run's data."""

KEPT = 32
"""Jobs whose result can still be had."""

MOST_BYTES = 2**28
"""Of an answer."""

DOING = {
    "wait": "waits for the question before it",
    "start": "starts",
    "framework": "starts the framework",
    "experiment": "makes the experiment",
    "rewind": "goes back to a step, `step`",
    "why": "asks why the loss of a step, `step`, is what it is",
    "measure": "measures a gear, `gear`",
    "check": "makes a check of the doctor's, `check`",
}
"""What is being done for a job; the page has the words."""


@dataclass(eq=False)
class Job:
    """A question, and how far it has come.

    Attributes:
        id: Its name.
        kind: `"open"`, `"compare"` or `"doctor"`.
        run: The id of the run.
        question: As the process gets it.
        state: Where it is.
        doing: What is done now: `what`, a word of `DOING`, and what belongs to it.
        result: The answer; while it runs, as much as there is of it.
        error: What went wrong, as `as_error` gives it.
    """

    id: str
    kind: str
    run: str
    question: dict[str, Any]
    state: Literal["running", "done", "failed", "cancelled"] = "running"
    doing: dict[str, Any] = field(default_factory=lambda: {"what": "wait"})
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    began_s: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    asked: bool = False
    """Whether the process has it."""

    def end(self, error: dict[str, Any] | None = None) -> None:
        """It is done, or has failed."""
        self._end("failed" if error else "done", error)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._end("cancelled", None)

    def _end(
        self,
        state: Literal["done", "failed", "cancelled"],
        error: dict[str, Any] | None,
    ) -> None:
        if self.state == "running":
            self.state, self.error = state, error
            self.seconds = time.monotonic() - self.began_s

    def as_dict(self) -> dict[str, Any]:
        """As the page gets it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "run": self.run,
            "state": self.state,
            "doing": self.doing,
            "seconds": self.seconds or time.monotonic() - self.began_s,
            "result": self.result,
            "error": self.error,
        }


class Jobs:
    """Every job of one server.

    Args:
        shelf: The runs.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._ids = itertools.count(1)
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._processes: OrderedDict[Path, Process] = OrderedDict()
        self._places = asyncio.Semaphore(PROCESSES)
        self._turns: dict[Path, asyncio.Lock] = {}

    async def open(self, run: str, step: int) -> dict[str, str]:
        """Rewind to a step of a run and open it up."""
        return self._begin("open", run, {"step": step})

    async def compare(self, run: str) -> dict[str, str]:
        """Measure every gear on a run's step."""
        return self._begin("compare", run, {})

    async def doctor(self, run: str) -> dict[str, str]:
        """Look for the classic bugs in what a run trains."""
        return self._begin("doctor", run, {})

    async def job(self, id: str) -> dict[str, Any]:
        """How far a job has come."""
        return self._one(id).as_dict()

    async def cancel(self, id: str, only: str = "") -> dict[str, str]:
        """Nobody waits for a job any more.

        One that runs is ended with its process, and the next question starts a new one.

        Args:
            id: Its name.
            only: `"waiting"`: leave it alone if it has begun.
        """
        job = self._one(id)
        if not job.asked:
            job.cancel()
        elif job.state == "running" and only != "waiting":
            job.cancel()
            process = self._processes.get(self._shelf.one(job.run).folder.path)
            if process is not None:  # Else it is being started, and not asked.
                process.kill()
        return {"cancelled": job.id}

    async def close(self) -> None:
        """End every process, at once."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._processes.values():
            await process.close()
        self._processes.clear()

    def _one(self, id: str) -> Job:
        job = self._jobs.get(id)
        if job is None:
            do = "Ask the question again."
            raise Refusal(404, f"There is no job {id!r}.", do, code="no_job", job=id)
        return job

    def _begin(self, kind: str, run: str, question: dict[str, Any]) -> dict[str, str]:
        folder = self._shelf.one(run).folder
        job = Job(f"{next(self._ids)}", kind, run, {"kind": kind, **question})
        self._jobs[job.id] = job
        for old in [j for j in self._jobs.values() if j.state != "running"][:-KEPT]:
            del self._jobs[old.id]
        task = asyncio.get_running_loop().create_task(self._answer(job, folder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return {"job": job.id}

    async def _answer(self, job: Job, folder: Folder) -> None:
        path = folder.path
        # One question at a time to each process; a few processes at a time.
        async with self._turns.setdefault(path, asyncio.Lock()), self._places:
            if job.state != "running":
                return
            job.asked = True
            try:
                process = await self._process(path)
                if job.state != "running":
                    return
                await process.ask(job, lambda: self._is_awaited(job))
            except LoopscopeError as error:
                do = "Look at the run's folder."
                job.end(as_error(str(error), do, code="not_now"))
            except (OSError, EOFError, ValueError) as error:
                do = "Ask again: it starts anew."
                job.end(as_error(_of(error), do, code="ended", detail=_of(error)))
                await self._end(path)
            except asyncio.CancelledError:
                do = "Start it again."
                job.end(as_error("The server ends.", do, code="server_ends"))
                await self._end(path)
                raise

    def _is_awaited(self, job: Job) -> bool:
        """Whether another question about the same run waits for this one."""
        return any(
            j.run == job.run and not j.asked and j.state == "running"
            for j in self._jobs.values()
        )

    async def _process(self, path: Path) -> Process:
        """The process of a run; the one that was longest idle may have to go."""
        found = self._processes.pop(path, None)
        if found is not None and found.ended:
            await found.close()
            found = None
        if found is None:
            idle = [p for p in self._processes if not self._turns[p].locked()]
            while len(self._processes) >= PROCESSES and idle:
                await self._end(idle.pop(0))
            found = await Process.start(path)
        self._processes[path] = found
        return found

    async def _end(self, path: Path) -> None:
        process = self._processes.pop(path, None)
        if process is not None:
            await process.close()


class Process:
    """A process that answers questions about one run, one at a time.

    Args:
        process: It.
        log: What it writes to standard error.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Any) -> None:
        self._process, self._log = process, log

    @classmethod
    async def start(cls, path: Path) -> Process:
        """Start one for the run in a folder."""
        log = tempfile.TemporaryFile()  # noqa: SIM115
        # -P: a module in the working folder is not taken for one of Python's own.
        command = [sys.executable, "-P", "-m", "loopscope.cli.asked", str(path)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_working_folder(),
            limit=MOST_BYTES,
            # Ctrl-C in the terminal is for the server, which ends its processes.
            start_new_session=True,
        )
        return cls(process, log)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.returncode is not None

    async def ask(self, job: Job, is_awaited: Callable[[], bool]) -> None:
        """Ask a question and wait for its last answer.

        Args:
            job: The question; it is told what comes.
            is_awaited: Whether somebody waits for this to end: what can be left out
                then is left out.

        Raises:
            EOFError: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job.doing = {"what": "start"}
        with contextlib.suppress(ConnectionError):  # It has ended, as is said below.
            await self._say(job.question)
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "asks" in said:  # Whether to go on with what takes longer.
                with contextlib.suppress(ConnectionError):
                    await self._say({"go_on": not is_awaited()})
                continue
            job.doing = said.get("doing", job.doing)
            job.result = said.get("result", job.result)
            if "error" in said:
                job.end(said["error"])
            elif said.get("done"):
                job.end()
            if job.state != "running":
                return
        await self._process.wait()
        raise EOFError(f"The process that ran it has ended. {self._last_words()}")

    def kill(self) -> None:
        """End it, whatever it does."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """End it, and wait until it has ended."""
        self.kill()
        await self._process.wait()
        self._log.close()

    async def _say(self, document: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(document).encode() + b"\n")
        await self._process.stdin.drain()

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), 2_000, max(0, size - 2_000))
        lines = tail.decode("utf-8", "replace").strip().splitlines()
        return f"Its last words: {lines[-1]}" if lines else "It said nothing."


def _working_folder() -> Path:
    """This process's, or the one that is nearest above it and in no run.

    Modules are looked for there, and nothing in a run folder is executed.
    """
    place = Path.cwd()
    inside = [p for p in (place, *place.parents) if (p / "run.json").exists()]
    return inside[-1].parent if inside else place


def _of(error: BaseException) -> str:
    return str(error) or type(error).__name__
