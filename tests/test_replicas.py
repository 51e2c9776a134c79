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


@pytest.fixture(scope="module")
def found():
    return on_replicas("quick")


@pytest.fixture(scope="module")
def more():
    return on_replicas("slow")


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "graph", "fused-graph"])
@pytest.mark.parametrize("name", [*SAME, "synchronized", "with_tape", "clipped"])
def test_replicas_follow_a_single_device(name, gear):
    apart = on_replicas("agrees", name, gear)
    if name == "gan":
        # A metric that is given a mean counts one for each replica.
        assert apart["path"].startswith("critic_loss_mean")
    else:
        assert apart["difference"] < 1e-6, apart


@pytest.mark.parametrize("name", ["with_tape", "clipped"])
def test_replicas_follow_a_single_device_in_the_fused_gear(name, found):
    apart = found["agrees"][name]
    assert apart["difference"] < 1e-6, apart


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subclassed", "synchronized"])
def test_more_replicas_follow_a_single_device_in_the_fused_gear(name, more):
    apart = more["agrees"][name]
    assert apart["difference"] < 1e-6, apart


@pytest.mark.slow
def test_the_copies_stay_equal(more):
    assert more["copies"] == {"copies": 2, "alike": True}


def test_metrics_and_the_loss_go_along_with_the_gradients(found):
    assert found["messages"] == 1


def test_validation_prediction_and_small_batches(found):
    uses = found["uses"]
    assert uses["difference"] < 1e-6, uses
    assert uses["predicted"] < 1e-6
    assert uses["order"] == [True, True]


@pytest.mark.slow
def test_a_run_on_replicas_goes_on_to_the_same_bits(more):
    whole, left = more["resumed"]["ends"]
    assert left == whole
    assert whole[0] == 18


def test_what_replicas_cannot_do_is_refused(found):
    xla, fused, watched = found["refusals"]
    for text in (xla, fused):
        assert "compiles by XLA, for one device" in text
    assert "divided among replicas are not measured" in watched


def test_the_doctor_measures_a_loss_that_is_not_scaled(found):
    scaled, (factor,) = found["examined"]
    assert scaled == []
    assert 1.99 < factor < 2.01


def test_a_model_is_moved_to_the_replicas(found):
    made, given = found["adopted"]
    assert made == given


@pytest.mark.slow
def test_auto_takes_a_gear_that_replicas_have(more):
    assert more["chosen"] in ("graph", "fused-graph")
