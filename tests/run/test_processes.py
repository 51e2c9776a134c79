"""One process writes a run, others read it, and a signal ends it in order."""

import json
import os
import platform
import shutil
import signal
import threading

import numpy as np
import pytest
from trainings import STEPS, At, During, remembering, train

from loopscope.errors import RunError
from loopscope.run import reading
from loopscope.run.folder import Folder
from loopscope.run.lock import Lock
from models import FUSED, STEP

EPOCHS = 6


# One writer.


@pytest.mark.once
def test_a_second_writer_is_refused_and_told_who_the_first_one_is(killed):
    assert len(killed.refusals) == 2
    for refusal in killed.refusals:
        assert refusal.startswith(f"The run '{killed.path}' is being written by ")
        assert f"process {killed.pid} on host {platform.node()!r} since 20" in refusal
        assert "give this training another folder" in refusal


@pytest.mark.once
def test_who_writes_is_seen_by_others_until_the_process_is_killed(killed):
    writers = {summary.writer["pid"] for summary, _ in killed.seen if summary.writer}
    assert writers == {killed.pid}
    assert Folder(killed.path).writer() is None
    assert reading.summary(Folder(killed.path)).status == "interrupted"


@pytest.mark.once
def test_a_run_is_read_while_it_is_written(killed):
    last = reading.steps(Folder(killed.path))
    for summary, steps in killed.seen:
        assert (summary.status, summary.problem) == ("running", "")
        size = len(steps["step"])
        assert all(
            np.array_equal(values, last[name][:size]) for name, values in steps.items()
        )
    seen = [len(steps["step"]) for _, steps in killed.seen]
    assert seen == sorted(seen)


@pytest.mark.once
def test_a_killed_run_goes_on_to_the_undisturbed_end(killed, tmp_path):
    path = shutil.copytree(killed.path, tmp_path / "run")
    options = {"epochs": killed.epochs, "validation": True, "more": remembering()}
    loop, history = train(path, resume=True, **options)
    undisturbed, whole = train(**options)
    assert loop.state.sha256() == undisturbed.state.sha256()
    assert history.history == whole.history


@pytest.mark.once
def test_a_lock_is_held_by_one_and_free_after_it(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.acquire()
    with pytest.raises(RunError, match=f"process {os.getpid()} on host"):
        second.acquire()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    first.release()
    second.acquire()
    second.release()
    second.release()


@pytest.mark.once
@pytest.mark.parametrize("text", ["", "\xff[1]"])
def test_a_lock_whose_text_is_damaged_still_holds(text, tmp_path):
    path = tmp_path / "lock"
    held = Lock(path)
    held.acquire()
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match="is being written by process None"):
        Lock(path).acquire()
    assert Folder(tmp_path).writer() == {}
    held.release()
    assert Folder(tmp_path).writer() is None


@pytest.mark.once
def test_asking_who_writes_keeps_no_writer_out(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    done = threading.Event()

    def ask():
        while not done.is_set():
            Folder(tmp_path).writer()

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(20):
            lock = Lock(path)
            lock.acquire()
            lock.release()
    finally:
        done.set()
        for thread in asking:
            thread.join()


# Signals.


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def undisturbed():
    made = {}

    def of(gear):
        if gear not in made:
            loop, history = train(gear=gear, epochs=EPOCHS, validation=True)
            made[gear] = loop.state.sha256(), history.history
        return made[gear]

    return of


@pytest.mark.parametrize(
    ("number", "gear", "phase"),
    [
        (signal.SIGTERM, FUSED, "train"),
        (signal.SIGINT, FUSED, "test"),
        (signal.SIGTERM, STEP, "test"),
        (signal.SIGINT, STEP, "train"),
    ],
)
def test_a_signal_saves_and_ends_and_the_run_goes_on_to_the_same_end(
    number, gear, phase, undisturbed, tmp_path, capsys
):
    path = tmp_path / "run"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    options = {"gear": gear, "epochs": EPOCHS, "validation": True, "every": 99}
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as left:
        train(path, listener=During(send(number), phase, 2), **options)
    if number == signal.SIGINT:
        said = str(left.value)
    else:
        assert left.value.code == 143
        said = capsys.readouterr().err
        assert said.startswith("loopscope: SIGTERM; ")
    assert f"the run '{path}' is saved before step " in said
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    # Not one step is run twice.
    summary = reading.summary(Folder(path))
    assert f"before step {summary.resumable_step}" in said
    assert summary.resumable_step == summary.steps
    assert 2 * STEPS < summary.steps <= 3 * STEPS
    loop, history = train(path, resume=True, **options)
    assert (loop.state.sha256(), history.history) == undisturbed(gear)
    kinds = [event["kind"] for event in _events(path)]
    assert kinds.count("signal") == kinds.count("resume") == 1
    assert kinds[-1] == "finished"


def test_a_signal_at_the_end_of_an_epoch_ends_after_it(undisturbed, tmp_path):
    path = tmp_path / "run"
    options = {"epochs": EPOCHS, "validation": True}
    with pytest.raises(SystemExit):
        train(path, acts={3: send(signal.SIGTERM)}, **options)
    assert reading.summary(Folder(path)).resumable_step == 4 * STEPS
    assert len(reading.epochs(Folder(path))) == 4
    loop, history = train(path, resume=True, **options)
    assert (loop.state.sha256(), history.history) == undisturbed(FUSED)


class Sends(At):
    """Sends this process a signal when training begins or ends, once."""

    def __init__(self, when, number):
        super().__init__(None)
        self._when, self._numbers = when, (number,)

    def _send(self, when):
        if when == self._when:
            numbers, self._numbers = self._numbers, ()
            for number in numbers:
                os.kill(os.getpid(), number)

    def on_train_begin(self, logs=None):
        self._send("begin")

    def on_train_end(self, logs=None):
        self._send("end")


def test_a_signal_when_training_is_over_leaves_a_finished_run(undisturbed, tmp_path):
    path = tmp_path / "run"
    options = {"epochs": EPOCHS, "validation": True}
    with pytest.raises(KeyboardInterrupt):
        train(path, more=[Sends("end", signal.SIGINT)], **options)
    assert reading.summary(Folder(path)).status == "finished"
    more = [Sends("never", signal.SIGINT)]
    loop, history = train(path, resume=True, more=more, **options)
    assert (loop.state.sha256(), history.history) == undisturbed(FUSED)


def test_a_signal_while_a_finished_run_is_gone_on_with_is_not_lost(tmp_path):
    path = tmp_path / "run"
    train(path, epochs=2, more=[Sends("never", signal.SIGTERM)])
    before = reading.summary(Folder(path))
    with pytest.raises(SystemExit) as left:
        train(path, epochs=2, resume=True, more=[Sends("begin", signal.SIGTERM)])
    assert left.value.code == 143
    assert reading.summary(Folder(path)) == before


@pytest.mark.parametrize(
    ("number", "code", "gear", "phase"),
    [
        (signal.SIGTERM, 143, FUSED, "train"),
        pytest.param(signal.SIGTERM, 143, STEP, "test", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, STEP, "train", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, FUSED, "test", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, -2, FUSED, "train", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, -2, STEP, "train", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, -2, STEP, "test", marks=pytest.mark.slow),
    ],
)
def test_another_process_goes_on_where_a_signal_ended_one(
    number, code, gear, phase, elsewhere, tmp_path
):
    path = tmp_path / "run"
    with elsewhere(path, gear, phase, EPOCHS, 2) as process:
        assert process.stdout.readline() == "began\n"
        assert process.stdout.readline() == "held\n"
        process.send_signal(number)
        _, said = process.communicate("\n", timeout=120)
    assert process.returncode == code, said
    assert f"the run {str(path)!r} is saved before step " in said
    options = {"epochs": EPOCHS, "validation": True, "more": remembering()}
    loop, history = train(path, gear=gear, resume=True, **options)
    whole, undisturbed = train(gear=gear, **options)
    assert loop.state.sha256() == whole.state.sha256()
    assert history.history == undisturbed.history


def _events(path):
    with reading.journal(Folder(path)) as journal:
        return journal.events()
