"""The program, run as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from program import loaded_by

from loopscope import open_run
from loopscope.cli import main

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

EXPERIMENT = """
import keras
import numpy as np
from loopscope import Experiment, Loop

def tiny():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="tiny")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, "sgd", loss, ["accuracy"], gear="auto", seed=0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.integers(0, 3, 40)
    return Experiment(loop, x=x, y=y, batch_size=16, epochs=2)

def wrong():
    return 3

def broken():
    raise RuntimeError("no such data")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    return tmp_path


def loopscope(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "loopscope.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": ""},
        timeout=300,
        check=False,
    )


def document(*arguments: str, cwd: Path | None = None) -> dict:
    done = loopscope(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_process(*arguments: str) -> Result:
    """The same without the seconds that a new process takes to load a framework."""
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["--help"], ["mnist", "--help"], ["--version"]])
def test_help_imports_no_framework(arguments):
    assert loaded_by(arguments, "numpy", "rich") == "[]"


@pytest.mark.slow_on_jax
def test_mnist_json_has_the_promised_keys_and_faster_gears_take_the_same_step(
    tmp_path,
):
    made = document(
        *("mnist", "--batch-size", "5000", "--epochs", "2", "--scale"), cwd=tmp_path
    )
    assert set(made) == {
        "backend",
        "eager",
        "chosen",
        "speedup",
        "first_step_max_relative_difference",
        "history",
        "test_accuracy",
        "state_sha256",
        "run",
    }
    assert made["backend"] == os.environ["KERAS_BACKEND"]
    assert set(made["eager"]) == {"seconds_per_epoch", "epochs"}
    assert made["eager"]["epochs"] == 1
    assert set(made["chosen"]) == {
        "gear",
        "seconds_per_epoch",
        "compile_seconds",
        "epochs",
    }
    assert made["chosen"]["epochs"] == 2
    assert made["first_step_max_relative_difference"] <= 1e-5
    assert [row["epoch"] for row in made["history"]] == [0, 1]
    assert set(made["history"][0]) == {
        "epoch",
        "train_accuracy",
        "validation_accuracy",
        "seconds",
    }
    assert made["test_accuracy"] > 0.5
    assert re.fullmatch("[0-9a-f]{64}", made["state_sha256"])
    assert re.fullmatch(r"runs/mnist-[\d-]+", made["run"])
    # Its outer loop is the tutorial's own; the run goes on by `fit` all the same.
    gone_on = document("resume", made["run"], "--epochs", "3", cwd=tmp_path)
    assert gone_on["epochs"] == 3
    verified = document("verify", made["run"], "--all", cwd=tmp_path)
    assert verified["steps"] == 30
    assert not verified["differences"]


@pytest.mark.slow
def test_mnist_prints_the_lines_of_the_tutorial(tmp_path):
    done = loopscope(
        *("mnist", "--batch-size", "200", "--epochs", "1", "--logits", "--no-run"),
        cwd=tmp_path,
    )
    assert not (tmp_path / "runs").exists()
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"^Start of epoch 0$",
        r"^Training loss \(for one batch\) at step 0: \d+\.\d{4}$",
        r"^Training loss \(for one batch\) at step 200: \d+\.\d{4}$",
        r"^Seen so far: 200 samples$",
        r"^Seen so far: 40200 samples$",
        r"^Training acc over epoch: 0\.\d{4}$",
        r"^Validation acc: 0\.\d{4}$",
        r"^Time taken: \d+\.\d\ds$",
    ):
        assert len(re.findall(pattern, done.stdout, re.M)) == 2, pattern
    assert re.search(r"^eager .* 1\.0x", done.stdout, re.M)
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_train_gives_the_same_state_in_two_processes(folder):
    first, again = (
        document("train", "experiment.py:tiny", "--seed", "1", cwd=folder)
        for _ in range(2)
    )
    assert set(first) == {
        "steps",
        "epochs",
        "gear",
        "metrics",
        "seconds",
        "state_sha256",
    }
    assert (first["steps"], first["epochs"]) == (6, 2)
    assert set(first["metrics"]) == {"loss", "accuracy"}
    assert first["state_sha256"] == again["state_sha256"]


def test_train_takes_gear_and_epochs_and_prints_a_line_an_epoch(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = in_process("train", "experiment.py:tiny", "--gear", "eager", "--epochs", "3")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:10] for line in lines[:3]] == [
        "epoch 1/3 ",
        "epoch 2/3 ",
        "epoch 3/3 ",
    ]
    assert lines[3].startswith("9 steps in gear eager, ")


def test_train_watches_and_the_run_has_the_signals(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = in_process("train", "experiment.py:tiny", "--watch", "2", "--run", "watched")
    assert done.exit_code == 0, done.stderr
    run = open_run("watched")
    assert run.signals["step"].tolist() == [0, 2, 4]
    assert any(name.startswith("gradient_norm/") for name in run.signals)
    assert run.rewind(3, look=False).identical
    run.close()


def test_train_can_say_how_long_it_would_take_and_train_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ("train", "experiment.py:tiny", "--epochs", "40", "--estimate")
    made = json.loads(in_process(*arguments, "--json").stdout)
    assert made["steps"] == 3 * 40
    assert made["chosen"] in [g["gear"] for g in made["gears"]]
    assert made["total_s"] > 0
    said = in_process(*arguments, "--gear", made["chosen"]).stdout
    assert said.startswith("120 steps in 40 epochs: about ")
    assert "epoch 1/40" not in said


def test_compare_lists_every_gear(folder, monkeypatch):
    monkeypatch.chdir(folder)
    made = json.loads(in_process("compare", "experiment.py:tiny", "--json").stdout)
    gears = {row["gear"]: row for row in made["gears"]}
    assert list(gears) == ["eager", "graph", "xla", "fused-graph", "fused-xla"]
    for row in gears.values():
        assert set(row) == {
            "gear",
            "available",
            "reason",
            "compile_seconds",
            "ms_per_step",
            "break_even_step",
            "max_relative_difference",
            "chosen",
        }
        if row["available"]:
            assert row["max_relative_difference"] <= 1e-5
            assert row["ms_per_step"] > 0
    assert sum(row["chosen"] for row in gears.values()) == 1
    if made["backend"] == "jax":
        assert not gears["graph"]["available"]
        assert gears["graph"]["reason"].startswith("the jax backend has: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "nowhere"], "An experiment is named `package.module:function`"),
        (["train", "no/such/file.py:f"], "There is no file 'no/such/file.py'"),
        (["train", "experiment.py:absent"], "has no function 'absent'"),
        (["train", "experiment.py:wrong"], "must return a `loopscope.Experiment"),
        (["train", "experiment.py:broken"], "RuntimeError: no such data"),
        (["train", "no_such_module:f"], "could not be imported: ModuleNotFoundError"),
        (["train", "experiment.py:tiny", "--gear", "sixth"], "Unknown gear"),
        (["train", "experiment.py:tiny", "--epochs", "-1"], "`epochs` must be"),
        (["train", "experiment.py:tiny", "--watch", "0"], "`watch` must be"),
        (["mnist", "--batch-size", "0"], "`batch_size` must be a whole number"),
    ],
)
def test_wrong_use_exits_2_with_one_line(folder, arguments, text, monkeypatch):
    monkeypatch.chdir(folder)
    done = in_process(*arguments, "--json")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert text in done.stderr
    assert "Traceback" not in done.stderr
