"""`loopscope mnist`: the main job, the tutorial's training on real MNIST."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from loopscope.cli.beside import shown, view_option
from loopscope.cli.common import (
    backend_option,
    command,
    json_option,
    no_run_option,
    print_json,
    run_option,
    seed_option,
    start_backend,
)

LOG_EVERY = 200
TOLERANCE = 1e-5


@dataclass
class Part:
    """A training in one gear: what it took and what came out."""

    gear: str = ""
    epoch_seconds: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds_per_epoch(self) -> float:
        """The mean epoch, compilation apart."""
        return sum(self.epoch_seconds) / max(1, len(self.epoch_seconds))


@click.command()
@click.option("--gear", default="auto", show_default=True, help="Beside eager.")
@click.option("--epochs", default=5, show_default=True, help="In that gear.")
@click.option("--eager-epochs", default=1, show_default=True, help="In gear eager.")
@click.option("--batch-size", default=64, show_default=True, help="Examples a step.")
@click.option("--scale", is_flag=True, help="Scale the inputs to 0..1.")
@click.option("--logits", is_flag=True, help="Drop the softmax.")
@run_option
@no_run_option
@view_option
@backend_option
@seed_option
@json_option
@command
def mnist(
    gear: str,
    epochs: int,
    eager_epochs: int,
    batch_size: int,
    scale: bool,
    logits: bool,
    run: Path | None,
    no_run: bool,
    view: bool,
    backend: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Run the tutorial on real MNIST: eager beside the gear that pays.

    What the chosen gear trains is recorded as a run under runs/.

    Trains the same model from the same state in gear eager and in the chosen gear,
    prints the tutorial's lines, checks that both take the same first step, and ends
    with how many times faster the chosen gear was. Exits 1 if the first steps part.

    --view shows the run in a browser. The page ends with the training; on a terminal it
    stays until Ctrl-C.
    """
    name = start_backend(backend)
    from loopscope import checks
    from loopscope.cli.training import fresh_run
    from loopscope.experiment import load

    checks.count("epochs", epochs, least=1)
    checks.count("eager-epochs", eager_epochs, least=1)
    options = {
        "batch_size": batch_size,
        "epochs": epochs,
        "scale": scale,
        "logits": logits,
        "gear": gear,
        "seed": seed,
    }
    made = load("mnist", seed=seed, options=options)
    if no_run:
        run = None
    elif run is None:
        run = fresh_run("mnist")
    with shown(run, as_json=as_json) if view else nullcontext():
        return _side_by_side(name, made, options, eager_epochs, run, as_json=as_json)


def _side_by_side(
    name: str,
    made: Any,
    options: dict[str, Any],
    eager_epochs: int,
    run: Path | None,
    *,
    as_json: bool,
) -> int:
    """Train in gear eager and in the chosen one, and say how that went."""
    from loopscope.experiments.mnist import data
    from loopscope.view import text
    from loopscope.view.progress import ProgressLine

    epochs, batch_size, scale = (options[n] for n in ("epochs", "batch_size", "scale"))
    loop, out = made.loop, text.console()

    def say(text: str) -> None:
        if not as_json:
            out.print(text)

    line = ProgressLine()
    if not as_json:
        loop.subscribe(line)

    source = made.train_source()
    compiling = _Compiling()
    loop.subscribe(compiling)
    loop.prepare("train", source, epochs_left=epochs)
    chosen, trials_s = loop.gear, compiling.take()
    assert chosen is not None
    start = loop.state.snapshot()
    apart = loop.first_step_difference(source)

    with line.shown():
        loop.gear = "eager"
        say(f"-- {name}, gear eager")
        eager = _train(made, source, eager_epochs, compiling, say)
        loop.state.restore(start)
        loop.step = 0
        loop.gear = chosen
        say(f"\n-- {name}, gear {chosen.name}")
        fast = _train(made, source, epochs, compiling, say, run)
        fast.compile_seconds += trials_s
    _, (x_test, y_test) = data(scale=scale)
    test = loop.evaluate(
        x_test, y_test, batch_size=batch_size, verbose=0, return_dict=True
    )
    speedup = eager.seconds_per_epoch / fast.seconds_per_epoch
    if as_json:
        print_json(
            {
                "backend": name,
                "eager": {
                    "seconds_per_epoch": eager.seconds_per_epoch,
                    "epochs": eager_epochs,
                },
                "chosen": {
                    "gear": fast.gear,
                    "seconds_per_epoch": fast.seconds_per_epoch,
                    "compile_seconds": fast.compile_seconds,
                    "epochs": epochs,
                },
                "speedup": speedup,
                "first_step_max_relative_difference": apart,
                "history": fast.history,
                "test_accuracy": test["accuracy"],
                "state_sha256": loop.state.sha256(),
                "run": None if run is None else str(run),
            }
        )
    else:
        _table(out, eager, fast, speedup, apart, test["accuracy"])
        if run is not None:
            out.print(
                f"Recorded in {run}; `loopscope rewind {run} --step 100` runs a step "
                "of it again.",
                soft_wrap=True,
            )
    return 0 if apart <= TOLERANCE else 1


class _Compiling:
    """Adds up the seconds that a loop spends on compiling and on choosing a gear."""

    def __init__(self) -> None:
        self._wall_s = 0.0

    def __call__(self, event: Any) -> None:
        from loopscope.events import Compiled, GearChosen

        if isinstance(event, (Compiled, GearChosen)):
            self._wall_s += event.wall_s

    def take(self) -> float:
        """The seconds since this was asked last."""
        wall_s, self._wall_s = self._wall_s, 0.0
        return wall_s


def _train(
    made: Any,
    source: Any,
    epochs: int,
    compiling: _Compiling,
    say: Any,
    run: Path | None = None,
) -> Part:
    """The tutorial's loop, line for line."""
    loop, part = made.loop, Part(gear=made.loop.gear.name)
    validation = made.arguments["validation_data"]
    batch_size = made.arguments["batch_size"]
    for epoch in loop.epochs(epochs, run=run):
        say(f"\nStart of epoch {epoch.index}")
        for step in epoch.train(source, every=LOG_EVERY):
            say(f"Training loss (for one batch) at step {step.index}: {step.loss:.4f}")
            say(f"Seen so far: {step.samples} samples")
        say(f"Training acc over epoch: {epoch.metrics['accuracy']:.4f}")
        epoch.validate(validation, batch_size=batch_size)
        say(f"Validation acc: {epoch.metrics['val_accuracy']:.4f}")
        say(f"Time taken: {epoch.seconds:.2f}s")
        compiled_s = compiling.take()
        part.compile_seconds += compiled_s
        part.epoch_seconds.append(epoch.seconds - compiled_s)
        part.history.append(
            {
                "epoch": epoch.index,
                "train_accuracy": epoch.metrics["accuracy"],
                "validation_accuracy": epoch.metrics["val_accuracy"],
                "seconds": epoch.seconds,
            }
        )
    return part


def _table(
    out: Any, eager: Part, fast: Part, speedup: float, apart: float, test: float
) -> None:
    from loopscope.view import text

    rows = [
        (
            part.gear,
            f"{part.seconds_per_epoch:.2f}",
            f"{part.compile_seconds:.1f}",
            f"{faster:.1f}x",
            f"{part.history[-1]['validation_accuracy']:.4f}",
            tested,
        )
        for part, faster, tested in (
            (eager, 1.0, ""),
            (fast, speedup, f"{test:.4f}"),
        )
    ]
    columns = ("gear", "s/epoch", "compiling s", "faster", "validation acc", "test acc")
    out.print()
    out.print(text.table(columns, rows))
    out.print(
        f"Largest relative difference between the two gears' first steps: {apart:.1e}"
    )
