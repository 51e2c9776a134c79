"""The programs in examples/: each learns, and goes on to the same bits."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import loopscope
from loopscope.events import ChunkEnd
from loopscope.experiment import Experiment, load
from models import FUSED, GEARS, TENSORFLOW

# Most of it is the compiling of convolutions, which JAX takes long for.
pytestmark = pytest.mark.slow_on_jax

EXAMPLES = Path(__file__).parents[1] / "examples"

SMALL = {
    "image_classification": {"epochs": 2, "examples": 1280},
    "transfer_learning": {"epochs": 4, "few": 128, "examples": 640},
    "gan": {"epochs": 1, "examples": 1280},
    "distillation": {"epochs": 2, "examples": 640, "labels": 320},
    "language_model": {"epochs": 4, "examples": 5_000, "write": 2, "blocks": 1},
    "contrastive_learning": {"epochs": 2, "examples": 640, "batch_size": 32},
    "policy_gradient": {"epochs": 2},
}
"""What each experiment is given, so that it has some twenty steps."""

FALLS = {"gan": "critic"}
"""The output that falls, where it is not the loss."""


def made(name: str, function: str = "experiment", **changes: Any) -> Experiment:
    """An experiment of the examples, small and without validation."""
    keras.utils.clear_session(free_memory=False)  # As a process that begins with it.
    options = {**SMALL[name], "gear": FUSED, **changes}
    found = load(f"{EXAMPLES / name}.py:{function}", options=options)
    for argument in ("validation_data", "validation_batch_size"):
        found.arguments.pop(argument, None)
    return found


def trained(experiment: Experiment, **arguments: Any) -> dict[str, np.ndarray]:
    """What each step returned, by name."""
    chunks: list[Any] = []

    def listener(event: Any) -> None:
        if isinstance(event, ChunkEnd) and event.phase == "train":
            chunks.append(event.outputs)

    experiment.loop.subscribe(listener)
    experiment.fit(verbose=0, **arguments)
    return {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def assert_learns(name: str, outputs: dict[str, np.ndarray]) -> None:
    assert all(np.isfinite(values).all() for values in outputs.values())
    if name == "policy_gradient":  # Its loss is near 0 always: what counts is this.
        assert outputs["stood"][-1] > outputs["stood"][0]
        return
    losses = outputs[FALLS.get(name, "loss")]
    quarter = len(losses) // 4
    assert losses[-quarter:].mean() < losses[:quarter].mean()


@pytest.mark.parametrize("name", SMALL)
def test_each_program_learns_within_some_steps(name):
    assert_learns(name, trained(made(name)))


MOVES = ("image_classification", "contrastive_learning")
"""They move pictures about, for which TensorFlow has no operation that XLA compiles."""

OTHERS = [
    (name, gear)
    for name in SMALL
    for gear in GEARS
    if gear != FUSED and not (TENSORFLOW and "xla" in gear and name in MOVES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gear"), OTHERS)
def test_each_program_learns_in_every_gear_that_can_run_it(name, gear):
    assert_learns(name, trained(made(name, gear=gear)))


@pytest.mark.slow
def test_a_backbone_is_left_alone_until_it_is_let_go():
    frozen = made("transfer_learning")
    backbone = frozen.loop.model.get_layer("backbone")
    kernel = backbone.trainable_weights or backbone.weights
    before = [np.array(w) for w in map(as_numpy, kernel)]
    trained(frozen)
    assert all(map(np.array_equal, before, map(as_numpy, kernel)))
    let_go = made("transfer_learning", "fine_tuning", frozen=frozen)
    trained(let_go)
    assert not any(map(np.array_equal, before, map(as_numpy, kernel)))


def as_numpy(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def test_the_contrastive_loss_is_its_formula():
    rows = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    loss, found = map(as_numpy, module("contrastive_learning").nt_xent(*rows))
    units = rows.reshape(8, 3)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    near = np.exp(units @ units.T / 0.2)
    np.fill_diagonal(near, 0)
    partner = near[np.arange(8), (np.arange(8) + 4) % 8]
    assert np.allclose(loss, -np.log(partner / near.sum(1)).mean(), rtol=1e-5)
    assert np.allclose(found, np.mean(partner == near.max(1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gan", "policy_gradient"])
def test_a_program_killed_within_an_epoch_ends_in_the_bits_it_would_have(
    name, tmp_path
):
    whole = made(name, epochs=2)
    trained(whole, run=tmp_path / "whole")
    middle = whole.loop.step // 2 + 3  # Beyond the first epoch, and within one.

    def leave(event: Any) -> None:
        if isinstance(event, ChunkEnd) and left.loop.step == middle:
            raise KeyboardInterrupt

    left = made(name, epochs=2)
    left.loop.subscribe(leave, chunk_steps={"train": 1})
    with pytest.raises(KeyboardInterrupt):
        left.fit(verbose=0, run=tmp_path / "left")
    resumed = made(name, epochs=2)
    resumed.fit(verbose=0, run=tmp_path / "left", resume=True)
    assert resumed.loop.state.sha256() == whole.loop.state.sha256()
    steps = [loopscope.open_run(tmp_path / n).steps for n in ("whole", "left")]
    assert all(np.array_equal(steps[0][k], steps[1][k]) for k in steps[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gan", "policy_gradient"])
def test_any_step_of_a_program_is_rewound_to_its_bits_and_opened_up(name, tmp_path):
    first = made(name, epochs=2)
    trained(first, run=tmp_path / "run")
    run = loopscope.open_run(tmp_path / "run", experiment=made(name, epochs=2))
    for step in (0, first.loop.step // 2 + 3, first.loop.step - 1):
        rewound = run.rewind(step)
        assert rewound.identical
        assert rewound.look.layers


@pytest.mark.slow
def test_an_outer_loop_that_plays_goes_on_with_what_was_seen(tmp_path):
    """As `main` of the example does it: the body plays where an epoch begins."""
    play = module("policy_gradient").play

    def outer(run: Path, leave: int | None = None) -> str:
        experiment = made("policy_gradient")
        (player,) = experiment.arguments["callbacks"]
        loop, rows = experiment.loop, experiment.train_source()
        for epoch in loop.epochs(2, run=run, resume=True):
            if loop.cursor.index == 0:
                play(player.policy, player.memory, epoch.index)
            for step in epoch.train(rows, every=5):
                if step.number == leave:
                    loop.save()
                elif leave is not None and step.number > leave:
                    raise KeyboardInterrupt
        return loop.state.sha256()

    whole = outer(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        outer(tmp_path / "left", leave=30)
    assert outer(tmp_path / "left") == whole
    found = loopscope.open_run(tmp_path / "left", experiment=made("policy_gradient"))
    assert found.rewind(40).identical


FIGURES = {
    "image_classification": (r"test accuracy ([\d.]+)", 0.98, 1),
    "transfer_learning": (r"let go as well: +accuracy ([\d.]+)", 0.9, 1),
    "gan": (r"distance ([\d.]+)", 0, 30),
    "distillation": (r"val_accuracy ([\d.]+)", 0.93, 1),
    "language_model": (r"([\d.]+) bits a character", 1, 2.5),
    "contrastive_learning": (r"probe ([\d.]+)", 0.92, 1),
    "policy_gradient": (r"a pole stood +([\d.]+)", 190, 201),
}
"""The last figure that each script prints, and between what it has to be."""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_each_script_prints_a_figure_that_shows_it_has_learnt(name):
    done = subprocess.run(
        [sys.executable, f"{name}.py"],
        cwd=EXAMPLES,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pattern, least, most = FIGURES[name]
    assert least < float(re.findall(pattern, done.stdout)[-1]) < most


@pytest.mark.slow
def test_a_program_is_an_experiment_of_the_command_line(tmp_path):
    from click.testing import CliRunner

    from loopscope.cli import main

    name = f"{EXAMPLES / 'policy_gradient.py'}:experiment"
    run = tmp_path / "run"
    words = ["train", name, "--gear", FUSED, "--epochs", "2", "--run", str(run)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "stood" in done.output
    done = CliRunner().invoke(main, ["verify", str(run)])
    assert done.exit_code == 0, done.output
