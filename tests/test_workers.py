"""One training on several processes, on loopback; some of them are killed."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import sharding
from models import ALL, FUSED, JAX, TENSORFLOW, relative

pytestmark = [] if TENSORFLOW else [pytest.mark.slow]

PROGRAM = Path(__file__).parent / "workers.py"
PATIENCE_S = 300
"""What a test waits for its processes; it kills them afterwards."""

NOTICED_S = 60
"""Within so many seconds a worker notices that another one is gone (docs/scale.md)."""

SAME = [build.__name__ for build in ALL if build.__name__ != "convnet_with_batchnorm"]


def free_ports(count):
    """The first of so many ports in a row that nobody listens on."""
    for _ in range(100):
        held = []
        try:
            held.append(socket.create_server(("127.0.0.1", 0)))
            first = held[0].getsockname()[1]
            for port in range(first + 1, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
            return first
        except (OSError, OverflowError):
            continue
        finally:
            for server in held:
                server.close()
    raise OSError("no free ports")


def together(size, what, *arguments, dying=(), others_may=False):
    """What each of `size` processes has found; `None` of those that die."""
    with TemporaryDirectory() as folder:
        ended = _together(Path(folder), size, what, arguments)
        found = []
        for rank, (code, out, err) in enumerate(ended):
            if rank in dying:
                assert code, f"worker {rank} was to die"
            elif not others_may:
                assert code == 0, f"worker {rank}: {err.read_text()[-3000:]}"
            said = out.read_text().splitlines()
            found.append(json.loads(said[-1]) if code == 0 else None)
        return found


def _together(folder, size, what, arguments):
    port, started = free_ports(size), []
    given = [str(argument) for argument in (size, port, what, *arguments)]
    for rank in range(size):
        # No pipes: a worker that waits for its reader would hold up the others.
        out, err = folder / f"{rank}.out", folder / f"{rank}.err"
        with out.open("w") as said, err.open("w") as wrong:
            process = subprocess.Popen(
                [sys.executable, PROGRAM, str(rank), *given], stdout=said, stderr=wrong
            )
        started.append((process, out, err))
    try:
        until = time.monotonic() + PATIENCE_S
        for process, *_ in started:
            process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process, *_ in started:
            process.kill()
            process.wait()
    return [(process.returncode, out, err) for process, out, err in started]


def apart(folder, name, size):
    """The largest relative difference from one process, over all workers' variables."""
    (one,) = [np.load(Path(folder, f"{name}-1-0.npz"))]
    worst = 0.0
    for rank in range(size):
        other = np.load(Path(folder, f"{name}-{size}-{rank}.npz"))
        assert one.files == other.files
        worst = max([worst, *(relative(one[path], other[path]) for path in one.files)])
    return worst


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process has found, and two."""
    folder = tmp_path_factory.mktemp("workers")
    sharding.write(folder)
    one = together(1, "quick", FUSED, folder)[0]
    return folder, one, together(2, "quick", FUSED, folder)


@pytest.mark.parametrize("name", ["subclassed", *(["with_tape"] * TENSORFLOW)])
def test_workers_follow_a_single_process(name, found):
    folder, one, two = found
    # On JAX, Adam shows the rounding of gradients next to 0 (docs/scale.md).
    assert apart(folder, name, 2) < (1e-5 if JAX else 1e-6)
    for worker in two:
        history = worker["follows"][name]
        assert history == two[0]["follows"][name]
        for metric, values in one["follows"][name].items():
            assert relative(np.array(values), np.array(history[metric])) < 1e-6


def test_every_example_is_seen_once_by_one_worker(found):
    _, one, two = found
    assert [worker["counted"] for worker in two] == [one["counted"]] * 2
    assert set(one["counted"]) == {1.0}


def test_callbacks_of_the_chief_decide_for_all(found):
    _, one, two = found
    alone = one["with_callbacks"]
    chief, other = (worker["with_callbacks"] for worker in two)
    assert chief["called"] == alone["called"] > 0
    assert other["called"] == 0
    assert {**chief, "called": 0} == other
    assert chief["epochs"] == alone["epochs"]
    assert chief["rate"] == alone["rate"]
    for name in ("evaluated", "predicted"):
        assert relative(np.array(alone[name]), np.array(chief[name])) < 1e-5


def test_a_stream_that_comes_at_other_times_is_cut_alike(found):
    _, one, two = found
    assert [w["streamed"]["steps"] for w in two] == [one["streamed"]["steps"]] * 2
    assert two[0]["streamed"] == two[1]["streamed"]


def test_one_run_is_written_by_the_chief(found):
    from loopscope import open_run

    folder, one, two = found
    assert two[0]["recorded"] == two[1]["recorded"]
    assert two[0]["recorded"]["step"] == one["recorded"]["step"]
    run = open_run(folder / "run-2")
    assert len(run.steps["loss"]) == two[0]["recorded"]["step"]


def test_what_the_chief_raises_ends_all(found):
    _, _, (chief, other) = found
    fails, trains = chief["failing"]
    assert fails == "ArithmeticError: no more"
    assert "run on the chief alone" in trains
    fails, trains = other["failing"]
    assert fails == "WorkerError: The chief has ended the training. " + (
        "ArithmeticError: no more"
    )
    assert "run on the chief alone" in trains


def test_other_initial_variables_are_refused(found):
    _, _, two = found
    for worker in two:
        said = "UsageError: Other variables than the chief's on worker 1."
        assert worker["differing"].startswith(said)


@pytest.mark.slow
@pytest.mark.skipif(not TENSORFLOW, reason="test_devices.py and test_workers_torch.py")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("gear", ["eager", "graph", "fused-graph"])
def test_workers_follow_a_single_process_on_all_models(size, gear, tmp_path):
    names = [*(n for n in SAME if n != "gan"), "synchronized", "with_tape", "clipped"]
    for count in (1, size):
        together(count, "follows", tmp_path, gear, *names)
    found = {name: apart(tmp_path, name, size) for name in names}
    assert max(found.values()) < 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "leave"), [(2, "1:9"), (2, "0:9"), (2, "all:14"), (4, "2:3")]
)
def test_killed_workers_go_on_to_the_same_bits(size, leave, tmp_path):
    whole = together(size, "recorded", FUSED, tmp_path / "whole")
    assert all(worker == whole[0] for worker in whole)
    who = leave.partition(":")[0]
    dying = range(size) if who == "all" else [int(who)]
    left = together(
        *(size, "recorded", FUSED, tmp_path / "left", 4, leave),
        dying=dying,
        others_may=JAX,  # It ends processes itself, by a signal.
    )
    for worker in left:
        assert worker is None or worker["error"].startswith("WorkerError: Worker ")
    assert together(size, "recorded", FUSED, tmp_path / "left") == whole


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(tmp_path):
    (whole,) = together(1, "recorded", FUSED, tmp_path / "one", 4, "", "small_loop")
    together(2, "recorded", FUSED, tmp_path / "two", 2, "", "small_loop")
    (found,) = together(1, "recorded", FUSED, tmp_path / "two", 4, "", "small_loop")
    assert found["step"] == whole["step"]
    assert abs(found["loss"] / whole["loss"] - 1) < 1e-5


def same_numbers(one, several, folder):
    size = len(several)
    for kind in sharding.KINDS:
        (alone,) = (worker[kind] for worker in one)
        assert set(alone["counts"]) == {1.0}, kind
        for worker in several:
            found = worker[kind]
            assert found["counts"] == alone["counts"], kind
            assert found["steps"] == alone["steps"], kind
            assert found["state"] == several[0][kind]["state"], kind
            for name, values in alone["history"].items():
                theirs = np.array(found["history"][name])
                assert relative(np.array(values), theirs) < 1e-5, (kind, name)
        assert apart(folder, kind, size) < 1e-4, kind


def test_data_by_worker_are_read_once_and_give_the_same_numbers(found):
    folder, one, two = found
    same_numbers([one["by_worker"]], [worker["by_worker"] for worker in two], folder)


def test_data_by_worker_that_cannot_be_are_refused_on_every_worker(found):
    _, _, two = found
    for worker in two:
        arrays, shapes = worker["refused"]["arrays"], worker["refused"]["shapes"]
        assert arrays.startswith("DataError: Data by worker have to be batches already")
        assert "float32[4, 4]" in shapes
        assert "float32[5, 4]" in shapes


@pytest.mark.slow
@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_data_by_worker_on_four_workers(gear, tmp_path):
    sharding.write(tmp_path)
    one = together(1, "by_worker", gear, tmp_path, *sharding.KINDS)
    four = together(4, "by_worker", gear, tmp_path, *sharding.KINDS)
    same_numbers(one, four, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["1:8", "all:3"])
def test_data_by_worker_go_on_at_the_same_place(leave, tmp_path):
    sharding.write(tmp_path)
    last = (4, "", "mixed_loop", tmp_path)
    whole = together(2, "recorded", FUSED, tmp_path / "whole", *last)
    dying = (0, 1) if leave.startswith("all") else (1,)
    again = (4, leave, "mixed_loop", tmp_path)
    together(
        *(2, "recorded", FUSED, tmp_path / "left", *again),
        dying=dying,
        others_may=JAX,
    )
    assert together(2, "recorded", FUSED, tmp_path / "left", *last) == whole
