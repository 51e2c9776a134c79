"""Makes the site of the documentation, in build/site.

    python docs/make_site.py

lays out in build/pages what mkdocs.yml reads: the Markdown files of the repository at
the places that they have in it, so that links between them hold in both; the chapters
of the tutorial with what their cells have shown, where docs/tutorial/execute.py has
executed them; and the reference, one section for each public name. Then mkdocs builds
it, strictly.
"""

from __future__ import annotations

import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
EXECUTED = ROOT / "build" / "tutorial"

COPIED = (
    "*.md",
    "LICENSE",
    "NOTICE",
    "docs/**/*.md",
    "docs/images/*.png",
    "benchmarks/*.md",
    "benchmarks/*.png",
    "examples/**/*",
)
"""What the pages are, and what they link to."""

GIVEN = (
    "loopscope.epoch.Epoch",
    "loopscope.epoch.StepReport",
    "loopscope.compare.Comparison",
    "loopscope.compare.GearReport",
    "loopscope.estimate.Estimate",
    "loopscope.doctor.examine.Examination",
    "loopscope.doctor.finding.Finding",
    "loopscope.look.opened.OpenedStep",
    "loopscope.runs.Run",
    "loopscope.replay.Rewound",
    "loopscope.look.why.Why",
    "loopscope.errors",
)
"""What methods of the public names return, or raise."""

PLOTLY = "plotly.min.js"

NOISE = re.compile(r"^(?:WARNING: All log messages before|[IWE]\d{4} ).*\n?", re.M)
"""What TensorFlow says of itself before it can be told not to."""

PLACES = re.compile(r"\S*/(?=site-packages/|ipykernel_\d)|\S*/(?=src/loopscope/)")
"""Where the machine keeps its files."""


def lay_out() -> None:
    """Put every page into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for pattern in COPIED:
        for file in ROOT.glob(pattern):
            if file.is_file() and "__pycache__" not in file.parts:
                place = PAGES / file.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    for chapter in sorted((PAGES / "docs" / "tutorial").glob("*/[0-9]*.md")):
        executed = EXECUTED / f"{chapter.stem}.ipynb"
        if executed.exists():
            fill_in(chapter, nbformat.read(executed, as_version=4))
    (PAGES / "reference.md").write_text(reference(), "utf-8")
    (PAGES / "records.md").write_text(records(), "utf-8")
    shutil.copyfile(_plotly(), PAGES / PLOTLY)


def fill_in(chapter: Path, executed: Any) -> None:
    """Write what the cells of a chapter have shown below each of them.

    The cells of both languages are the same, so what was executed in one of them is
    filled in in both; nothing where a cell is not what was executed.
    """
    cells = jupytext.read(chapter, fmt="md").cells
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    if [c.source for c in cells if c.cell_type == "code"] != [c.source for c in ran]:
        print(f"{chapter.stem}: executed before it was last changed; left without")
        return
    shown, parts = iter(ran), []
    for number, cell in enumerate(cells):
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += outputs(next(shown).outputs, f"{chapter.stem}-{number}")
    drawn = [i for i, part in enumerate(parts) if "Plotly.newPlot" in part]
    if drawn:
        parts.insert(drawn[0], f'<script src="../../../{PLOTLY}"></script>')
    chapter.write_text("\n\n".join(parts) + "\n", "utf-8")


def outputs(shown: Iterable[Any], name: str) -> Iterator[str]:
    """What a cell has shown, as Markdown."""
    for count, output in enumerate(shown):
        data = output.get("data", {})
        if output.output_type == "stream":
            text = PLACES.sub("", NOISE.sub("", output.text)).strip("\n")
            if text:
                yield f'<pre class="output"><code>{_kept(text)}</code></pre>'
        elif "application/vnd.plotly.v1+json" in data:
            yield figure(data["application/vnd.plotly.v1+json"], f"{name}-{count}")
        elif "text/html" in data:
            # A blank line would end the block of HTML.
            yield re.sub(r"\n\s*\n", "\n", data["text/html"])
        elif "text/plain" in data:
            yield f'<pre class="output"><code>{_kept(data["text/plain"])}</code></pre>'


def figure(drawn: Any, name: str) -> str:
    """A plotly figure, drawn by the reader's browser with the script of the site."""
    what = [json.dumps(drawn.get(part, {})) for part in ("data", "layout")]
    given = ", ".join(part.replace("</", "<\\/") for part in what)
    options = '{"responsive": true, "displayModeBar": false}'
    return (
        f'<div id="{name}"></div>\n'
        f'<script>Plotly.newPlot("{name}", {given}, {options})</script>'
    )


def reference() -> str:
    """The page of all public names, from their docstrings."""
    import loopscope

    parts = ["# Reference", "Every public name, with what its docstring says."]
    for name in loopscope.__all__:
        home = loopscope._HOME[name] or "loopscope"
        parts += [f"## {name}", f"::: {home}.{name}"]
        # What a class takes in from another module is no member of it to griffe.
        for taken in _taken_in(getattr(loopscope, name)):
            path = f"{taken.__module__}.{taken.__name__}"
            parts += [f"### {taken.__name__}", f"::: {path}"]
    return "\n\n".join(parts) + "\n"


def records() -> str:
    """The page of what methods of the public names return or raise."""
    parts = ["# Records", "What methods return, and the errors they raise."]
    for path in GIVEN:
        parts += [f"## {path.rpartition('.')[2]}", f"::: {path}"]
    return "\n\n".join(parts) + "\n"


def _taken_in(owner: Any) -> list[Any]:
    """The public methods of a class that are functions of another module."""
    members = vars(owner).items() if inspect.isclass(owner) else ()
    return [
        member
        for name, member in members
        if inspect.isfunction(member)
        and not name.startswith("_")
        and member.__module__ != owner.__module__
    ]


def _kept(text: str) -> str:
    """Text as HTML; a blank line would end the block."""
    return html.escape(text, quote=False).replace("\n\n", "\n&#8203;\n")


def _plotly() -> Path:
    import plotly

    return Path(plotly.__file__).parent / "package_data" / PLOTLY


def main() -> int:
    """Lay the pages out and build the site; mkdocs's exit code."""
    lay_out()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    # The theme would advertise another program in place of mkdocs.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
