"""What `asked` answers: a step opened up, gears side by side, findings.

Needs the framework that the run was recorded on; asked.py starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopscope.errors import LoopscopeError, RunError
from loopscope.replay import shown_again
from loopscope.run.folder import Folder
from loopscope.runs import experiment_of, open_run

Say = Callable[..., None]


class Answering:
    """Answers questions about one run.

    Args:
        path: Of its folder.
    """

    def __init__(self, path: Path) -> None:
        self._run = open_run(path)

    def answer(
        self, question: dict[str, Any], say: Say, goes_on: Callable[[], bool]
    ) -> None:
        """Answer one question.

        Args:
            question: `kind`, and what it needs.
            say: Told `doing` (as a job has it), `result`, and at the end `done`.
            goes_on: Whether to do what takes longer and is not needed by all.

        Raises:
            LoopscopeError: It cannot be answered.
        """
        match question["kind"]:
            case "open":
                self._open(question["step"], say, goes_on)
            case "compare":
                say(result=self._compare(say), done=True)
            case "doctor":
                say(doing={"what": "experiment"})
                made = self._experiment()
                found = made.doctor(
                    progress=lambda check: say(doing={"what": "check", "check": check})
                )
                say(result=found.as_dict(), done=True)

    def _open(self, step: int, say: Say, goes_on: Callable[[], bool]) -> None:
        say(doing={"what": "rewind", "step": step})
        rewound = self._run.rewind(step)
        if rewound.look is None:
            raise RunError(
                f"Step {step} cannot be opened up: it runs in no eager gear",
                code="not_opened",
                step=step,
            )
        steps = self._run.summary.steps
        result = {**shown_again(rewound), "steps": steps, "why": None, "why_not": ""}
        say(doing={"what": "why", "step": step}, result=result)
        if goes_on():
            try:
                result["why"] = self._run.why(step).as_dict()
            except LoopscopeError as error:
                result["why_not"] = str(error)
        say(result=result, done=True)

    def _compare(self, say: Say) -> dict[str, Any]:
        say(doing={"what": "experiment"})
        made = self._experiment()
        names = ("x", "y", "sample_weight", "batch_size")
        arguments = {n: v for n, v in made.arguments.items() if n in names}
        rows = made.loop.compare(
            **arguments,
            progress=lambda gear: say(doing={"what": "measure", "gear": gear}),
        )
        return {"rows": [row.as_dict() for row in rows]}

    def _experiment(self) -> Any:
        """A new one: that of rewinding stands somewhere in the run."""
        return experiment_of(Folder(self._run.path))
