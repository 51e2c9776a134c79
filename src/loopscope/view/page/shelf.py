"""Which runs there are in a folder, and which of them may be looked at.

An id is a folder's path relative to the one that is shown, and only ids that were found
by walking through it are taken. Links are not followed: nothing outside is read.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from loopscope.run.folder import Folder
from loopscope.run.following import Following
from loopscope.view.page.refusal import Refusal

KEPT = 32
"""Runs whose values stay in memory."""

FILES = ("run.json", "journal.sqlite", "checkpoints", "control.jsonl", "live.json")


class Shelf:
    """The runs of one folder.

    Args:
        root: The folder, or a run itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._lock = threading.Lock()
        self._known: dict[str, Path] = {}
        self._open: OrderedDict[str, Following] = OrderedDict()

    def all(self) -> dict[str, Following]:
        """Every run by its id."""
        found = {self._id(path): path for path in self._walk()}
        with self._lock:
            self._known = found
        return {name: self._following(name, path) for name, path in found.items()}

    def one(self, name: str) -> Following:
        """The run of an id.

        Raises:
            Refusal: There is none.
        """
        path = self._known.get(name)
        if path is None or not _is_run(path):
            self.all()
            path = self._known.get(name)
        if path is None:
            raise Refusal(
                404,
                f"There is no run {name!r} in {str(self.root)!r}.",
                "Take an id from /api/runs.",
                code="no_run",
                run=name,
            )
        return self._following(name, path)

    def _following(self, name: str, path: Path) -> Following:
        with self._lock:
            found = self._open.pop(name, None) or Following(Folder(path))
            self._open[name] = found
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
            return found

    def _walk(self) -> list[Path]:
        found = []
        for place, folders, files in os.walk(self.root):
            if "run.json" in files and _is_run(Path(place)):
                found.append(Path(place))
            folders[:] = [n for n in folders if n != "checkpoints"]
        return found

    def _id(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _is_run(path: Path) -> bool:
    """Whether it is a run of which no file is a link to somewhere else."""
    if not (path / "run.json").is_file():
        return False
    names = {*FILES, *(f"journal.sqlite{end}" for end in ("-wal", "-shm", "-journal"))}
    return not any((path / name).is_symlink() for name in names)
