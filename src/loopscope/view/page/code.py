"""The loop of a run as code, as its manifest has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopscope.showing import lines as built_in


class _Unknown:
    """Stands for a model that nobody has written down: an early run."""

    name = "model"


def lines(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Line by line: `n` from 1, `text`, `role`, `note`, and what the note is `about`.

    A run that was recorded before loops were written down gets the built-in loop.
    """
    found = manifest.get("code")
    if not found:
        bare = built_in(
            _Unknown(), gear=None, steps={"train": None, "test": None}, callbacks=()
        )
        found = [(e.text, e.role, e.note, dict(e.about)) for e in bare[1:]]
    return [
        {
            "n": n,
            "text": str(text),
            "role": role,
            "note": str(note),
            "about": about[0] if about else {},
        }
        for n, (text, role, note, *about) in enumerate(found, 1)
    ]
