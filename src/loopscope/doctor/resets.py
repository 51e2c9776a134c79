"""Whether a script ever sets its metrics back, and in which loops: off its source.

A metric that is updated two loops further in than it was made, by epoch and by step,
goes on from epoch to epoch unless something resets it. A script is watched for some
steps only, so that no epoch may end: whether it would reset is read, not seen.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FrameType

RESETS = ("reset_state", "reset_metrics")
"""`reset_states` of Keras 2 among them."""


class Source:
    """A script's source.

    Args:
        path: Of the script.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _loops(self) -> list[tuple[int, int]]:
        """The first and last line of each loop."""
        try:
            tree = ast.parse(self._path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return []
        kinds = (ast.For, ast.AsyncFor, ast.While)
        return [
            (node.lineno, node.end_lineno or node.lineno)
            for node in ast.walk(tree)
            if isinstance(node, kinds)
        ]

    def line(self) -> int | None:
        """The line that is being executed, of the innermost call."""
        return next((frame.f_lineno for frame in self._own()), None)

    def _own(self) -> Iterator[FrameType]:
        """The calls of the script that are being executed, the innermost first."""
        own = str(self._path)
        return (f for f in _frames() if f.f_code.co_filename == own)

    def depth(self) -> int:
        """How many loops of the script are being executed."""
        return sum(
            first <= frame.f_lineno <= last
            for frame in self._own()
            for first, last in self._loops
        )

    def calls(self) -> bool:
        """Whether it is the script that calls, past what is installed."""
        ours = str(Path(__file__).parents[1])
        for frame in _frames():
            file = frame.f_code.co_filename
            if "site-packages" not in file and not file.startswith(ours):
                return file == str(self._path)
        return False

    def resets(self) -> bool:
        """Whether the script, or a module that lies beside it, resets any metric."""
        folder = self._path.parent
        files = {self._path}
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if file and "site-packages" not in file:
                path = Path(file).resolve()
                if path.is_relative_to(folder) and path.suffix == ".py":
                    files.add(path)
        return any(word in _text(file) for file in files for word in RESETS)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


__all__ = ["Source"]
