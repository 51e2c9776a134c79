"""How soon the page is there: a run of a million steps, in Chromium.

    page.py [--steps N] [--rounds N]

Writes a run's journal as the recorder does, serves it, and opens it again and again:
until the first paint, until the curve is sketched and drawn, until a range of it that
was zoomed into is drawn, and what the server takes for the curve. Needs `chromium` and
Playwright.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROW_STEPS = 1000
"""Steps of a row, as the writer makes them of fast steps."""

DRAWN = "#charts .plot .scatterlayer .trace"

SKETCHED = ".sketch polyline"
"""What stands there until plotly.js, which is large, has been read."""

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def record(folder: Path, steps: int) -> None:
    """A small real run, its journal grown to so many steps."""
    import keras

    import loopscope
    from loopscope.run.journal import JournalWriter

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    loop = loopscope.Loop(model, optimizer="sgd", loss="mse")
    loop.fit(x, x[:, :1], epochs=1, batch_size=64, verbose=0, run=folder)
    noise = rng.normal(scale=0.1, size=steps)
    loss = (2.3 * np.exp(-np.arange(steps) / (steps / 8)) + 0.1 + abs(noise)).astype(
        "<f4"
    )
    writer = JournalWriter(folder / "journal.sqlite")
    with writer.transaction():
        writer.put(
            "steps",
            [
                (
                    first,
                    "loss",
                    len(part := loss[first : first + ROW_STEPS]),
                    "<f4",
                    part.tobytes(),
                    1.8e9 + first / 1e3,
                )
                for first in range(0, steps, ROW_STEPS)
            ],
        )
    writer.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the page of a folder, while it is served."""
    command = [sys.executable, "-m", "loopscope.cli", "view", str(folder)]
    command += ["--port", "0", "--no-open", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        try:
            for line in process.stdout:
                text += line
                if line.startswith("}"):
                    break
            yield json.loads(text)["address"]
        finally:
            process.terminate()


def once(browser: Any, address: str) -> dict[str, float]:
    """Milliseconds of one visit, with nothing in the browser's cache."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    try:
        page = context.new_page()
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_selector(f"{SKETCHED}, {DRAWN}")
        sketch_s = time.perf_counter() - began
        page.wait_for_selector(DRAWN)
        curve_s = time.perf_counter() - began
        paint = page.evaluate(PAINTED)
        # At first the range is the whole run, then the middle half of it.
        began = time.perf_counter()
        page.click("#zoom-in")
        while not page.evaluate(
            "document.querySelector('.plot')._fullLayout.xaxis.range[0] > 0"
        ):
            pass
        return {
            "first paint": paint,
            "curve sketched": 1e3 * sketch_s,
            "curve drawn": 1e3 * curve_s,
            "zoomed in": 1e3 * (time.perf_counter() - began),
        }
    finally:
        context.close()


def answered(address: str) -> float:
    """Milliseconds of the server for a curve of the whole run."""
    host = address.split("/#")[0]
    began = time.perf_counter()
    with urllib.request.urlopen(f"{host}/api/curve?run=.&name=loss") as reply:
        reply.read()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Measure, and print a table for docs/page.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("page.py needs chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        record(Path(place) / "run", chosen.steps)
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        with served(Path(place) / "run") as address:
            first = answered(address)
            answers = [answered(address) for _ in range(chosen.rounds)]
            once(browser, address)  # Chromium itself starts slowly.
            visits = [once(browser, address) for _ in range(chosen.rounds)]
        browser.close()
    found = {name: [v[name] for v in visits] for name in visits[0]}
    found["the server's curve"] = answers
    print(f"| {chosen.steps:,} steps | median ms | least to most |\n|---|---|---|")
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.0f} | {min(values):.0f} to {max(values):.0f} |")
    print(f"| the server's first curve | {first:.0f} | |")


if __name__ == "__main__":
    main()
