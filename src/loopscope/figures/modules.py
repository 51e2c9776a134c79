"""The page's ES modules as one script, for a document that cannot ask for files.

Not by an import map: a document within another one is held to its rules, and some
notebooks (VS Code's) let scripts run that stand in the document but none from `data:`.
So each module becomes a function that is called once; what it says is not changed.
"""

from __future__ import annotations

import re

from loopscope.figures import STATIC

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";$', re.M)
EXPORT = re.compile(r"^export ((?:async )?function|const|class) (\w+)", re.M)
LEFT = re.compile(r"^(?:import|export)\b.*", re.M)


def script(entry: str) -> str:
    """A module and all that it imports, in an order in which they can run.

    Args:
        entry: Its name, without `.js`.

    Raises:
        ValueError: A module imports or exports in another way than those here do.
    """
    found: dict[str, str] = {}
    _gather(entry, found, ())
    return "\n".join(['"use strict";', *found.values(), ""])


def _gather(name: str, found: dict[str, str], within: tuple[str, ...]) -> None:
    if name in within:
        raise ValueError(f"Modules import each other: {', '.join((*within, name))}")
    if name in found:
        return
    text = (STATIC / f"{name}.js").read_text("utf-8")
    for imported in IMPORT.finditer(text):
        _gather(imported[2], found, (*within, name))
    given = ", ".join(export[2] for export in EXPORT.finditer(text))
    text = IMPORT.sub(_taken, text)
    text = EXPORT.sub(r"\1 \2", text)
    left = LEFT.search(text)
    if left is not None:
        raise ValueError(f"{name}.js: {left[0]}")
    # No empty lines: in Markdown, one would end the block of HTML that this is part of.
    lines = "\n".join(line for line in text.splitlines() if line.strip())
    found[name] = f"const _{name} = (() => {{\n{lines}\nreturn {{ {given} }};\n}})();"


def _taken(imported: re.Match[str]) -> str:
    names = re.sub(r"(\w+)\s+as\s+(\w+)", r"\1: \2", imported[1])
    return f"const {{{names}}} = _{imported[2]};"
