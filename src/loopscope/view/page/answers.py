"""From a run folder to what the page is told: plain data, no framework.

docs/page.md is the contract. Who may ask is the part of guard.py; what needs a
framework, of jobs.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loopscope.errors import LoopscopeError
from loopscope.run import control, live, reading
from loopscope.run.following import Following, Seen
from loopscope.run.plain import decode
from loopscope.view.page import code
from loopscope.view.page.refusal import Refusal
from loopscope.view.page.shelf import Shelf

POINTS, MOST_POINTS = 2_000, 20_000
"""Of a curve: unless said, and at most."""

Plain = dict[str, Any]


class Answers:
    """What can be asked of the runs on a shelf.

    Args:
        shelf: The runs.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def runs(self) -> Plain:
        """Every run on one line, newest first."""
        found = [
            {"id": name, **following.summary().as_dict()}
            for name, following in self.shelf.all().items()
        ]
        return {"runs": sorted(found, key=lambda r: (r["created"], r["id"]))[::-1]}

    def run(self, run: str) -> Plain:
        """What a run is."""
        following, seen = self._seen(run)
        manifest = following.folder.manifest
        return {
            "id": run,
            "summary": following.summary().as_dict(),
            "manifest": manifest,
            "code": {"lines": code.lines(manifest)},
            "names": {
                "outputs": sorted(seen.series, key=lambda name: (name != "loss", name)),
                "epochs": _names(e.logs or {} for e in seen.epochs),
                "signals": _names(values for _, values in seen.signals),
            },
            "gears": _gears(seen.events),
        }

    def status(self, run: str, after: int = 0) -> Plain:
        """Where a run stands, and what has happened after an event."""
        following, seen = self._seen(run)
        folder, manifest = following.folder, following.folder.manifest
        said = live.read(folder) or {}
        summary = following.summary()
        running = summary.status == "running"
        over = [e for e in seen.epochs if e.steps is not None]
        begun = seen.epochs[-1] if seen.epochs else None
        step = manifest["first_step"] if seen.stop is None else seen.stop
        source = manifest.get("source") or {}
        steps = source.get("steps") or (over[-1].steps if over else None)
        about = {
            "step": step,
            "epoch": begun.epoch if begun else 0,
            "epochs": (manifest.get("arguments") or {}).get("epochs"),
            "index": step - begun.first_step if begun else 0,
            "steps_per_epoch": steps,
            "gear": summary.gear,
        }
        if running:
            about |= {n: said[n] for n in about if said.get(n) is not None}
        return {
            "status": summary.status,
            "live": _live(folder, said) if running else None,
            **about,
            "seconds": said.get("seconds") or {},
            "shapes": seen.facts.get("shapes") or {},
            "events": [_event(e) for e in seen.events if e["id"] > after],
        }

    def curve(
        self,
        run: str,
        name: str = "loss",
        start: int | None = None,
        stop: int | None = None,
        points: int = POINTS,
    ) -> Plain:
        """An output in buckets of steps."""
        _, seen = self._seen(run)
        series = seen.series.get(name)
        if series is None:
            raise Refusal(
                404,
                f"The run {run!r} records no {name!r}.",
                f"It has: {', '.join(seen.series) or 'nothing yet'}.",
                code="no_curve",
                run=run,
                name=name,
                names=", ".join(seen.series) or "-",
            )
        first, end = _range(start, stop, series.first, series.stop)
        values = series.values[first - series.first : end - series.first]
        step, mean, low, high = reading.points_of(first, values, _points(points))
        none = ~np.isfinite(mean)
        return {
            "name": name,
            "start": first,
            "stop": end,
            "step": step.tolist(),
            "low": np.where(none, np.nan, low).tolist(),
            "high": np.where(none, np.nan, high).tolist(),
            "mean": mean.tolist(),
            "time": series.time_of(step).tolist(),
        }

    def epochs(self, run: str) -> Plain:
        """Every epoch that is over."""
        _, seen = self._seen(run)
        rows = [e for e in seen.epochs if e.steps is not None]
        return {
            "epochs": [
                {
                    "epoch": e.epoch,
                    "first_step": e.first_step,
                    "steps": e.steps,
                    "logs": decode(e.logs or {}, {}),
                    "wall_s": e.wall_s,
                    "time": e.time,
                }
                for e in rows
            ]
        }

    def signals(
        self,
        run: str,
        start: int | None = None,
        stop: int | None = None,
        points: int = POINTS,
    ) -> Plain:
        """What a watched training has measured: means over buckets of its steps."""
        _, seen = self._seen(run)
        steps = np.concatenate([np.zeros(0, np.int64), *(s for s, _ in seen.signals)])
        if not len(steps):
            return {"step": [], "values": {}}
        first, end = _range(start, stop, int(steps[0]), int(steps[-1]) + 1)
        low, high = np.searchsorted(steps, [first, end])
        names = _names(values for _, values in seen.signals)
        found: Plain = {"step": [], "values": {}}
        for name in names:
            column = np.concatenate(
                [v.get(name, np.full(len(s), np.nan)) for s, v in seen.signals]
            )
            at, mean, _, _ = reading.points_of(0, column[low:high], _points(points))
            found["step"] = steps[low:high][at].tolist()
            found["values"][name] = mean.tolist()
        return found

    def events(self, run: str, kind: str | None = None) -> Plain:
        """What happened, oldest first."""
        _, seen = self._seen(run)
        found = [e for e in seen.events if kind in (None, "", e["kind"])]
        return {"events": [_event(e) for e in found]}

    def checkpoints(self, run: str) -> Plain:
        """Every checkpoint that was written."""
        _, seen = self._seen(run)
        names = ("name", "step", "epoch", "size_bytes", "kept", "time")
        found = []
        for row in sorted(seen.checkpoints, key=lambda row: (row[1], row[0])):
            name, step, epoch, _, size_bytes, _, _, kept, time = row
            values = (name, step, epoch, size_bytes, bool(kept), time)
            found.append(dict(zip(names, values, strict=True)))
        return {"checkpoints": found}

    def control(self, run: str, action: str) -> Plain:
        """Ask a live training to do something."""
        folder = self.shelf.one(run).folder
        if action not in control.ACTIONS:
            raise Refusal(
                400,
                f"There is no action {action!r}.",
                f"Take one of {', '.join(control.ACTIONS)}.",
            )
        if folder.writer() is None:
            raise Refusal(
                409,
                f"Nothing trains in {run!r} now.",
                "Train it on with `loopscope resume`, then ask again.",
                code="nothing_trains",
                run=run,
            )
        said = live.read(folder) or {}
        workers = _count(said, "workers")
        why = control.refusal(action, workers=workers)
        if why:
            raise Refusal(
                409,
                why,
                "`save` and `stop` work with any number of them.",
                code="workers",
                workers=workers,
                action=action,
            )
        control.ask(folder, action)
        return {"asked": action}

    def _seen(self, run: str) -> tuple[Following, Seen]:
        following = self.shelf.one(run)
        try:
            return following, following.look()
        except LoopscopeError as error:
            raise Refusal(
                409,
                f"The run {run!r} cannot be read: {error}",
                "`loopscope verify` says more; `loopscope resume --anyway` goes on.",
                code="unreadable",
                run=run,
                detail=str(error),
            ) from error


def _live(folder: Any, said: Mapping[str, Any]) -> Plain | None:
    if not said:
        return None
    names = ("phase", "role", "paused", "step", "loss", "steps_per_s", "eta_s", "time")
    asked = control.waiting(folder, _count(said, "obeyed_bytes")) or said.get("asked")
    return {**{name: said.get(name) for name in names}, "asked": asked}


def _count(said: Mapping[str, Any], name: str) -> int:
    """A number of what a file says, which may be anything."""
    found = said.get(name)
    return found if isinstance(found, int) and found > 0 else 0


def _event(event: Mapping[str, Any]) -> Plain:
    data = dict(event)
    about = {name: data.pop(name) for name in ("id", "step", "kind", "time")}
    return {**about, "data": data}


def _gears(events: Sequence[Mapping[str, Any]]) -> Plain | None:
    """What is known of gears: of the last time that `auto` has chosen."""
    for event in reversed(events):
        found = event if event["kind"] == "gear" else event.get("chosen")
        if isinstance(found, Mapping) and found.get("measured"):
            return {
                "measured": found["measured"],
                "chosen": found.get("gear"),
                "reason": found.get("reason"),
                "because": found.get("because") or {},
            }
    return None


def _names(found: Any) -> list[str]:
    """The keys of some dicts, each once, in order."""
    return list(dict.fromkeys(name for names in found for name in names))


def _range(
    start: int | None, stop: int | None, first: int, end: int
) -> tuple[int, int]:
    low = first if start is None else min(max(start, first), end)
    high = end if stop is None else max(min(stop, end), low)
    return low, high


def _points(points: int) -> int:
    if not 1 <= points <= MOST_POINTS:
        raise Refusal(
            400,
            f"`points` is a number from 1 to {MOST_POINTS:,}. Received: {points}",
            "Leave it out for 2,000.",
        )
    return points
