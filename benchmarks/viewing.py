"""What it costs a recorded training to be looked at: `loopscope view` beside it.

`run.py` calls `measure`, which runs each part in a process of its own:

    viewing.py cost ARGUMENTS

with the arguments as JSON; it prints one JSON document. The page is a real server in a
process of its own, and who looks at it asks what a browser asks: `viewing.py look`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from part import in_process
from target import Target, percent, table_of

PARTS = (
    ("mlp", "tensorflow", "fused-graph", 6),
    ("mlp", "jax", "fused-xla", 8),
)
"""Workload, backend, gear, epochs of a piece."""

MOST = 1.0
"""Percent that may be added by being looked at."""

ASKED = 2.0
"""Requests a second."""

KINDS = ("alone", "shown", "silent", "alone again")
"""Silent is a run that says nothing of itself between its rows."""

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
        if backend not in backends:
            continue
        say(f"viewing: {workload} in {gear} on {backend}")
        arguments = {
            "workload": workload,
            "gear": gear,
            "epochs": 2 if quick else epochs,
            "rounds": rounds or (3 if quick else 11),
        }
        found = in_process(
            "viewing.py",
            *("cost", json.dumps(arguments)),
            backend=backend,
            failed=lambda error: say(f"viewing: {error}"),
        )
        rows.append({"backend": backend, **arguments, **found})
    return rows


def cost(*, workload: str, gear: str, epochs: int, rounds: int) -> Row:
    """One recorded training again and again, looked at in some of its turns."""
    from loopscope.run import writer
    from ours import loop_of
    from workloads import WORKLOADS, Training

    of = WORKLOADS[workload]
    x, y = of.data
    training = Training(of)
    loop = loop_of(training, gear)
    told_s = writer.TELL_S
    answered: list[int] = []

    with tempfile.TemporaryDirectory() as place, _served(Path(place)) as server:
        pid, address = server

        def piece(kind: str, number: int, epochs: int) -> tuple[float, float]:
            training.restore()
            gc.collect()
            name = f"{kind.replace(' ', '-')}-{number}"
            writer.TELL_S = 1e9 if kind == "silent" else told_s
            with _looked_at(address, name if kind == "shown" else None) as asked:
                began, began_cpu = time.perf_counter(), time.process_time()
                loop.fit(
                    *(x, y),
                    batch_size=of.batch_size,
                    epochs=epochs,
                    verbose=0,
                    run=Path(place) / name,
                )
                seconds = time.perf_counter() - began
                cpu_s = time.process_time() - began_cpu
            answered.append(asked())
            return seconds, cpu_s

        for kind in KINDS:
            piece(kind, -1, 1)
        answered.clear()
        before_s = _cpu_s(pid)
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            # Nobody always follows the same neighbour, nor always comes first.
            turn = number // 2 % len(KINDS)
            order = [*KINDS[turn:], *KINDS[:turn]]
            for kind in order if number % 2 == 0 else reversed(order):
                seconds, cpu_s = piece(kind, number, epochs)
                found[kind].append(seconds)
                cpu[kind].append(cpu_s)
        server_s = _cpu_s(pid) - before_s
    return {
        "seconds": found,
        "cpu_s": cpu,
        "steps": of.steps * epochs,
        "answers": sum(answered),
        "server_ms": 1e3 * server_s / max(1, sum(answered)),
    }


@contextmanager
def _served(place: Path) -> Iterator[tuple[int, str]]:
    """A page of a folder: the process that serves it, and its address."""
    command = [sys.executable, "-m", "loopscope.cli", "view", str(place), "--json"]
    process = subprocess.Popen(
        [*command, "--no-open", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        yield process.pid, json.loads(text)["address"].partition("/#")[0]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _looked_at(address: str, run: str | None) -> Iterator[Callable[[], int]]:
    """Somebody looks at a run during a block; how often he was answered, after it."""
    if run is None:
        yield lambda: 0
        return
    looking = subprocess.Popen(
        [sys.executable, __file__, "look", address, run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert looking.stdout is not None
    looking.stdout.readline()  # It is there.
    count = 0
    try:
        yield lambda: count
    finally:
        text, _ = looking.communicate("")
        count = int(text.split()[-1])


def look(address: str, run: str) -> None:
    """Ask as the page does of a live run, until standard input ends."""
    import selectors

    import httpx

    print("looks", flush=True)
    asked, answered, last = 0, 0, 0
    with httpx.Client(base_url=address) as client, selectors.DefaultSelector() as ends:
        ends.register(sys.stdin, selectors.EVENT_READ)
        while not ends.select(1 / ASKED):
            if asked % 2:
                query: dict[str, Any] = {"run": run, "points": 2000}
                answer = client.get("/api/curve", params=query)
            else:
                query = {"run": run, "after": last}
                answer = client.get("/api/status", params=query)
                if answer.status_code == 200:
                    last = max([last, *(e["id"] for e in answer.json()["events"])])
            asked += 1
            answered += answer.status_code == 200
    print(answered)


def _cpu_s(pid: int) -> float:
    """What a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def page(rows: Sequence[Row], about: str) -> str:
    """results-viewing.md."""
    lines = [
        "# A training that is looked at",
        "",
        about,
        "",
        "One recorded training, again and again, in one process: alone, looked at "
        f"through `loopscope view` ({ASKED:.0f} requests a second, by a process of its "
        "own, to a server of its own), saying nothing of itself (no `live.json`), "
        "alone again. Shares are taken within each round, of the mean of the two that "
        "are alone: median, least and most. The second of these against the first says "
        "what the machine makes of nothing. *Quietest* compares the fastest piece of "
        "each kind, *processor* what the training process computed in all pieces. "
        "*A request* is what the server computed for one.",
        "",
        *table_of([_target(row) for row in rows]),
        "",
        "## Every part",
        "",
        "| workload | backend, gear | alone, ms/step | what | added, % | quietest, % "
        "| processor, % | a request, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = f"| {row['workload']} | {row['backend']}, {row['gear']} |"
        if "error" in row:
            lines.append(f"{where} - | {row['error']} | - | - | - | - |")
            continue
        alone_ms = 1e3 * statistics.median(_alone(row)) / row["steps"]
        for kind in KINDS[1:]:
            request = f"{row['server_ms']:.1f}" if kind == "shown" else "-"
            lines.append(
                f"{where} {alone_ms:.3f} | {kind} | {percent(_shares(row, kind))} | "
                f"{_quietest(row, kind):+.1f} | {_computed(row, kind):+.1f} | "
                f"{request} |"
            )
    return "\n".join(lines) + "\n"


def _target(row: Row) -> Target:
    statement = (
        f"tutorial MLP, {row['backend']}, {row['gear']}: being looked at adds at most "
        f"{MOST:.0f} %"
    )
    if "error" in row:
        return Target(statement, row["error"], None)
    shares = _shares(row, "shown")
    reached = (
        f"{percent(shares)} %; of the quietest pieces {_quietest(row, 'shown'):+.1f} "
        f"%; the training process computed {_computed(row, 'shown'):+.1f} % more; "
        f"nothing, measured as the others: {percent(_shares(row, 'alone again'))} %"
    )
    return Target(statement, reached, statistics.median(shares) <= MOST)


def _alone(row: Row) -> list[float]:
    seconds = row["seconds"]
    pairs = zip(seconds["alone"], seconds["alone again"], strict=True)
    return [(a + b) / 2 for a, b in pairs]


def _shares(row: Row, kind: str) -> list[float]:
    """Percent that are added, round by round."""
    base = row["seconds"]["alone"] if kind == "alone again" else _alone(row)
    return [100 * (s / b - 1) for s, b in zip(row["seconds"][kind], base, strict=True)]


def _computed(row: Row, kind: str) -> float:
    """Percent that the training process computed more, over all rounds."""
    cpu = {name: sum(seconds) for name, seconds in row["cpu_s"].items()}
    alone = cpu["alone"]
    if kind != "alone again":
        alone = (alone + cpu["alone again"]) / 2
    return float(100 * (cpu[kind] / alone - 1))


def _quietest(row: Row, kind: str) -> float:
    seconds = row["seconds"]
    names = ["alone"] if kind == "alone again" else ["alone", "alone again"]
    best = min(min(seconds[name]) for name in names)
    return float(100 * (min(seconds[kind]) / best - 1))


if __name__ == "__main__":
    if sys.argv[1] == "look":
        look(*sys.argv[2:])
    else:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # What libraries print goes to standard error.
        print(json.dumps(cost(**json.loads(sys.argv[2]))), file=answers)
        answers.close()
