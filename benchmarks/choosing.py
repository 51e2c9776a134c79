"""Whether `auto` ever makes a training much longer than the plain gear.

Prints one JSON document. Trains each workload from nothing, for one epoch and for
several, in the plain gear (`graph` on TensorFlow, `xla` on JAX) and in `auto`, whose
trials and compilations count. They take turns, and nothing is remembered in between.
Takes the number of rounds as its argument; the backend is that of `KERAS_BACKEND`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["LOOPSCOPE_CACHE"] = "0"

SEVERAL = 5
"""Epochs of the longer training."""


def train(workload: Any, gear: str, epochs: int) -> dict[str, Any]:
    """Train anew; seconds from the call of `fit` to its return."""
    from loopscope import Loop
    from workloads import Training

    made = Training(workload)
    loop = Loop(made.model, made.optimizer, made.loss, [made.metric], gear=gear, seed=0)
    x, y = workload.data
    began = time.perf_counter()
    loop.fit(x, y, batch_size=workload.batch_size, epochs=epochs, verbose=0)
    wall_s = time.perf_counter() - began
    assert loop.gear is not None
    return {"seconds": wall_s, "gear": loop.gear.name}


def main(rounds: int) -> None:
    import keras

    from loopscope import backend
    from workloads import WORKLOADS

    plain = backend.current().gears[0].name
    rows = []
    train(WORKLOADS["mlp"], plain, 1)  # What a process does only once.
    for workload in WORKLOADS.values():
        for epochs in (1, SEVERAL):
            row: dict[str, Any] = {
                "workload": workload.name,
                "backend": keras.config.backend(),
                "steps": workload.steps * epochs,
                "plain": plain,
                "gears": [],
                "plain_s": [],
                "auto_s": [],
            }
            for number in range(rounds):
                order = ("plain", "auto") if number % 2 == 0 else ("auto", "plain")
                for who in order:
                    gear = plain if who == "plain" else "auto"
                    done = train(workload, gear, epochs)
                    row[f"{who}_s"].append(done["seconds"])
                    if who == "auto":
                        row["gears"].append(done["gear"])
            rows.append(row)
            print(f"{workload.name}, {row['steps']} steps", file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
