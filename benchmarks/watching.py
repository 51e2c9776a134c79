"""What it costs to watch a training: `Loop(watch=k)` beside one that is not watched.

`run.py` calls `measure`, which runs each part in a process of its own:

    watching.py ARGUMENTS

with the arguments as JSON; it prints one JSON document.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from part import in_process
from target import Target, percent, table_of

PARTS = (
    ("mlp", "tensorflow", "fused-xla", 8),
    ("mlp", "tensorflow", "fused-graph", 6),
    ("mlp", "jax", "fused-xla", 8),
    ("mlp", "jax", "xla", 6),
    ("convnet", "tensorflow", "fused-graph", 1),
)
"""Workload, backend, gear, epochs of a piece."""

TARGET = {("mlp", "tensorflow", "fused-xla"), ("mlp", "jax", "fused-xla")}
"""Those of which the statement is made: the fastest gear of each backend."""

MOST = 10.0
"""Percent that may be added at k = 10."""

KINDS = {"off": None, "k = 10": 10, "k = 1": 1, "off again": None}

Row = dict[str, Any]


def measure(
    backends: Sequence[str],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """Every part, one after the other."""
    rows = []
    for workload, backend, gear, epochs in PARTS:
        if backend not in backends or (quick and workload != "mlp"):
            continue
        say(f"watching: {workload} in {gear} on {backend}")
        arguments = {
            "workload": workload,
            "gear": gear,
            "epochs": 1 if quick else epochs,
            "rounds": rounds or (3 if quick else 11),
        }
        found = in_process(
            "watching.py",
            json.dumps(arguments),
            backend=backend,
            failed=lambda error: say(f"watching: {error}"),
        )
        rows.append({"backend": backend, **arguments, **found})
    return rows


def cost(*, workload: str, gear: str, epochs: int, rounds: int) -> Row:
    """One loop of each kind, each trained again and again, in turns.

    A piece is a call of `fit` from the initial weights, compiled before.
    """
    from ours import loop_of
    from workloads import WORKLOADS, Training

    of = WORKLOADS[workload]
    x, y = of.data
    trainings = {kind: Training(of) for kind in KINDS}
    loops = {kind: loop_of(training, gear) for kind, training in trainings.items()}
    for kind, every in KINDS.items():
        loops[kind].watch = every

    def piece(kind: str, epochs: int) -> float:
        trainings[kind].restore()
        gc.collect()
        began = time.perf_counter()
        loops[kind].fit(x, y, batch_size=of.batch_size, epochs=epochs, verbose=0)
        return time.perf_counter() - began

    for kind in KINDS:
        piece(kind, 1)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        # Nobody always follows the same neighbour, nor always comes first.
        turn = number // 2 % len(KINDS)
        order = [*KINDS][turn:] + [*KINDS][:turn]
        for kind in order if number % 2 == 0 else reversed(order):
            found[kind].append(piece(kind, epochs))
    return {"seconds": found, "steps": of.steps * epochs}


def page(rows: Sequence[Row], about: str) -> str:
    """results-watching.md."""
    lines = [
        "# Watched training",
        "",
        about,
        "",
        "Four loops train the same in one process, in turns: not watched, watched "
        "every tenth step, watched at every step, not watched again. A piece is a call "
        "of `fit` on arrays from the initial weights. Shares are taken within each "
        "round, of the mean of the two that are not watched: median, least and most. "
        "The second of these against the first says what the machine makes of nothing. "
        "*Quietest* compares the fastest piece of each kind.",
        "",
        *table_of([_target(row) for row in rows if _key(row) in TARGET]),
        "",
        "## Every part",
        "",
        "| workload | backend, gear | off, ms/step | what | added, % | quietest, % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = f"| {row['workload']} | {row['backend']}, {row['gear']} |"
        if "error" in row:
            lines.append(f"{where} - | {row['error']} | - | - |")
            continue
        off_ms = 1e3 * statistics.median(_off(row)) / row["steps"]
        for kind in ("k = 10", "k = 1", "off again"):
            shares = _shares(row, kind)
            lines.append(
                f"{where} {off_ms:.3f} | {kind} | {percent(shares)} | "
                f"{_quietest(row, kind):+.1f} |"
            )
    return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[str, str, str]:
    return row["workload"], row["backend"], row["gear"]


def _target(row: Row) -> Target:
    statement = (
        f"tutorial MLP, {row['backend']}, {row['gear']}: watching every tenth step "
        f"adds at most {MOST:.0f} %"
    )
    if "error" in row:
        return Target(statement, row["error"], None)
    shares = _shares(row, "k = 10")
    quietest = _quietest(row, "k = 10")
    reached = (
        f"{percent(shares)} %; of the quietest pieces {quietest:+.1f} %; "
        f"nothing, measured as the others: {percent(_shares(row, 'off again'))} %"
    )
    return Target(statement, reached, statistics.median(shares) <= MOST)


def _off(row: Row) -> list[float]:
    seconds = row["seconds"]
    return [
        (a + b) / 2 for a, b in zip(seconds["off"], seconds["off again"], strict=True)
    ]


def _shares(row: Row, kind: str) -> list[float]:
    """Percent that are added, round by round."""
    base = row["seconds"]["off"] if kind == "off again" else _off(row)
    return [100 * (s / b - 1) for s, b in zip(row["seconds"][kind], base, strict=True)]


def _quietest(row: Row, kind: str) -> float:
    seconds = row["seconds"]
    names = ["off"] if kind == "off again" else ["off", "off again"]
    best = min(min(seconds[name]) for name in names)
    return float(100 * (min(seconds[kind]) / best - 1))


if __name__ == "__main__":
    print(json.dumps(cost(**json.loads(sys.argv[1]))))
