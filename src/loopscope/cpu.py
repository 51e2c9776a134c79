"""What the system says of its processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def cpu_line(*beginnings: str) -> str:
    """The first line of /proc/cpuinfo that begins so; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.startswith(beginnings)), "")
