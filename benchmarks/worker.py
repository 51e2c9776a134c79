"""A process that trains when it is told to, and idles in between.

One process per backend, started by `run.py`, so that rounds can go from one to the
other. Reads one JSON command a line, answers with one JSON line:

    {"do": "make", "workload": "mlp", "module": "ours", "peer": "loopscope auto"}
    {"do": "time", "peer": "loopscope auto"}

Anything that libraries print goes to standard error.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from typing import Any

LEAST_S = 0.5
"""What is measured at once lasts at least so long: short epochs are repeated."""

PEERS: dict[str, Any] = {}


def make(*, workload: str, module: str, peer: str) -> dict[str, Any]:
    """Build a peer and let it train its first batch twice."""
    from workloads import WORKLOADS

    room = importlib.import_module(module)
    factory = {**room.PEERS, **getattr(room, "MLP_PEERS", {})}[peer]
    began = time.perf_counter()
    PEERS[peer] = made = factory(WORKLOADS[workload])
    first_loss = made.first_loss()
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    made.first_loss()
    again_s = time.perf_counter() - began
    return {"first_loss": first_loss, "first_s": first_s, "again_s": again_s}


def check(*, peer: str) -> dict[str, Any]:
    """Train an epoch from the initial weights; its mean loss. Also warms up."""
    made = PEERS[peer]
    made.restore()
    began = time.perf_counter()
    loss = made.epoch()
    seconds = time.perf_counter() - began
    return {
        "loss": loss,
        "seconds": seconds,
        "steps": made.steps,
        "about": made.about(),
    }


def measure(*, peer: str) -> dict[str, Any]:
    """Train an epoch, short ones several times, and time it; seconds of one."""
    made = PEERS[peer]
    with getattr(made, "under_way", nullcontext)():
        gc.collect()
        cpu_s, began, epochs = time.process_time(), time.perf_counter(), 0
        while epochs == 0 or time.perf_counter() - began < LEAST_S:
            loss = made.epoch()
            epochs += 1
        seconds = (time.perf_counter() - began) / epochs
        cpu_s = (time.process_time() - cpu_s) / epochs
    return {"seconds": seconds, "cpu_s": cpu_s, "loss": loss}


def drop(*, peer: str) -> dict[str, Any]:
    """Forget a peer and what it has compiled."""
    PEERS.pop(peer).close()
    gc.collect()
    return {}


def versions() -> dict[str, Any]:
    """Versions of what runs in here."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("loopscope", "keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "python": sys.version.split()[0]}


COMMANDS = {
    "make": make,
    "check": check,
    "time": measure,
    "drop": drop,
    "versions": versions,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = COMMANDS[command.pop("do")](**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)
    os._exit(0)  # Held `fit`s would keep the process waiting.


if __name__ == "__main__":
    main()
