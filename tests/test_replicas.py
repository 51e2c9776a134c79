"""The same loop on several replicas of `tf.distribute`, to the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models import ALL, TENSORFLOW

pytestmark = pytest.mark.skipif(not TENSORFLOW, reason="tf.distribute is TensorFlow's")

PROGRAM = Path(__file__).parent / "replicas.py"

SAME = [build.__name__ for build in ALL if build.__name__ != "convnet_with_batchnorm"]
"""All models but one: a BatchNorm's statistics are those of a replica's own rows."""

QUICK = ("subclassed", "synchronized", "with_tape")


def on_replicas(what, *arguments):
    done = subprocess.run(
        [sys.executable, PROGRAM, what, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "gear",
    [
        pytest.param("eager", marks=pytest.mark.slow),
        pytest.param("graph", marks=pytest.mark.slow),
        "fused-graph",
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (*SAME, "synchronized", "with_tape", "clipped")
    ],
)
def test_replicas_follow_a_single_device(name, gear):
    found = on_replicas("agrees", name, gear)
    if name == "gan":
        # A metric that is given a mean counts one for each replica.
        assert found["path"].startswith("critic_loss_mean")
    else:
        assert found["difference"] < 1e-6, found


def test_the_copies_stay_equal():
    assert on_replicas("copies", "fused-graph") == {"copies": 2, "alike": True}


def test_validation_prediction_and_small_batches():
    found = on_replicas("uses", "fused-graph")
    assert found["difference"] < 1e-6, found
    assert found["predicted"] < 1e-6
    assert found["order"] == [True, True]


def test_a_run_on_replicas_goes_on_to_the_same_bits():
    whole, left = on_replicas("resumed", "fused-graph")["ends"]
    assert left == whole
    assert whole[0] == 18


def test_what_replicas_cannot_do_is_refused():
    xla, fused, watched = on_replicas("refusals")
    for text in (xla, fused):
        assert "compiles by XLA, for one device" in text
    assert "divided among replicas are not measured" in watched


def test_auto_takes_a_gear_that_replicas_have():
    assert on_replicas("chosen") in ("graph", "fused-graph")
