"""The commands on runs: train, resume, rewind, verify, runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
from click.testing import CliRunner, Result
from program import loaded_by

from loopscope.cli import main
from loopscope.doctor.checks import ALL
from loopscope.run import reading
from loopscope.run.folder import Folder

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

EXPERIMENT = """
import os
import time
import keras
import numpy as np
from loopscope import Experiment, Loop

class Slow(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        time.sleep(float(os.environ.get("SLOW", "0")))

def tiny():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="tiny")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, "sgd", loss, ["accuracy"], gear="fused-{kind}", seed=0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.integers(0, 3, 40)
    return Experiment(loop, x=x, y=y, batch_size=8, epochs=4, callbacks=[Slow()])
"""

REWOUND = {
    "step",
    "epoch",
    "batch_index",
    "gear",
    "checkpoint_step",
    "replayed_steps",
    "identical",
    "first_difference",
    "loss_recorded",
    "loss_replayed",
    "learning_rate",
    "state_sha256_before",
    "state_sha256_after",
    "seconds",
    # Of the step that was opened up.
    "examples",
    "first_nonfinite",
    "gradients",
    "layers",
    "loss",
    "loss_difference",
    "loss_per_example",
    "losses",
    "missing",
    "phases",
    "updates",
    "worst",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an experiment in it."""
    kind = "graph" if keras.backend.backend() == "tensorflow" else "xla"
    (tmp_path / "experiment.py").write_text(EXPERIMENT.replace("{kind}", kind))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_process(*arguments: str) -> Result:
    """Run the program without the seconds that a process takes to load a framework."""
    keras.utils.clear_session(free_memory=False)
    return CliRunner().invoke(main, list(arguments))


def document(*arguments: str, code: int = 0) -> dict:
    done = in_process(*arguments, "--json")
    assert done.exit_code == code, done.output + done.stderr
    return json.loads(done.stdout)


def trained(path: str, *arguments: str) -> dict:
    return document("train", "experiment.py:tiny", "--run", path, *arguments)


def test_a_run_is_trained_listed_rewound_and_verified():
    made = trained("runs/a")
    assert made["run"] == "runs/a"
    (listed,) = document("runs")
    assert listed["status"] == "finished"
    assert listed["experiment"] == "experiment.py:tiny"
    assert (listed["steps"], listed["epochs"]) == (20, 4)
    rewound = document("rewind", "runs/a", "--step", "7")
    assert set(rewound) == REWOUND
    assert rewound["identical"] is True
    assert (rewound["step"], rewound["epoch"], rewound["batch_index"]) == (7, 1, 2)
    assert rewound["loss_replayed"] == rewound["loss_recorded"]
    last = document("rewind", "runs/a", "--step", "19")
    assert last["state_sha256_after"] == made["state_sha256"]
    verified = document("verify", "runs/a", "--all")
    assert verified["verified"] is True
    assert verified["same_identity"] is True
    assert verified["steps"] == 20


def test_the_same_is_said_in_words():
    done = in_process("train", "experiment.py:tiny", "--run", "runs/a")
    assert "recorded in runs/a" in done.output
    assert "finished" in in_process("runs").output
    assert "the recorded bits" in in_process("rewind", "runs/a", "--step", "7").output
    assert "verified: 20 steps" in in_process("verify", "runs/a", "--all").output
    again = in_process("resume", "runs/a")
    assert "nothing is left to do" in again.output


def test_a_rewound_step_is_shown_and_saved(tmp_path):
    trained("runs/a")
    shown = in_process("rewind", "runs/a", "--step", "7").output
    assert "tiny/dense" in shown
    assert "update/weight" in shown
    for suffix in (".npz", ".safetensors", ".html"):
        place = tmp_path / f"step{suffix}"
        done = in_process("rewind", "runs/a", "--step", "7", "--save", str(place))
        assert done.exit_code == 0
        assert place.stat().st_size > 1000
    refused = in_process("rewind", "runs/a", "--step", "7", "--save", "step.txt")
    assert refused.exit_code == 2
    assert ".safetensors" in refused.stderr


def test_a_step_is_explained():
    trained("runs/a")
    story = document("why", "runs/a", "--step", "7")
    assert {"loss", "usual_loss", "examples", "gradients", "later", "story"} <= set(
        story
    )
    told = in_process("why", "runs/a", "--step", "7")
    assert told.exit_code == 0
    assert "Step 7 has a loss of" in told.output


def test_two_runs_are_compared():
    trained("runs/a")
    trained("runs/b")
    same = document("diff", "runs/a", "runs/b", "--step", "7")
    assert same["partings"] == []
    document(
        *("resume", "runs/a", "--from-step", "7", "--run", "runs/c"),
        *("--learning-rate", "0.5"),
    )
    apart = document("diff", "runs/a", "runs/c", code=1)
    assert apart["step"] == 8
    assert apart["first"]["kind"] == "weight"
    said = in_process("diff", "runs/a", "--step", "3", "--other-step", "4")
    assert said.exit_code == 1
    assert "first batch x" in said.output
    assert in_process("diff", "runs/a").exit_code == 2


def test_an_experiment_is_examined():
    found = document("doctor", "experiment.py:tiny")
    assert found["healthy"] is True
    assert list(found["seconds"]) == list(ALL)
    one = document("doctor", "experiment.py:tiny", "--check", "labels")
    assert list(one["seconds"]) == ["labels"]
    unknown = in_process("doctor", "experiment.py:tiny", "--check", "luck")
    assert unknown.exit_code == 2
    assert "from_logits" in unknown.stderr
    ill = document("doctor", "mnist", "--check", "inputs", code=1)
    (finding,) = ill["findings"]
    assert finding["check"] == "inputs"
    assert finding["measured"]["largest"] == 255
    assert finding["link"] == "docs/doctor/inputs.md"


def test_a_branch_leaves_its_parent_alone():
    trained("runs/a")
    branch = document(
        *("resume", "runs/a", "--from-step", "7", "--run", "runs/b"),
        *("--learning-rate", "0.5"),
    )
    assert branch["run"] == "runs/b"
    assert branch["steps"] == 20
    before = document("rewind", "runs/b", "--step", "6")
    after = document("rewind", "runs/b", "--step", "7")
    assert before["learning_rate"] == pytest.approx(0.01)
    assert after["learning_rate"] == pytest.approx(0.5)
    assert document("verify", "runs/a", "--all")["verified"]


def test_more_epochs_may_be_asked_for():
    trained("runs/whole", "--epochs", "6")
    trained("runs/a", "--epochs", "3")
    gone_on = document("resume", "runs/a", "--epochs", "6")
    whole, other = (
        document("rewind", f"runs/{n}", "--step", "29") for n in ["a", "whole"]
    )
    assert whole["state_sha256_after"] == other["state_sha256_after"]
    assert gone_on["epochs"] == 6


def test_a_replay_that_departs_is_bad_news_with_a_cause():
    trained("runs/a")
    text = Path("experiment.py").read_text()
    Path("experiment.py").write_text(text.replace("default_rng(0)", "default_rng(1)"))
    rewound = document("rewind", "runs/a", "--step", "7", code=1)
    assert rewound["identical"] is False
    assert rewound["first_difference"]["step"] == rewound["checkpoint_step"]
    assert rewound["first_difference"]["causes"][0].startswith("the code of the")
    assert document("verify", "runs/a", code=1)["verified"] is False
    said = in_process("rewind", "runs/a", "--step", "7")
    assert "departs at step" in said.stderr
    refused = in_process("resume", "runs/a", "--epochs", "9")
    assert refused.exit_code == 2
    assert "code/experiment.py: was" in refused.stderr
    assert in_process("resume", "runs/a", "--epochs", "5", "--anyway").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rewind", "runs/none", "--step", "1"], "There is no run in 'runs/none'"),
        (["verify", "runs/none"], "There is no run in 'runs/none'"),
        (["resume", "runs/none"], "There is no run in 'runs/none'"),
        (["runs", "nowhere"], "There is no folder 'nowhere'"),
        (
            ["resume", "runs/a", "--from-step", "3"],
            "needs both --from-step N and --run",
        ),
        (["rewind", "runs/a", "--step", "20"], "The run has the steps 0 to 19"),
        (["train", "experiment.py:tiny", "--run", "runs/a"], "holds a run already"),
    ],
)
def test_wrong_use_is_refused_in_one_line(arguments, said):
    trained("runs/a")
    done = in_process(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output + done.stderr


@pytest.mark.once
def test_runs_imports_no_framework():
    assert loaded_by(["runs", ".", "--json"]) == "[]"


def test_a_terminated_training_is_saved_and_goes_on_in_another_process(folder):
    whole = trained("runs/whole")
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "loopscope.cli", "train", "experiment.py:tiny"),
            *("--run", "runs/a"),
        ],
        env={**os.environ, "SLOW": "0.7", "PYTHONWARNINGS": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    run = Folder(folder / "runs/a")
    until = time.monotonic() + 120
    while not run.exists or reading.summary(run).steps < 6:
        assert time.monotonic() < until
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    assert reading.summary(run).status == "running"
    assert reading.summary(run).writer["pid"] == started.pid
    refused = in_process("resume", "runs/a")
    assert refused.exit_code == 2
    assert f"is being written by process {started.pid} on host" in refused.stderr
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 143
    assert "SIGTERM; the run 'runs/a' is saved before step" in said
    assert reading.summary(run).status == "interrupted"
    gone_on = document("resume", "runs/a")
    assert gone_on["state_sha256"] == whole["state_sha256"]
    assert document("verify", "runs/a", "--all")["verified"]
