"""What `asked` answers: a step opened up, gears side by side, findings.

Needs the framework that the run was recorded on; asked.py starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.errors import LoopscopeError, RunError
from loopscope.look.opened import OpenedStep
from loopscope.look.pictures import data_uri, pictures
from loopscope.run.folder import Folder
from loopscope.runs import experiment_of, open_run

SHOWN = 64
"""So many examples have a picture, the worst first."""

SIDE = 128
"""A larger picture is shown by some of its points."""

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
            say: Told `text` (what is done now), `result`, and at the end `done`.
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
                say(text="makes the experiment")
                made = self._experiment()
                found = made.doctor(progress=lambda check: say(text=f"checks {check}"))
                say(result=found.as_dict(), done=True)

    def _open(self, step: int, say: Say, goes_on: Callable[[], bool]) -> None:
        say(text=f"rewinds to step {step}")
        rewound = self._run.rewind(step)
        if rewound.look is None:
            raise RunError(f"Step {step} cannot be opened up: it runs in no eager gear")
        apart = rewound.first_difference
        result = {
            **opened(rewound.look),
            "steps": self._run.summary.steps,
            "epoch": rewound.epoch,
            "batch_index": rewound.batch_index,
            "gear": rewound.gear,
            "learning_rate": rewound.learning_rate,
            "recorded_loss": rewound.loss_recorded,
            "same_bits": rewound.identical,
            "difference": None if apart is None else str(apart),
            "why": None,
        }
        say(text=f"asks why the loss of step {step} is what it is", result=result)
        if goes_on():
            try:
                result["why"] = self._run.why(step).story()
            except LoopscopeError as error:
                result["why"] = [str(error)]
        say(result=result, done=True)

    def _compare(self, say: Say) -> dict[str, Any]:
        say(text="makes the experiment")
        made = self._experiment()
        names = ("x", "y", "sample_weight", "batch_size")
        arguments = {n: v for n, v in made.arguments.items() if n in names}
        rows = made.loop.compare(
            **arguments, progress=lambda gear: say(text=f"measures {gear}")
        )
        return {"rows": [row.as_dict() for row in rows]}

    def _experiment(self) -> Any:
        """A new one: that of rewinding stands somewhere in the run."""
        return experiment_of(Folder(self._run.path))


def opened(look: OpenedStep) -> dict[str, Any]:
    """A step as the page shows it."""
    return {
        **look.as_dict(),
        "step": look.step,
        "pictures": examples(look),
        "heat": heat(look),
    }


def examples(look: OpenedStep) -> list[dict[str, Any]]:
    """Every example, worst loss first, with a picture where it is one."""
    loss, order = look.loss_per_example, look.worst
    shown = pictures(look.picture_input())
    if order is None:
        count = len(shown) if shown is not None else 0
        order = np.arange(count)
    found = []
    for place, i in enumerate(order.tolist()):
        uri = None
        if shown is not None and i < len(shown) and place < SHOWN:
            every = -(-max(shown[i].shape[:2]) // SIDE)
            uri = data_uri(np.ascontiguousarray(shown[i][::every, ::every]))
        found.append(
            {
                "position": i,
                "example": None if look.examples is None else int(look.examples[i]),
                "loss": None if loss is None else float(loss[i]),
                "label": look.label(i),
                "predicted": look.predicted(i),
                "picture": uri,
            }
        )
    return found


def heat(look: OpenedStep) -> dict[str, Any]:
    """How gradients and updates are spread over the depth, from input to output."""
    ratios = {u.path: u.ratio for u in look.updates}
    return {
        "paths": [g.path for g in look.gradients],
        "gradient_norm": [
            None if g.stats is None else g.stats.norm for g in look.gradients
        ],
        "update_ratio": [ratios.get(g.path) for g in look.gradients],
    }
