"""Killed at any instant, a training goes on to the end that was coming.

Three kills here; `make crash-test` has hundreds, of every kind.
"""

import subprocess
import sys
from pathlib import Path

import keras
import pytest

PROGRAM = Path(__file__).parent / "crash" / "run.py"
CASES = {"tensorflow": "tf-fused", "jax": "jax-fused"}


@pytest.mark.slow
def test_a_training_killed_three_times_ends_as_the_one_that_nobody_disturbed():
    case = CASES[keras.backend.backend()]
    # With this seed the two that are aimed come first, and early in the training.
    kinds = ["half-written", "commit-before", "SIGTERM"]
    options = ["--brief", "--case", case, "--kills", "3", "--seed", "703"]
    done = subprocess.run(
        [sys.executable, PROGRAM, *options, "--kind", *kinds],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout
