"""Running the checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopscope.doctor.checks import ALL, LAST
from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding
from loopscope.errors import UsageError
from loopscope.figures import html


@dataclass(frozen=True)
class Examination:
    """What the doctor has found.

    Attributes:
        findings: Errors first.
        seconds: What each check took, measurements that it was the first to ask for
            included.
        failed: Checks that could not be made, with the reason.
    """

    findings: Sequence[Finding]
    seconds: Mapping[str, float]
    failed: Mapping[str, str]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "healthy": self.healthy,
            "findings": [f.as_dict() for f in self.findings],
            "seconds": dict(self.seconds),
            "failed": dict(self.failed),
        }

    def _repr_html_(self) -> str:
        shown = html.findings(
            [f.as_dict() for f in self.findings], checks=len(self.seconds)
        )
        return shown + html.failed(self.failed)

    def __str__(self) -> str:
        """Every finding."""
        lines = [str(f) for f in self.findings] or [
            f"{len(self.seconds)} checks, nothing found"
        ]
        lines += [
            f"{name} could not be checked: {why}" for name, why in self.failed.items()
        ]
        return "\n".join(lines)


def examine(
    facts: Facts,
    checks: Collection[str] | None = None,
    *,
    progress: Callable[[str], None] = lambda check: None,
) -> Examination:
    """Make some checks, or all.

    Args:
        facts: Of the loop.
        checks: Their names; all, if not given.
        progress: Told the name of each check before it is made.

    Raises:
        UsageError: There is no such check.
    """
    unknown = sorted(set(checks or ()) - set(ALL))
    if unknown:
        raise UsageError(
            f"There is no check {unknown[0]!r}. Expected some of: {', '.join(ALL)}"
        )
    findings: list[Finding] = []
    seconds, failed = {}, {}
    for name, check in ALL.items():
        if checks is not None and name not in checks:
            continue
        if name in LAST and findings and checks is None:
            continue
        progress(name)
        began = time.perf_counter()
        try:
            findings += check(facts)
        except Exception as error:
            # One that fails must not hide the others.
            failed[name] = f"{type(error).__name__}: {error}"
        seconds[name] = time.perf_counter() - began
    if facts.first.error is not None and not findings:
        failed["step"] = f"{type(facts.first.error).__name__}: {facts.first.error}"
    findings.sort(key=lambda f: f.severity != "error")
    return Examination(findings, seconds, failed)
