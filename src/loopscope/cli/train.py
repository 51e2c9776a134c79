"""`loopscope train`: train an experiment."""

from __future__ import annotations

import time
from typing import Any

import click

from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    print_json,
    seed_option,
    start_backend,
)


@click.command()
@click.argument("experiment")
@click.option("--gear", help="How steps are executed.  [default: the experiment's]")
@click.option("--epochs", type=int, help="Passes.  [default: the experiment's]")
@backend_option
@seed_option
@json_option
@command
def train(
    experiment: str,
    gear: str | None,
    epochs: int | None,
    backend: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train EXPERIMENT and print its metrics."""
    start_backend(backend)
    from loopscope.events import EpochEnd
    from loopscope.experiment import load
    from loopscope.view import text
    from loopscope.view.progress import ProgressLine

    made = load(experiment, seed=seed)
    loop, out = made.loop, text.console()
    changes: dict[str, Any] = {"verbose": 0}
    if gear is not None:
        loop.gear = gear
    if epochs is not None:
        changes["epochs"] = epochs
    total = epochs or made.arguments.get("epochs", 1)

    def say(event: Any) -> None:
        if isinstance(event, EpochEnd):
            out.print(
                f"epoch {event.epoch + 1}/{total} - {event.wall_s:.1f} s - "
                f"{text.metrics(event.logs)}"
            )

    line = ProgressLine()
    if not as_json:
        loop.subscribe(line)
        loop.subscribe(say)
    began = time.perf_counter()
    with line.shown():
        history = made.fit(**changes)
    seconds = time.perf_counter() - began
    metrics = {name: values[-1] for name, values in history.history.items()}
    state = loop.state.sha256()
    result = {
        "steps": loop.step,
        "epochs": len(history.epoch),
        "gear": loop.gear.name if loop.gear else None,
        "metrics": metrics,
        "seconds": seconds,
        "state_sha256": state,
    }
    if as_json:
        print_json(result)
        return
    out.print(
        f"{loop.step} steps in gear {result['gear']}, {seconds:.1f} s, "
        f"state {state[:12]}"
    )
