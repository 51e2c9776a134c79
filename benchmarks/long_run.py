"""What a long training costs: per step, in memory, and from a disk.

Prints one JSON document. Run in a process of its own, since it measures memory.
Takes the number of steps as its argument; a million if there is none.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["LOOPSCOPE_CACHE"] = "0"

EPOCH_STEPS, BATCH = 1000, 8
GEAR = "fused-xla"


def memory_mib(kind: str) -> float:
    """`VmRSS` (all) or `RssAnon` (what no file backs) of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def tiny_loop(width: int) -> Any:
    import keras

    from loopscope import Loop

    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(1)])
    return Loop(model, "sgd", "mse", gear=GEAR, seed=0)


def flat(steps: int) -> dict[str, Any]:
    """Cost per step and memory while so many steps go by.

    A window is a power of ten: the steps from 10^k to 10^(k+1). Its figures are the
    median of its epochs, and the quiet tenth, which other programs on the machine
    disturb least.
    """
    import numpy as np

    random = np.random.default_rng(0)
    x = random.standard_normal((EPOCH_STEPS * BATCH, 8)).astype("float32")
    y = x.sum(1, keepdims=True)
    loop = tiny_loop(8)
    source = loop.source(x, y, batch_size=BATCH)
    costs: list[float] = []
    before: dict[str, float] = {}
    kinds = ("VmRSS", "RssAnon")
    began = time.perf_counter()
    for _epoch in loop.epochs(steps // EPOCH_STEPS):
        for _ in _epoch.train(source, every=None):
            pass
        now = time.perf_counter()
        costs.append(1e6 * (now - began) / EPOCH_STEPS)
        if loop.step == 2 * EPOCH_STEPS:  # Everything is compiled.
            before = {kind: memory_mib(kind) for kind in kinds}
        began = time.perf_counter()
    after = {kind: memory_mib(kind) for kind in kinds}
    windows, first = [], 1
    while first < len(costs):
        of = sorted(costs[first : 10 * first])
        windows.append(
            {
                "from_step": first * EPOCH_STEPS,
                "to_step": min(len(costs), 10 * first) * EPOCH_STEPS,
                "median_us": statistics.median(of),
                "quiet_us": of[len(of) // 10],
            }
        )
        first *= 10
    return {
        "steps": loop.step,
        "windows": windows,
        "grown_mib": {kind: after[kind] - before[kind] for kind in kinds},
    }


def from_disk(allowed_mib: int = 128) -> dict[str, Any]:
    """Train on a file ten times as large as the memory that may be added."""
    import numpy as np

    width, batch = 1024, 256
    rows = allowed_mib * 10 * 2**20 // (4 * width)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.dat"
        x = np.memmap(file, "float32", "w+", shape=(rows, width))
        for start in range(0, rows, 1000):
            x[start : start + 1000] = 0.01
        x.flush()
        x = np.memmap(file, "float32", "r", shape=(rows, width))
        y = np.zeros((rows, 1), "float32")
        loop = tiny_loop(width)
        # The program's own memory is no data: compile on a few rows, then measure.
        for epoch in loop.epochs(1):
            for _ in epoch.train(loop.source(x, y, batch_size=batch), steps=64):
                pass
        before, done = memory_mib("RssAnon"), threading.Event()
        peak = [before]

        def watch() -> None:
            while not done.wait(0.01):
                peak[0] = max(peak[0], memory_mib("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        began, first = time.perf_counter(), loop.step
        try:
            for epoch in loop.epochs(1):
                source = loop.source(x, y, batch_size=batch)
                for _ in epoch.train(source, every=None):
                    pass
        finally:
            done.set()
            watcher.join()
        return {
            "file_mib": file.stat().st_size / 2**20,
            "allowed_mib": allowed_mib,
            "added_mib": peak[0] - before,
            "steps": loop.step - first,
            "seconds": time.perf_counter() - began,
        }


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(json.dumps({"flat": flat(count), "from_disk": from_disk()}))
