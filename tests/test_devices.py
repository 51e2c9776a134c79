"""The same loop on several devices of JAX, in one process or more: the same numbers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import ALL, JAX

pytestmark = pytest.mark.skipif(not JAX, reason="on JAX only")

PROGRAM = Path(__file__).parent / "devices.py"
WORKER = Path(__file__).parent / "workers_jax.py"
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
@pytest.mark.parametrize(("gear", "names"), PARTS)
def test_in_floats_the_first_step_agrees_in_every_variable_as_a_whole(gear, names):
    found = on_devices("first_steps", gear, *names)
    # One number, which the optimizer has made of gradients that cancel each other out.
    known = {"critic/dense_2/bias": 3e-6}
    least = {n: known.get(a["path"], 1e-6) for n, a in found.items()}
    assert {n: a for n, a in found.items() if not a["difference"] < least[n]} == {}


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


def test_a_model_is_moved_to_the_devices(found):
    made, given = found["adopted"]
    assert made == given


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


@contextlib.contextmanager
def workers(folder, size, what, *arguments):
    """Processes that train together, none of which outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    with contextlib.ExitStack() as files:
        for rank in range(size):
            command = [sys.executable, WORKER, what, str(rank), str(size), port]
            out = files.enter_context(Path(folder, f"{rank}.out").open("w"))
            err = files.enter_context(Path(folder, f"{rank}.err").open("w"))
            started.append(
                subprocess.Popen([*command, *arguments], stdout=out, stderr=err)
            )
        try:
            yield started
        finally:
            for process in started:
                process.kill()
                process.wait(30)


def on_workers(folder, size, what, *arguments):
    """What each of the processes has found."""
    deadline = time.monotonic() + 400
    with workers(folder, size, what, *arguments) as started:
        for process in started:
            process.wait(max(1, deadline - time.monotonic()))
        errors = [Path(folder, f"{rank}.err").read_text() for rank in range(size)]
        ends = [process.returncode for process in started]
        assert ends == [0] * size, "\n".join(error[-2000:] for error in errors)
    outputs = [Path(folder, f"{rank}.out").read_text() for rank in range(size)]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_workers(tmp_path_factory.mktemp("two"), 2, "quick")


def test_two_processes_follow_one(two):
    chief, worker = two
    assert chief["team"] == [0, 2]
    assert worker["team"] == [1, 2]
    assert chief["sha256"] == worker["sha256"]
    assert chief["difference"] < 1e-6


def test_workers_hear_what_the_chief_has_said(two):
    assert [found["said"] for found in two] == [[True] * 5] * 2


def test_the_chief_reads_and_assigns_variables_alone(two):
    chief, worker = two
    assert chief["alone"]["rate"] == pytest.approx(0.025)
    assert worker["alone"] is None


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "xla", "fused-xla"])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_follow_one_in_every_gear(gear, size, tmp_path):
    if (gear, size) == ("eager", 4):
        pytest.skip("four processes compile every operation: minutes")
    found = on_workers(tmp_path, size, "slow", gear)
    for over in ("data_parallel", "within"):
        assert len({worker[over]["sha256"] for worker in found}) == 1
        worst = max(worker[over]["difference"] for worker in found)
        assert worst < 1e-6, found
        assert found[0][over]["predicted"] < 1e-6


@pytest.mark.slow
def test_parts_of_a_variable_in_another_process_are_not_read(tmp_path):
    for said in on_workers(tmp_path, 2, "refused"):
        assert "of which each process has but a part" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_left_ends_soon_after_a_process_is_killed(victim, tmp_path):
    with workers(tmp_path, 2, "endless", "fused-xla") as started:
        deadline = time.monotonic() + 200
        outputs = [tmp_path / f"{rank}.out" for rank in range(2)]
        while not all("training" in output.read_text() for output in outputs):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        started[victim].send_signal(signal.SIGKILL)
        left = started[1 - victim]
        # The heartbeat that is asked for is 10 s.
        assert left.wait(60) != 0
    said = (tmp_path / f"{1 - victim}.err").read_text()
    assert "Gloo" in said or "JAX distributed service detected fatal errors" in said
