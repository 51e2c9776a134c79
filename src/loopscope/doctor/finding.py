"""What the doctor reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loopscope.figures import html

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a loop, or very likely so.

    Attributes:
        check: The name of the check.
        severity: `"error"`: what is learnt is not what was meant. `"warning"`: it costs
            speed, accuracy or the chance to repeat it.
        message: What it is, in one sentence.
        where: The layer, variable, argument or line.
        change: What to change.
        measured: The numbers that say so.
        kind: Which of the things that the check finds; empty where it finds one only.
    """

    check: str
    severity: Severity
    message: str
    where: str
    change: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""

    @property
    def link(self) -> str:
        """The page that explains it, with a failing and a mended example."""
        return f"docs/doctor/{self.check}.md"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "measured": dict(self.measured), "link": self.link}

    def _repr_html_(self) -> str:
        return html.findings([self.as_dict()])

    def __str__(self) -> str:
        """On some lines."""
        numbers = ", ".join(f"{k} {_short(v)}" for k, v in self.measured.items())
        lines = [f"{self.severity}: {self.message} [{self.check}]"]
        lines += [f"  measured: {numbers}"] if numbers else []
        lines += [f"  where:    {self.where}", f"  change:   {self.change}"]
        return "\n".join([*lines, f"  more:     {self.link}"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
