"""Several devices and processes: loopscope beside the engine alone.

On two cores more devices make nothing faster. What can be measured is the overhead: the
same training, divided alike, by the engine's own means in one compiled loop (on PyTorch
in Python), and by `Loop.fit`. Both are in the same processes and take turns.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from target import Target, percent, table_of

HERE = Path(__file__).parent
ALONE = {
    "tensorflow": "`tf.distribute`, `tf.while` over the steps",
    "jax": "`keras.distribution`, `lax.while_loop` over the steps",
    "torch": "`DistributedDataParallel`, loop in Python",
}
WAYS = [(1, 1), (2, 1), (4, 1), (1, 2)]
"""Devices of a process, and processes."""

STEPS = 500
PATIENCE_S = 600

Row = dict[str, Any]


def measure(
    backends: Sequence[str],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """The seconds of an epoch of both, for each engine and each way to divide."""
    rows = []
    for backend in [*backends, "torch"]:
        for devices, processes in WAYS:
            if backend == "torch" and devices > 1:
                continue  # PyTorch has one device of a CPU.
            say(f"scaling: {backend}: {devices} device(s) in {processes} process(es)")
            row = {"backend": backend, "devices": devices, "processes": processes}
            found = _run(backend, devices, processes, rounds or (5 if quick else 11))
            rows.append({**row, **found})
    return rows


def _run(backend: str, devices: int, processes: int, rounds: int) -> Row:
    port = _free_ports(processes)
    given = [str(rounds), str(STEPS)]
    program = [sys.executable, str(HERE / "scaling_peers.py"), backend]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    started = [
        subprocess.Popen(
            [*program, *map(str, (devices, rank, processes, port)), *given],
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=HERE,
        )
        for rank in range(processes)
    ]
    try:
        out, _ = started[0].communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PATIENCE_S} s"}
    finally:
        for process in started:
            process.kill()
            process.wait()
    lines = out.strip().splitlines()
    if not lines:
        return {"error": f"the chief ended with {started[0].returncode}"}
    found: Row = json.loads(lines[-1])
    return found


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        held: list[socket.socket] = []
        try:
            held.append(socket.create_server(("127.0.0.1", 0)))
            first = int(held[0].getsockname()[1])
            for port in range(first + 1, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
            return first
        except (OSError, OverflowError):
            continue
        finally:
            for server in held:
                server.close()


def _overheads(row: Row) -> list[float]:
    """By how many percent loopscope takes longer than the engine, by round."""
    return [100 * (ours / alone - 1) for alone, ours in row["seconds"]]


def page(rows: Sequence[Row], about: str) -> str:
    """results-scaling.md."""
    lines = [
        "# Several devices and processes",
        "",
        about,
        "",
        f"The tutorial's MLP, {STEPS} steps of 64 examples a turn, metrics included. "
        "*The engine alone* is the same training, divided alike, written by hand: "
        + "; ".join(f"{name}: {words}" for name, words in ALONE.items())
        + ". Overhead: median, least and most of the rounds. All devices and processes "
        "share the same cores, so that nothing gets faster with their number.",
        "",
        *table_of([_target(row) for row in rows]),
        "",
        "## Everyone",
        "",
        "| engine | devices | processes | engine alone, ms/step | loopscope, ms/step "
        "| overhead, % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['backend']} | {row['devices']} | {row['processes']} | "
        if "error" in row:
            lines.append(f"{start}{row['error']} | - | - |")
            continue
        alone, ours = (
            1e3 * statistics.median(turn[who] for turn in row["seconds"]) / STEPS
            for who in (0, 1)
        )
        lines.append(f"{start}{alone:.3f} | {ours:.3f} | {percent(_overheads(row))} |")
    return "\n".join(lines) + "\n"


def _target(row: Row) -> Target:
    words = f"{row['devices']} device(s) in {row['processes']} process(es)"
    statement = f"{row['backend']}, {words}: at most 5 % over the engine alone"
    if "error" in row:
        return Target(statement, row["error"], None)
    overheads = _overheads(row)
    met = statistics.median(overheads) <= 5
    return Target(statement, f"{percent(overheads)} %", met)
