"""Executes the chapters of the tutorial, which are notebooks in Markdown.

    python docs/tutorial/execute.py [NAME ...]

runs the English ones, or those that are named (05-spike), and writes each with its
outputs to build/tutorial/NAME.ipynb. The Korean ones have the same cells. A block of
code marked as python is a cell, everything else is text. jupytext reads it so, and
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


def main(names: list[str]) -> None:
    """Execute some chapters, or all."""
    for chapter in chapters("en"):
        if names and chapter.stem not in names:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            book = execute(chapter, Path(folder))
        BUILT.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, BUILT / f"{chapter.stem}.ipynb")
        print(f"{chapter.stem}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
