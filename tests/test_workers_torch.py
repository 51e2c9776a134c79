"""Several processes that train one model on PyTorch, to the numbers of one."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import ALL, TORCH

pytestmark = pytest.mark.skipif(not TORCH, reason="gloo is PyTorch's")

PROGRAM = Path(__file__).parent / "workers_torch.py"

SAME = [
    build.__name__
    for build in ALL
    if build.__name__ not in ("convnet_with_batchnorm", "gan")
]
"""The models whose numbers are those of one process.

A BatchNorm's statistics are those of a worker's own rows; a metric that is given a mean
(that of the GAN) counts one for each worker.
"""

OWN = ["with_backward", "with_ddp", "functional", "clipped", "scaled", "guided"]


def on_workers(what, *arguments, size=2, within=300, leave=0):
    """What each worker has printed last; `None` for one that was killed.

    The last `leave` of them are not waited for.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    one_thread = {"OMP_NUM_THREADS": "1"}  # Idle ones would spin beside the others.
    workers = [
        subprocess.Popen(
            [sys.executable, PROGRAM, what, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **told,
                **one_thread,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
            },
        )
        for rank in range(size)
    ]
    end = time.monotonic() + within
    try:
        found = []
        for worker in workers[: size - leave]:
            out, err = worker.communicate(timeout=max(1, end - time.monotonic()))
            assert worker.returncode in (0, -9), err[-3000:]
            found.append(json.loads(out.splitlines()[-1]) if out else None)
        return found
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def assert_same(found):
    chief, *others = found
    for name, apart in chief.items():
        assert apart["difference"] < 1e-6, (name, apart)
        assert all(other[name]["sha256"] == apart["sha256"] for other in others), name


@pytest.fixture(scope="module")
def found():
    return on_workers("quick")


def test_workers_follow_a_single_process(found):
    assert_same([worker["agrees"] for worker in found])


def test_each_example_is_taken_by_one_worker_once_an_epoch(found):
    first, second = (worker["taken"] for worker in found)
    assert len(first) == 2 * (4 + 4 + 4 + 2)
    assert sorted(first[:14] + second[:15]) == list(range(29))
    assert sorted(first[14:] + second[15:]) == list(range(29))


def test_variables_stay_equal_and_masks_differ(found):
    first, second = (worker["mixed"] for worker in found)
    assert first["sha256"] == second["sha256"]
    assert first["moved"]
    pairs = list(zip(first["masks"], second["masks"], strict=True))
    assert len(pairs) == 3
    assert all(one != other for one, other in pairs)


def test_what_the_chief_says_all_know(found):
    assert [worker["said"] for worker in found] == [[True] * 3] * 2


def test_workers_that_start_apart_are_refused(found):
    for worker in found:
        assert "Other variables than the chief's on worker 1." in worker["refused"]
        assert "call `keras.utils.set_random_seed`" in worker["refused"]


def assert_lost(said, size, rank):
    assert re.match(f"Worker {rank} of {size} has lost another one, ", said["said"])
    assert "Start all of them again" in said["said"]
    assert said["step"] == 5
    assert "as the last finished step left them" in said["notes"][0]


def test_a_killed_worker_does_not_leave_the_others_waiting():
    # Far less than the group's timeout: a closed connection is noticed at once.
    chief, killed = on_workers("lost", "eager", 250, "SIGKILL", within=200)
    assert killed is None
    assert_lost(chief, 2, 0)


@pytest.mark.slow
def test_a_killed_worker_is_noticed_by_a_graph():
    chief, _ = on_workers("lost", "graph", 550, "SIGKILL", within=500)
    assert_lost(chief, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "graph"])
def test_a_worker_that_hangs_is_given_up_after_the_timeout(gear):
    found = on_workers("lost", gear, 60, "SIGSTOP", size=3, within=590, leave=1)
    for rank, worker in enumerate(found):
        assert_lost(worker, 3, rank)
        assert "Timed out" in worker["said"]


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "graph"])
@pytest.mark.parametrize("name", [*SAME, *OWN])
def test_two_workers_follow_a_single_process(name, gear):
    assert_same(on_workers("agrees", name, gear))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"recorded {name}" for name in SAME])
def test_gradients_of_a_portable_step_are_those_of_one_process(name):
    assert_same(on_workers("agrees", name, "eager"))


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "graph"])
def test_four_workers_follow_a_single_process(gear):
    assert_same(on_workers("agrees", "subclassed,with_backward", gear, size=4))


@pytest.mark.slow
def test_a_metric_that_is_given_a_mean_counts_one_for_each_worker():
    apart, _ = on_workers("agrees", "gan", "eager")
    assert apart["gan"]["path"].startswith("critic_loss_mean")


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", "graph"])
def test_validation_prediction_and_small_batches(gear):
    chief, other = on_workers("uses", gear)
    assert chief["rows"] == other["rows"] == 17
    assert chief["sha256"] == other["sha256"]
    assert chief["difference"] < 1e-6, chief
    assert chief["predicted"] < 1e-6
