"""A metric that is updated more than once in a train step."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts
from loopscope.doctor.finding import Finding


def check(facts: Facts) -> Iterator[Finding]:
    """Count the updates of each metric in one step."""
    probe = facts.first.probe
    for metric in probe.metrics:
        times = probe.updates.get(id(metric), 0)
        if times > 1:
            yield Finding(
                "metrics",
                "warning",
                f"The metric {metric.name!r} is updated {times} times in a train step",
                f"metric {metric.name!r}",
                "Update it once; the model's compute_metrics updates its own metrics.",
                {"updates_per_step": times},
                kind="twice",
            )
