"""The same loop on several devices of JAX, to the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import ALL, JAX

pytestmark = pytest.mark.skipif(not JAX, reason="on JAX only")

PROGRAM = Path(__file__).parent / "devices.py"
NAMES = [*(build.__name__ for build in ALL), "batchnorm_and_dropout"]
PARTS = [
    pytest.param(gear, names, id=f"{gear}-{names[0]}")
    for gear, step in (("xla", 9), ("fused-xla", 9), ("eager", 2))
    for names in (NAMES[i : i + step] for i in range(0, len(NAMES), step))
]
"""Gears, and the models that one process trains: in eager, many small programs."""
EVEN = ["tutorial_mlp", "dropout_mlp", "transformer_block", "batchnorm_and_dropout"]
"""Models whose dense kernels have rows for two."""


def on_devices(what, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, PROGRAM, what, *arguments],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return on_devices("quick")


@pytest.mark.slow
@pytest.mark.parametrize(("gear", "names"), PARTS)
def test_two_devices_follow_one(gear, names):
    # In doubles, where rounding does not hide anything else.
    found = on_devices("agree", gear, *names, DEVICES_DOUBLE="1")
    assert {n: a for n, a in found.items() if not a["difference"] < 1e-6} == {}


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "xla", "fused-xla"])
def test_devices_that_divide_kernels_as_well_follow_one(gear):
    options = {"DEVICES_DOUBLE": "1", "DEVICES_OVER": "model_parallel"}
    found = on_devices("agree", gear, *EVEN, **options)
    assert {n: a for n, a in found.items() if not a["difference"] < 1e-6} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("gear", "names"), PARTS)
def test_in_floats_losses_agree_and_variables_but_for_rounding(gear, names):
    found = on_devices("agree", gear, *names)
    assert {n: a for n, a in found.items() if not a["logs"] < 1e-6} == {}
    # Adam and RMSprop divide by gradients that are hardly more than rounding.
    assert {n: a for n, a in found.items() if not a["difference"] < 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("over", ["data_parallel", "model_parallel"])
@pytest.mark.parametrize("gear", ["eager", "xla"])
def test_validation_prediction_streams_and_runs_in_the_other_gears(gear, over):
    uses = on_devices("uses", gear, over)
    assert uses["difference"] < 1e-6, uses
    assert uses["predicted"] < 1e-6
    assert on_devices("streamed", gear, over)["difference"] < 1e-6
    whole, left = on_devices("resumed", gear, over)["ends"]
    assert left == whole


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "xla", "fused-xla"])
def test_signals_are_those_of_one_device(gear):
    apart = on_devices("watched", gear)
    assert {name.partition("/")[0] for name in apart} >= {"gradient_norm"}
    assert max(apart.values()) < 1e-6, apart


@pytest.mark.slow
def test_auto_takes_a_compiled_gear():
    assert on_devices("chosen") in ("xla", "fused-xla")


def test_rows_and_kernels_are_divided_in_the_compiled_step(found):
    assert found["divides"] == {
        "seen": [["kernel", [2, 8]], ["x", [4, 4]]],
        "kernel": [2, 8],
        "slot": [2, 8],
    }


def test_validation_prediction_and_batches_that_do_not_divide(found):
    uses = found["uses"]
    assert uses["difference"] < 1e-6, uses
    assert uses["predicted"] < 1e-6
    assert uses["rows"] == [9, 9]


def test_a_run_on_several_devices_goes_on_to_the_same_bits(found):
    whole, left = found["resumed"]["ends"]
    assert left == whole
    assert whole[0] == 18


def test_a_model_that_is_not_where_the_distribution_is_is_refused(found):
    left, before = found["refusals"]
    assert "made under a distribution, and now none is set" in left
    assert "has to be made under the distribution that it is trained under" in before


def test_what_is_recorded_names_the_devices(found):
    kept = found["kept"]
    assert kept["device"].startswith("4 x ")
    assert kept["keras.distribution"].startswith(
        "ModelParallel{'batch': 2, 'model': 2}"
    )
