"""`--workers`: local workers are started, watched, and ended together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import loopscope
from loopscope.cli import launch, main
from loopscope.cluster import local, tf_config

EXPERIMENT = """
import os, signal, sys, time
import keras
import numpy as np
from loopscope import Experiment, Loop

def tiny():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)],
        name="tiny",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, "adam", loss, ["accuracy"], gear="GEAR", seed=0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(44, 4)).astype("float32"), rng.integers(0, 3, 44)
    return Experiment(loop, x=x, y=y, batch_size=8, epochs=4)

class Batches:
    def __init__(self, loop):
        self.loop = loop

    def __iter__(self):
        how, rank = os.environ.get("HOW"), os.environ.get("WHO")
        mine = rank == str(self.loop.together.rank)
        rng = np.random.default_rng(0)
        for count in range(10**6):
            time.sleep(0.01)
            if mine and count == 90:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "failing":
                    raise RuntimeError("no more data")
                if how == "leaving":
                    sys.exit(0)
            yield rng.normal(size=(8, 4)).astype("float32"), rng.integers(0, 3, 8)

def long():
    made = tiny()
    return Experiment(made.loop, x=Batches(made.loop), steps_per_epoch=50, epochs=10**4)
"""
GEARS = {"tensorflow": "fused-graph", "jax": "fused-xla", "torch": "eager"}
BACKEND = keras.backend.backend()

# Processes take their time to begin; the quick suite has them on one backend.
pytestmark = pytest.mark.slow_on_jax


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiment.py").write_text(EXPERIMENT.replace("GEAR", GEARS[BACKEND]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loopscope.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "", **environ},
    )


def ended(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def called(*arguments: str, **environ: str) -> tuple[int, str, str]:
    return ended(started(*arguments, **environ))


def alive(folder: Path) -> list[int]:
    """Processes that work in this folder, this one apart."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").resolve() == folder.resolve():
                found.append(int(place.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def until(condition, seconds: float = 200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def in_process(*arguments: str):
    keras.utils.clear_session(free_memory=False)
    return CliRunner().invoke(main, list(arguments))


def losses(run: str) -> np.ndarray:
    with_steps = loopscope.open_run(run).steps
    return with_steps["loss"]


def test_two_workers_train_a_run_that_one_machine_rewinds_and_goes_on_with(folder):
    code, out, err = called(
        *("train", "experiment.py:tiny", "--workers", "2", "--run", "runs/two"),
        *("--epochs", "2"),
    )
    assert code == 0, err
    # The chief alone speaks.
    assert [line[:10] for line in out.splitlines()[:2]] == ["epoch 1/2 ", "epoch 2/2 "]
    assert out.count("recorded in runs/two") == 1
    assert alive(folder) == []
    run = loopscope.open_run("runs/two")
    assert run.manifest["identity"]["workers"] == 2
    # One process sums in another order: what that makes is said.
    rewound = in_process("rewind", "runs/two", "--step", "7", "--json")
    found = json.loads(rewound.stdout)
    assert found["loss_replayed"] == pytest.approx(found["loss_recorded"], rel=1e-5)
    if not found["identical"]:
        assert rewound.exit_code == 1
        cause = found["first_difference"]["causes"][0]
        assert cause.startswith("the number of workers is not the same")
        assert "workers: was 2, is 1" in cause
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gone_on = in_process("resume", "runs/two", "--epochs", "4")
    assert gone_on.exit_code == 0, gone_on.output
    note = "was trained by 2 workers, goes on with 1."
    assert any(note in str(warning.message) for warning in said)
    whole = in_process("train", "experiment.py:tiny", "--run", "runs/one")
    assert whole.exit_code == 0
    np.testing.assert_allclose(losses("runs/two"), losses("runs/one"), rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two_to_the_same_numbers(folder):
    arguments = ("train", "experiment.py:tiny", "--epochs", "2", "--run", "runs/a")
    assert in_process(*arguments).exit_code == 0
    code, _, err = called("resume", "runs/a", "--epochs", "4", "--workers", "2")
    assert code == 0, err
    assert "was trained by 1 worker, goes on with 2" in err
    assert in_process("train", "experiment.py:tiny", "--run", "runs/b").exit_code == 0
    np.testing.assert_allclose(losses("runs/a"), losses("runs/b"), rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_two_that_was_stopped_ends_in_the_same_bits(folder):
    arguments = ("train", "experiment.py:tiny", "--workers", "2", "--json")
    code, whole, err = called(*arguments, "--run", "runs/whole")
    assert code == 0, err
    assert called(*arguments, "--run", "runs/cut", "--epochs", "2")[0] == 0
    code, cut, err = called(
        "resume", "runs/cut", "--workers", "2", "--epochs", "4", "--json"
    )
    assert code == 0, err
    assert "goes on with" not in err
    assert json.loads(cut)["state_sha256"] == json.loads(whole)["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "who", "said"),
    [
        ("killed", "1", "worker 1 of 2 (process {pid}) was killed by SIGKILL"),
        ("killed", "0", "worker 0 of 2 (process {pid}) was killed by SIGKILL"),
        ("failing", "1", "worker 1 of 2 (process {pid}) has ended with exit code 1"),
        ("leaving", "1", "worker 1 of 2 (process {pid}) has ended too early"),
        ("failing", "0", "worker"),
    ],
)
def test_a_worker_that_is_gone_ends_the_others_and_is_named(folder, how, who, said):
    process = started(
        *("train", "experiment.py:long", "--workers", "2", "--run", "runs/a"),
        HOW=how,
        WHO=who,
    )
    code, _, err = ended(process)
    assert code not in (0, 2) or who == "0"
    before, _, after = said.partition("{pid}")
    assert before in err
    assert after in err
    if (how, who) == ("failing", "1"):
        # PyTorch writes a rank of its own before each line.
        assert re.search(r"\[worker 1\] .*RuntimeError: no more data", err)
    seconds = float(err.partition("they had ended ")[2].partition(" s later")[0])
    assert seconds <= launch.GRACE_S + launch.KILL_S + 5
    assert alive(folder) == []


def trains(run: str):
    def check():
        try:
            return len(loopscope.open_run(run).steps["loss"]) > 20
        except (loopscope.errors.RunError, OSError, KeyError):
            return False

    return check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_all_workers_saved(folder, number, expected):
    process = started(
        *("train", "experiment.py:long", "--workers", "2", "--run", "runs/a")
    )
    until(trains("runs/a"))
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == expected, err
    assert alive(folder) == []
    run = loopscope.open_run("runs/a")
    assert list((run.path / "checkpoints").glob("*.json"))


@pytest.mark.slow
def test_workers_of_a_launcher_that_was_killed_end_by_themselves(folder):
    process = started(
        *("train", "experiment.py:long", "--workers", "2", "--run", "runs/a")
    )
    until(trains("runs/a"))
    process.kill()
    ended(process)
    until(lambda: alive(folder) == [], launch.SAVING_S + 30)


@pytest.mark.slow
def test_what_all_workers_refuse_is_said_once(folder):
    code, _, err = called("train", "experiment.py:absent", "--workers", "2")
    assert code == 2
    assert err.count("has no function 'absent'") == 1
    assert "Traceback" not in err


@pytest.mark.slow
def test_workers_that_another_launcher_has_started_join_without_the_option(folder):
    with socket.socket() as one, socket.socket() as other:
        for held in (one, other):
            held.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    workers = [
        started(
            *("train", "experiment.py:tiny", "--json"),
            TF_CONFIG=tf_config(local(rank, ports)),
        )
        for rank in range(2)
    ]
    (code, chief, err), (other_code, silent, _) = map(ended, workers)
    assert (code, other_code) == (0, 0), err
    assert json.loads(chief)["steps"] == 24
    assert silent == ""


def test_a_worker_starts_no_workers(folder, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(local(1, (2222, 2223))))
    done = in_process("train", "experiment.py:tiny", "--workers", "2")
    assert done.exit_code == 2
    assert "TF_CONFIG says it is worker 1 of 2" in done.stderr
    branch = ("resume", "runs/a", "--from-step", "3", "--run", "runs/b")
    assert "One process makes a branch" in in_process(*branch).stderr


@pytest.mark.once
def test_less_than_one_worker_is_refused():
    done = in_process("train", "experiment.py:tiny", "--workers", "0")
    assert done.exit_code == 2
    assert "0 is not in the range x>=1" in done.stderr


@pytest.mark.once
def test_one_worker_is_this_process(folder):
    done = in_process("train", "experiment.py:tiny", "--workers", "1", "--epochs", "1")
    assert done.exit_code == 0
    assert "6 steps in gear" in done.output
