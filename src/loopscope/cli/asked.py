"""`python -m loopscope.cli.asked DIR`: answers the page's questions about a run.

No command of the program: `loopscope view` starts it when somebody asks for what needs
a framework. It reads questions from standard input and answers on standard output, a
line of JSON each, and ends when the other end does. What is answered is the part of
answering.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO


def main(path: Path) -> None:
    """Answer questions about the run in a folder, one after the other."""
    from loopscope.run.plain import readable

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What libraries print is no answer.
    with contextlib.suppress(OSError):
        os.nice(10)  # A training on this machine comes first.
    questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, questions), daemon=True).start()
    answering: Any = None

    def say(**said: Any) -> None:
        print(json.dumps(readable(said), allow_nan=False), file=answers, flush=True)

    def goes_on() -> bool:
        say(asks="go_on")
        return bool(questions.get().get("go_on"))

    while True:
        question = questions.get()
        try:
            if answering is None:
                say(doing={"what": "framework"})
                answering = _start(path)
            answering.answer(question, say, goes_on)
        except Exception as error:  # Whatever it is, the next question may be better.
            say(error=_error(error))


def _start(path: Path) -> Any:
    from loopscope.cli.common import start_backend_of

    start_backend_of(path)
    from loopscope.cli.answering import Answering

    return Answering(path)


def _read(lines: TextIO, questions: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in lines:
        questions.put(json.loads(line))
    os._exit(0)  # Whoever asked is gone, in the middle of an answer perhaps.


def _error(error: Exception) -> dict[str, Any]:
    """What went wrong, and what to do, as the page gets it."""
    from loopscope.errors import BackendError, LoopscopeError, UsageError
    from loopscope.view.page.refusal import as_error

    do, code = "`loopscope verify` on the command line shows the whole error.", "raised"
    if not isinstance(error, LoopscopeError):
        return as_error(f"{type(error).__name__}: {error}", do, code=code)
    if isinstance(error, BackendError):
        do, code = "Install the framework that the run was recorded on.", "no_framework"
    elif isinstance(error, UsageError):
        do, code = "`loopscope rewind` on the command line says the same.", "refused"
    return as_error(str(error), do, code=error.code or code, **error.about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
