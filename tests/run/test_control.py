"""A live training is steered through its folder, and no bit is changed by that."""

import json
import os
import signal
import subprocess
import threading

import keras
import numpy as np
import pytest
from trainings import STEPS, train

from loopscope import open_run
from loopscope.run import control, live, steering
from loopscope.run.control import Control, ask
from loopscope.run.folder import Folder
from models import FUSED
from page_server import LOOPSCOPE, environment, serving, until

EPOCHS = 6


class Asks(keras.callbacks.Callback):
    """Asks for something at the end of a batch or an epoch, by its number."""

    def __init__(self, folder, *, batches=None, epochs=None):
        super().__init__()
        self._folder = Folder(folder)
        self._batches, self._epochs = batches or {}, epochs or {}
        self._seen = 0

    def on_train_batch_end(self, batch, logs=None):
        self._ask(self._batches.get(self._seen))
        self._seen += 1

    def on_epoch_end(self, epoch, logs=None):
        self._ask(self._epochs.get(epoch))

    def _ask(self, action):
        if action is not None:
            ask(self._folder, action)


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch):
    """These trainings last for milliseconds: ten looks a second are too few."""
    monkeypatch.setattr(control, "LOOK_S", 0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    loop, _ = train(path, epochs=EPOCHS, validation=True)
    return loop.state.sha256(), open_run(path)


class Somebody(threading.Thread):
    """Does something about a run as soon as it waits, once for each thing to do."""

    def __init__(self, path, *does):
        super().__init__()
        self._folder, self._does, self.seen = Folder(path), does, []
        self.start()

    def run(self):
        for act in self._does:
            step = self.seen[-1] if self.seen else -1
            said = until(lambda: live.read(self._folder) or {}, self._waits_after(step))
            self.seen.append(said["step"])
            act()

    def _waits_after(self, step):
        return lambda said: said.get("paused") and said["step"] > step


@pytest.fixture
def somebody():
    threads = []

    def start(path, *does):
        threads.append(Somebody(path, *does))
        return threads[-1]

    yield start
    for thread in threads:
        thread.join()


def asks(path, action):
    return lambda: ask(Folder(path), action)


def controls(path):
    return [e for e in open_run(path).events if e["kind"] == "control"]


@pytest.mark.once
def test_a_training_that_was_paused_and_stepped_has_the_bits_of_an_undisturbed_one(
    undisturbed, somebody, tmp_path
):
    state, whole = undisturbed
    path = tmp_path / "run"
    actions = ["step", "step", "resume"]
    watcher = somebody(path, *(asks(path, action) for action in actions))
    loop, _ = train(
        path,
        epochs=EPOCHS,
        validation=True,
        more=[Asks(path, epochs={1: "pause"})],
    )
    watcher.join()
    # It waits at the end of the chunk that comes next; then it goes step by step.
    first = watcher.seen[0]
    assert first >= 2 * STEPS
    assert watcher.seen == [first, first + 1, first + 2]
    assert loop.state.sha256() == state
    steps = open_run(path).steps
    assert all(np.array_equal(steps[name], whole.steps[name]) for name in whole.steps)
    assert [e["action"] for e in controls(path)] == ["pause", *actions]
    assert [e["step"] for e in controls(path)] == [first, first, first + 1, first + 2]
    assert all(e["done"] and not e["why"] for e in controls(path))
    assert not Folder(path).control_path.exists()


@pytest.mark.once
def test_a_training_can_wait_and_save_within_its_validation(
    undisturbed, somebody, tmp_path
):
    path = tmp_path / "run"
    asked = []

    class InValidation(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            if not asked:
                ask(Folder(path), "pause")
                asked.append(batch)

    def save_and_go_on():
        ask(Folder(path), "save")
        until(lambda: [e["action"] for e in controls(path)], lambda a: "save" in a)
        ask(Folder(path), "resume")

    watcher = somebody(path, save_and_go_on)
    loop, _ = train(
        path, epochs=EPOCHS, every=10**6, validation=True, more=[InValidation()]
    )
    watcher.join()
    assert (watcher.seen, asked) == ([STEPS], [0])
    assert loop.state.sha256() == undisturbed[0]
    assert (path / "checkpoints" / f"{STEPS:012}-0.json").exists()


@pytest.mark.once
def test_a_training_that_was_stopped_ends_with_its_epoch_and_can_be_gone_on_with(
    undisturbed, tmp_path
):
    path = tmp_path / "run"
    more = [Asks(path, epochs={1: "stop"})]
    loop, history = train(path, epochs=EPOCHS, validation=True, more=more)
    assert loop.step == 3 * STEPS
    assert len(history.history["val_loss"]) == 3
    assert open_run(path).events[-1]["kind"] == "finished"
    more = [Asks(path)]
    loop, history = train(path, epochs=EPOCHS, validation=True, more=more, resume=True)
    assert loop.step == EPOCHS * STEPS
    assert len(history.history["loss"]) == EPOCHS
    assert loop.state.sha256() == undisturbed[0]


@pytest.mark.once
def test_a_checkpoint_is_made_when_it_is_asked_for(somebody, tmp_path):
    path = tmp_path / "run"
    more = [Asks(path, batches={STEPS + 2: "save"})]
    train(path, epochs=3, every=10**6, more=more)
    (found,) = controls(path)
    names = [p.name for p in (path / "checkpoints").glob("*.json")]
    assert f"{found['step']:012}-0.json" in names
    assert STEPS < found["step"] < 2 * STEPS


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_that_waits_and_it_is_saved(
    number, undisturbed, somebody, tmp_path
):
    path = tmp_path / "run"
    watcher = somebody(path, lambda: os.kill(os.getpid(), number))
    more = [Asks(path, epochs={0: "pause"})]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        train(path, epochs=EPOCHS, validation=True, more=more)
    watcher.join()
    assert open_run(path).events[-1]["kind"] == "signal"
    assert open_run(path).summary.resumable_step == watcher.seen[0]
    loop, _ = train(
        path, epochs=EPOCHS, validation=True, more=[Asks(path)], resume=True
    )
    assert loop.state.sha256() == undisturbed[0]


@pytest.mark.once
def test_what_was_asked_of_an_earlier_training_is_not_obeyed(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    ask(Folder(path), "pause")
    loop, _ = train(path, epochs=2)
    assert loop.step == 2 * STEPS
    assert controls(path) == []


@pytest.mark.once
def test_what_a_training_does_is_said_while_it_runs(tmp_path):
    path, said = tmp_path / "run", []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: said.append(live.read(Folder(path)))
    )
    train(path, epochs=2, validation=True, more=[look])
    last = live.read(Folder(path))
    assert set(last["seconds"]) == set(live.ROLES)
    assert all(last["seconds"][role] > 0 for role in ("step", "validation"))
    assert (last["step"], last["phase"], last["role"]) == (2 * STEPS, None, None)
    assert (last["epochs"], last["steps_per_epoch"]) == (2, STEPS)
    assert last["gear"] == FUSED
    recorded = open_run(path).steps["loss"]
    assert last["loss"] == {"name": "loss", "value": recorded[-1]}


@pytest.mark.once
@pytest.mark.parametrize(
    ("outputs", "latest"),
    [
        ({}, None),
        ({"a": [1.0, 2.0], "loss": [3.0, 4.5]}, {"name": "loss", "value": 4.5}),
        ({"cost": [1.0, float("nan")]}, {"name": "cost", "value": "nan"}),
        ({"rows": [[1.0], [2.0]]}, None),
    ],
)
def test_the_latest_loss_is_that_of_the_last_step(outputs, latest):
    arrays = {name: np.array(values) for name, values in outputs.items()}
    assert steering._latest(arrays) == latest


# The file.


@pytest.mark.once
def test_lines_of_many_who_ask_at_once_are_all_there(tmp_path):
    folder, times = Folder(tmp_path), 50
    asking = [
        threading.Thread(target=lambda: [ask(folder, "save") for _ in range(times)])
        for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    lines = folder.control_path.read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["save"] * 4 * times


@pytest.mark.once
@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "[1]", '{"action": ["pause"]}', '{"action": 3}', "[" * 9999],
)
def test_lines_that_ask_for_nothing_are_passed_over(line, tmp_path):
    folder = Folder(tmp_path)
    steered = Control(folder, workers=1)
    steered.begin()
    folder.control_path.write_text(line + "\n")
    assert steered.look() == []
    ask(folder, "pause")
    assert control.waiting(folder, steered.obeyed_bytes) == "pause"
    assert [taken["action"] for taken in steered.look()] == ["pause"]
    assert control.waiting(folder, steered.obeyed_bytes) is None
    assert steered.paused


@pytest.mark.once
def test_half_a_line_waits_for_its_other_half(tmp_path):
    folder = Folder(tmp_path)
    steered = Control(folder, workers=1)
    folder.control_path.write_text('{"action": "pa')
    assert steered.look() == []
    with folder.control_path.open("a") as file:
        file.write('use"}\n')
    assert [taken["action"] for taken in steered.look()] == ["pause"]


@pytest.mark.once
def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "control.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic"):
        ask(Folder(tmp_path / "run"), "pause")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.once
def test_of_several_workers_none_waits_but_they_can_save_and_stop(tmp_path):
    folder = Folder(tmp_path)
    steered = Control(folder, workers=4)
    for action in control.ACTIONS:
        ask(folder, action)
    taken = {said["action"]: said for said in steered.look()}
    assert not steered.paused
    assert not steered.stepping
    assert "4 processes train this run together" in taken["pause"]["why"]
    assert [a for a, said in taken.items() if not said["done"]] == ["pause", "step"]
    assert steered.saving
    assert steered.stopping


# In a process of its own, through the page.


@pytest.mark.once
def test_the_page_steers_a_live_training_in_another_process(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    arguments = ["train", "mnist", "--gear", FUSED, "--epochs", "500"]
    with (
        serving(path) as page,
        subprocess.Popen(
            [*LOOPSCOPE, *arguments, "--run", str(path)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as training,
    ):
        try:
            _steer(page)
            output, _ = training.communicate(timeout=120)
        finally:
            training.kill()
    assert training.returncode == 0, output
    assert page.said["folder"] == str(path)


def _steer(page):
    def ready():
        answer = page.client.get("/api/status", params={"run": "."})
        return answer.json() if answer.status_code == 200 else {}

    # A run that has just begun has no journal yet.
    status = until(ready, lambda s: s.get("live") and s["step"] > 0)
    assert status["status"] == "running"
    assert status["steps_per_epoch"] == 782

    def after(action, arrived):
        assert page.post("control", run=".", action=action).json() == {"asked": action}
        seen = page.until(lambda s: arrived(s) and action in done(s))
        return seen["step"]

    waiting = after("pause", lambda s: s["live"]["paused"])
    status = page.get("status", run=".")
    assert status["step"] == waiting
    curve = until(
        lambda: page.get("curve", run=".", start=waiting - 1),
        lambda found: found["stop"] == waiting,
    )
    assert status["live"]["loss"] == {"name": "loss", "value": curve["mean"][-1]}
    assert after("step", lambda s: s["live"]["paused"] and s["step"] > waiting) == (
        waiting + 1
    )
    after("save", lambda s: True)
    kept = until(
        lambda: page.get("checkpoints", run=".")["checkpoints"],
        lambda found: found[-1]["step"] == waiting + 1,
    )
    assert kept[-1]["kept"]
    after("resume", lambda s: s["step"] > waiting + 1)
    assert page.post("control", run=".", action="stop").status_code == 200
    ended = page.until(lambda s: s["status"] != "running")
    assert ended["status"] == "finished"
    assert ended["live"] is None
    assert ended["step"] % 782 == 0
    assert page.post("control", run=".", action="pause").status_code == 409


def done(status):
    found = [e["data"] for e in status["events"] if e["kind"] == "control"]
    return [data["action"] for data in found if data["done"]]
