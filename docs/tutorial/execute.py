"""Executes the chapters of the tutorial, which are notebooks in Markdown.

    python docs/tutorial/execute.py [en|ko ...]

writes each of them, with its outputs, to build/tutorial/LANGUAGE/NAME.ipynb. A block
of code marked as python is a cell, everything else is text. jupytext reads it so, and
Jupyter opens it as a notebook where jupytext is installed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "tutorial"
LANGUAGES = ("en", "ko")

CELL_S = 580
"""The longest a cell may take: some wait for other processes, on a busy machine."""


def chapters(language: str) -> list[Path]:
    """The files of a language, in order."""
    return sorted((HERE / language).glob("[0-9]*.md"))


def read(chapter: Path) -> Any:
    """A chapter as a notebook, not executed."""
    return jupytext.read(chapter, fmt="md")


def code(chapter: Path) -> list[str]:
    """What its cells hold."""
    return [cell.source for cell in read(chapter).cells if cell.cell_type == "code"]


def execute(chapter: Path, folder: Path) -> Any:
    """Run a chapter from top to bottom in a kernel of its own.

    Args:
        chapter: Its file.
        folder: Where it runs: a chapter writes programs and runs.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell has failed.
    """
    book = read(chapter)
    client = NotebookClient(
        book,
        timeout=CELL_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        # What a line has written over is not there in a browser either.
        coalesce_streams=True,
    )
    client.execute()
    return book


def main(languages: list[str]) -> None:
    """Execute every chapter of some languages, or of all."""
    for language in languages or LANGUAGES:
        for chapter in chapters(language):
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                book = execute(chapter, Path(folder))
            built = BUILT / language / f"{chapter.stem}.ipynb"
            built.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(book, built)
            print(f"{language}/{chapter.stem}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
