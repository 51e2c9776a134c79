"""Choosing a gear by measuring.

Short chunks are run in one gear after the other, the surest first, and undone:
the state afterwards is the state before. A trial is made only where what it can
bring pays for what it costs, and where the run cannot become longer than the
plain gear's by more than `SLACK_SHARE` or `SLACK_S`, whichever is more. What was
measured is kept on disk, so that the next run of the same model knows already.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loopscope.cpu import cpu_line
from loopscope.data.feed import Segment
from loopscope.data.source import Source
from loopscope.events import Phase
from loopscope.gear import EAGER, FUSED_GRAPH, FUSED_XLA, GEARS, GRAPH, XLA, Gear
from loopscope.runner import Runner

SLACK_SHARE, SLACK_S = 0.05, 2.0
EAGER_SLACK_SHARE = 0.2
"""The share where the plain gear is eager: it seldom happens that a graph loses."""

TRIAL_S = 0.15
"""How long a gear is measured, compilation apart."""

INDUCTOR_S = 20.0
"""What PyTorch's compiler may take for a step."""

LOSING = 2.5
"""A trial that is so many times slower than the best ends after one step."""

UNKNOWN_STEPS = 10_000
"""What is assumed where the source does not know its length."""


@dataclass(frozen=True)
class Trial:
    """What a gear was measured to cost: seconds."""

    step_s: float
    compile_s: float

    def total_s(self, steps: int, copies: int) -> float:
        """Seconds of so many steps, compiled for so many batch sizes."""
        return self.compile_s * copies + self.step_s * steps


@dataclass(frozen=True)
class Choice:
    """The gears chosen, and the figures that speak for them."""

    train: Gear
    test: Gear
    because: Mapping[str, Any]
    """What speaks for it, as plain data."""
    wall_s: float
    trials: Mapping[str, Trial]

    @property
    def reason(self) -> str:
        """The same in a line."""
        return _in_a_line(self.because)

    @property
    def step_s(self) -> dict[str, float]:
        """Seconds per step of each gear measured."""
        return {name: trial.step_s for name, trial in self.trials.items()}


def choose(
    runner: Runner, source: Source, *, steps: int | None, cache: bool = True
) -> Choice:
    """The gear in which training `steps` more steps ends first.

    Args:
        runner: Has the train step, traced on the source's batches.
        source: Gives a sample of its batches, which is not used up.
        steps: Training steps that remain; `None` if unknown.
        cache: Whether to use, and add to, what was measured before.
    """
    began = time.perf_counter()
    key = _signature(runner, source) if cache and _cache_file() else ""
    known = runner.together.agreed(_recall(key))
    horizon = UNKNOWN_STEPS if steps is None else steps
    copies = 2 if source.ragged else 1
    before = runner.state.snapshot()
    try:
        # A longer run than those before may pay for a gear that none has tried.
        trials = _try_gears(runner, source, horizon, copies, known)
    except Exception as error:
        # A step that raises will raise in training too, where it can be told which.
        plain = runner.backend.gears[0]
        because = {"why": "raised", "gear": plain.name, "error": type(error).__name__}
        return Choice(plain, plain, because, time.perf_counter() - began, {})
    finally:
        runner.state.restore(before)
        runner.finished = 0
    if len(trials) > len(known):
        _remember(key, trials)
    done = trials.keys() - known.keys()

    def rest_s(name: str) -> float:
        compiled = 1 if name in done else 0
        return trials[name].total_s(horizon, copies - compiled)

    best = min(trials, key=rest_s)
    runner.keep("train", GEARS[best])
    wall_s = time.perf_counter() - began
    return Choice(
        GEARS[best],
        _test_gear(best, trials, horizon),
        _because(best, trials, steps, bool(known), copies),
        wall_s,
        trials,
    )


def _try_gears(
    runner: Runner,
    source: Source,
    steps: int,
    copies: int,
    known: Mapping[str, Trial],
) -> dict[str, Trial]:
    gears = runner.backend.gears
    plain, *others = (g for g in gears if not g.run_eagerly or g == gears[0])
    segment = source.sample()
    trials, spent = dict(known), 0.0
    if plain.name not in trials:
        trials[plain.name] = measure(runner, plain, segment, best_s=None)
        spent = TRIAL_S  # Its compilation counts for the training, its steps do not.
    first = trials[plain.name]
    total = first.total_s(steps, copies)
    share = EAGER_SLACK_SHARE if plain.run_eagerly else SLACK_SHARE
    allowed = max(share * total, SLACK_S)
    for gear in (g for g in others if g.name not in trials):
        best_s = min(t.step_s for t in trials.values())
        hoped_s, cost_s = _forecast(gear, trials)
        saved = (first.step_s - best_s) * steps
        gain = (best_s - hoped_s) * steps
        # A trial that loses has compiled once; one that wins, for each batch size.
        risk_s = cost_s + TRIAL_S
        if gain <= cost_s * copies + TRIAL_S or risk_s > allowed + saved - spent:
            continue
        began = time.perf_counter()
        try:
            trials[gear.name] = measure(runner, gear, segment, best_s=best_s)
        except Exception:
            continue  # A gear that cannot run this step is no choice.
        finally:
            spent += runner.together.agreed(time.perf_counter() - began)
    return trials


def _forecast(gear: Gear, trials: Mapping[str, Trial]) -> tuple[float, float]:
    """The seconds per step to hope for, and the seconds of compiling to fear.

    The fears are the worst of the five benchmarks' models: under XLA a second and 4 to
    8 times what the graph took, 1.4 times for fusing a graph, twice for fusing under
    XLA.
    """
    if gear == GRAPH:
        plain = trials[EAGER.name]
        return 0.3 * plain.step_s, INDUCTOR_S
    if gear == FUSED_GRAPH:
        plain = trials[GRAPH.name]
        hoped_s = plain.step_s - min(0.8 * plain.step_s, 1.5e-3)
        return hoped_s, 1.5 * plain.compile_s
    if gear == XLA:
        # XLA opens the way to fused XLA, which saves the cost of a call as well.
        plain = trials[GRAPH.name]
        fused = trials.get(FUSED_GRAPH.name, plain)
        call_s = max(0.0, plain.step_s - fused.step_s)
        hoped_s = max(0.2 * plain.step_s, 0.5 * plain.step_s - call_s)
        return hoped_s, 1.2 + 8 * plain.compile_s
    if gear == FUSED_XLA and XLA.name in trials:
        xla = trials[XLA.name]
        # What fusing saves is the cost of a call: about a millisecond, or what the
        # graph gears have shown.
        call_s = min(0.8 * xla.step_s, 1e-3 if GRAPH.name in trials else 0.5e-3)
        if FUSED_GRAPH.name in trials:
            shown_s = trials[GRAPH.name].step_s - trials[FUSED_GRAPH.name].step_s
            call_s = max(call_s, shown_s)
        return max(0.2 * xla.step_s, xla.step_s - call_s), 2 * xla.compile_s
    return float("inf"), 0.0


def measure(
    runner: Runner,
    gear: Gear,
    segment: Segment,
    *,
    best_s: float | None = None,
    phase: Phase = "train",
) -> Trial:
    """Run the segment's first steps over and over, for `TRIAL_S`.

    Args:
        runner: Has the phase's step. Whoever calls keeps the state.
        gear: In which to run them.
        segment: Their data.
        best_s: Seconds a step of the best gear so far: one that is losing is left.
        phase: Which step.
    """

    def run(steps: int) -> tuple[float, float]:
        part = Segment(segment.feed, segment.start, segment.start + steps)
        done = runner.run(phase, gear, part)
        # All of several workers have to come to the same choice.
        return runner.together.agreed(
            (done.wall_s, sum(c.wall_s for c in done.compiled))
        )

    _, compile_s = run(1)
    most = min(segment.steps, 256)
    # One step says nothing of a gear that is made for many to a call.
    steps = min(most, 16) if gear.fused and compile_s < 10 * TRIAL_S else 1
    wall_s, _ = run(steps)
    step_s, spent = wall_s / steps, wall_s
    while spent < TRIAL_S and not (
        best_s and step_s > LOSING * best_s and spent > 0.02
    ):
        steps = min(most, max(1, steps * 4))
        wall_s, _ = run(steps)
        step_s = min(step_s, wall_s / steps)
        spent += wall_s
    runner.finished = 0
    return Trial(step_s, max(0.0, compile_s - step_s))


def _test_gear(best: str, trials: Mapping[str, Trial], steps: int) -> Gear:
    """Where compiling under XLA pays for training only just, test without it."""
    gear = GEARS[best]
    if not gear.jit_compile or GRAPH.name not in trials:
        return gear
    others = [t.step_s for name, t in trials.items() if not GEARS[name].jit_compile]
    saved = (min(others) - trials[best].step_s) * steps
    if saved > 5 * trials[best].compile_s:
        return gear
    return FUSED_GRAPH if FUSED_GRAPH.name in trials else GRAPH


def break_even(trial: Trial, surest: Trial, copies: int) -> int | None:
    """After how many steps a gear is ahead of the surest one; `None` if never."""
    behind_s = (trial.compile_s - surest.compile_s) * copies
    saved_s = surest.step_s - trial.step_s
    if behind_s <= 0 and saved_s >= 0:
        return 0
    return None if saved_s <= 0 else math.ceil(behind_s / saved_s)


def in_words(seconds: float) -> str:
    """A time for people: "2.7 s", "12 min", "3.1 h"."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _because(
    best: str,
    trials: Mapping[str, Trial],
    steps: int | None,
    remembered: bool,
    copies: int = 1,
) -> dict[str, Any]:
    """What speaks for the gear that ends first, as plain data."""
    surest = next(iter(trials))
    least_s = min(t.step_s for t in trials.values())
    return {
        "why": "measured",
        "gear": best,
        "steps": steps,
        "remembered": remembered,
        "step_s": {name: trial.step_s for name, trial in trials.items()},
        "total_s": None if steps is None else trials[best].total_s(steps, copies),
        "surest": surest,
        "ahead_after": (
            None if best == surest else break_even(trials[best], trials[surest], copies)
        ),
        "xla_loses": not GEARS[best].jit_compile
        and any(GEARS[n].jit_compile and t.step_s > least_s for n, t in trials.items()),
    }


def _in_a_line(because: Mapping[str, Any]) -> str:
    if because["why"] == "raised":
        return f"{because['gear']}, since a trial raised {because['error']}"
    listed = ", ".join(
        f"{name} {1e3 * step_s:.3g} ms/step"
        for name, step_s in because["step_s"].items()
    )
    steps, paid = because["steps"], because["ahead_after"]
    length = "an unknown number of" if steps is None else f"{steps:,}"
    origin = "measured before" if because["remembered"] else "measured"
    text = f"{because['gear']} for {length} steps ({origin}: {listed})"
    if because["total_s"] is not None:
        text += f", about {in_words(because['total_s'])}"
    if paid is not None:
        text += f", ahead of {because['surest']} after {paid:,} steps"
    if because["xla_loses"]:
        text += "; compiling with XLA does not pay here"
    return text


def _signature(runner: Runner, source: Source) -> str:
    import keras

    layers = [
        (type(layer).__name__, _config(layer))
        for layer in runner.model._flatten_layers()
    ]
    optimizer = getattr(runner.model, "optimizer", None)
    step = runner.stages["train"].step
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    parts = [
        runner.backend.name,
        runner.backend.device(),
        runner.together.size,
        runner.backend.distribution(runner.model) is not None,
        [_version(name) for name in ("loopscope", "keras", runner.backend.name)],
        [
            platform.machine(),
            platform.processor(),
            cpu_line("model name"),
            os.cpu_count(),
            sys.version,
        ],
        {k: os.environ.get(k) for k in ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS")},
        layers,
        type(optimizer).__name__,
        [(tuple(v.shape), str(v.dtype)) for v in runner.state.variables],
        keras.tree.map_structure(str, source.specs),
        hashlib.sha256(code.co_code if code else b"").hexdigest(),
    ]
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _config(layer: Any) -> Any:
    try:
        config = dict(layer.get_config())
    except Exception:
        return None
    return {
        k: v for k, v in config.items() if k not in ("name", "layers", "build_config")
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cache_file() -> Path | None:
    """Where measurements are kept; `LOOPSCOPE_CACHE=0` turns the cache off."""
    chosen = os.environ.get("LOOPSCOPE_CACHE", "")
    if chosen == "0":
        return None
    if chosen:
        return Path(chosen) / "gears.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loopscope" / "gears.json"


def _read_cache() -> dict[str, Any]:
    file = _cache_file()
    try:
        content = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _recall(key: str) -> dict[str, Trial]:
    try:
        return {
            name: Trial(*map(float, seconds))
            for name, seconds in _read_cache().get(key, {}).items()
            if name in GEARS
        }
    except (TypeError, ValueError, AttributeError):
        return {}  # Not what this version writes.


def _remember(key: str, trials: Mapping[str, Trial]) -> None:
    file = _cache_file()
    if not key or file is None:
        return
    content = _read_cache()
    content[key] = {n: (t.step_s, t.compile_s) for n, t in trials.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(file)
    except OSError:
        return  # A cache that cannot be written is only slower.
