"""Keras's callbacks, and those of other packages, beside Keras's own `fit`."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import callbacks, layers

from loopscope import Loop
from loopscope.events import ChunkEnd
from models import FUSED, STEP, TENSORFLOW, blobs, fresh, small_loop
from parity import assert_alike, assert_same, both

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

ROWS, SIZE = 40, 8
X, Y = blobs(ROWS)
OPTIONS = {"epochs": 4, "batch_size": SIZE, "shuffle": False}


def model(rate=0.5, **options):
    made = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    made.compile(
        keras.optimizers.SGD(rate, **options),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return made


def averaged():
    return model(use_ema=True, ema_momentum=0.5)


def wild():
    return model(rate=1e30)


class Drops(callbacks.Callback):
    """Changes what it can, at every hook."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / (epoch + 1)

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            self.model.layers[0].bias.assign(np.full(8, 0.25))

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            self.model.optimizer.learning_rate = 0.01

    def on_epoch_end(self, epoch, logs=None):
        weights = self.model.get_weights()
        self.model.set_weights([0.9 * w for w in weights])
        logs["mean"] = float(np.mean(weights[0]))


class Stops(callbacks.Callback):
    def __init__(self, hook, at):
        super().__init__()
        setattr(self, hook, self._stop)
        self.at = at

    def _stop(self, position=None, logs=None):
        if position == self.at or self.at is None:
            self.model.stop_training = True


CASES = {
    "EarlyStopping": (
        model,
        lambda f: [callbacks.EarlyStopping("val_loss", patience=0, min_delta=1)],
    ),
    "EarlyStopping, restoring the best": (
        lambda: model(rate=20.0),
        lambda f: [
            callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
        ],
    ),
    "ReduceLROnPlateau": (
        model,
        lambda f: [
            callbacks.ReduceLROnPlateau("val_loss", 0.5, patience=0, min_delta=1.0)
        ],
    ),
    "LearningRateScheduler": (
        model,
        lambda f: [callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)],
    ),
    "ModelCheckpoint, each epoch": (
        model,
        lambda f: [callbacks.ModelCheckpoint(f / "{epoch}-{val_loss:.4f}.keras")],
    ),
    "ModelCheckpoint, the best": (
        lambda: model(rate=20.0),
        lambda f: [
            callbacks.ModelCheckpoint(
                f / "{epoch}.weights.h5", save_best_only=True, save_weights_only=True
            )
        ],
    ),
    "ModelCheckpoint, every 3 batches": (
        model,
        lambda f: [
            callbacks.ModelCheckpoint(
                f / "{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=3
            )
        ],
    ),
    "ModelCheckpoint, every 7 batches": (
        model,
        lambda f: [
            callbacks.ModelCheckpoint(
                f / "{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=7
            )
        ],
    ),
    "BackupAndRestore": (
        model,
        lambda f: [
            callbacks.BackupAndRestore(f / "b", delete_checkpoint=False),
        ],
    ),
    "BackupAndRestore, every 3 batches": (
        model,
        lambda f: [
            callbacks.BackupAndRestore(f / "b", save_freq=3, delete_checkpoint=False),
        ],
    ),
    "CSVLogger": (model, lambda f: [callbacks.CSVLogger(f / "log.csv")]),
    "TensorBoard": (
        model,
        lambda f: [
            callbacks.TensorBoard(f, histogram_freq=1, write_steps_per_second=True)
        ],
    ),
    "TensorBoard, each batch": (
        model,
        lambda f: [callbacks.TensorBoard(f, update_freq=2, write_images=True)],
    ),
    "TensorBoard, profiling": (
        model,
        lambda f: [callbacks.TensorBoard(f, profile_batch=(2, 3))],
    ),
    "TerminateOnNaN": (wild, lambda f: [callbacks.TerminateOnNaN()]),
    "TerminateOnNaN, raising": (
        wild,
        lambda f: [callbacks.TerminateOnNaN(raise_error=True)],
    ),
    "SwapEMAWeights": (averaged, lambda f: [callbacks.SwapEMAWeights()]),
    "SwapEMAWeights, each epoch": (
        averaged,
        lambda f: [callbacks.SwapEMAWeights(swap_on_epoch=True)],
    ),
    "LambdaCallback": (
        model,
        lambda f: [
            callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: (f / str(batch)).write_text(
                    f"{logs['loss']:.4f}"
                )
            )
        ],
    ),
    "ProgbarLogger": (model, lambda f: [callbacks.ProgbarLogger()]),
    "History": (model, lambda f: [callbacks.History()]),
    "one that changes everything": (model, lambda f: [Drops()]),
    "one that stops before training": (
        model,
        lambda f: [Stops("on_train_begin", None)],
    ),
    "one that stops before an epoch": (model, lambda f: [Stops("on_epoch_begin", 1)]),
    "one that stops before a batch": (
        model,
        lambda f: [Stops("on_train_batch_begin", 2)],
    ),
    "one that stops after a batch": (model, lambda f: [Stops("on_train_batch_end", 2)]),
    "one that stops after an epoch": (model, lambda f: [Stops("on_epoch_end", 1)]),
    "one that stops in validation": (
        model,
        lambda f: [Stops("on_test_batch_end", 1)],
    ),
}
"""The model, and the callbacks made anew in a folder of their own."""


def written(folder):
    """The files below a folder, those with a time or a process in their names apart."""
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(
        str(n) for n in names if "tfevents" not in n.name and "plugins" not in n.parts
    )


def scalars(folder):
    """`{run: {tag: steps}}` of TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(Path(folder).rglob("*tfevents*")):
        events = EventAccumulator(str(path), size_guidance={"tensors": 0})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            steps = [event.step for event in events.Tensors(tag)]
            found.setdefault(path.parent.name, {}).setdefault(tag, []).extend(steps)
    return found


ALONE = {
    "EarlyStopping, restoring the best",
    "ModelCheckpoint, every 3 batches",
    "ModelCheckpoint, every 7 batches",
    "BackupAndRestore, every 3 batches",
    "TensorBoard, each batch",
    "one that changes everything",
    "one that stops after a batch",
}
"""Run in the quick suite also with nobody beside them who looks at each batch."""


def each_case():
    """In the quick suite each alone or recorded, half of the latter on each backend."""
    for i, name in enumerate(CASES):
        alone, here = name in ALONE, i % 2 == (0 if TENSORFLOW else 1)
        for record, quick in ((False, alone), (True, here and not alone)):
            yield pytest.param(
                name,
                record,
                id=f"{name}-{'recorded' if record else 'alone'}",
                marks=() if quick else pytest.mark.slow,
            )


@pytest.mark.parametrize(("name", "record"), list(each_case()))
def test_a_training_with_a_callback_is_that_of_keras(name, record, tmp_path, capsys):
    if (
        name == "TensorBoard, profiling"
        and not TENSORFLOW
        and sys.version_info < (3, 12)
    ):
        pytest.skip("Keras profiles JAX from Python 3.12 on")
    build, make = CASES[name]
    folders = iter([tmp_path / "theirs", tmp_path / "ours"])

    def call(_):
        folder = next(folders)
        folder.mkdir()
        return (X, Y), {
            **OPTIONS,
            "validation_data": (X[:16], Y[:16]),
            "callbacks": make(folder),
        }

    # With a recorder every batch is told; alone, only what the callback asks for.
    theirs, ours = both(build, call, record=record, gear=STEP if record else FUSED)
    tolerance = 1e-6 if record else 1e-5
    if name == "TerminateOnNaN, raising":
        assert type(ours.error) is type(theirs.error) is RuntimeError
        assert str(ours.error) == str(theirs.error)
    elif name == "TerminateOnNaN":
        assert ours.value.epoch == theirs.value.epoch == [0]
        iterations = [int(side.model.optimizer.iterations) for side in (ours, theirs)]
        assert iterations[0] == iterations[1] < 4
    else:
        assert_alike(theirs, ours, tolerance=tolerance)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    if "TensorBoard" in name:
        assert scalars(tmp_path / "ours") == scalars(tmp_path / "theirs") != {}
    if name == "CSVLogger":
        read = [
            (tmp_path / s / "log.csv").read_text().split() for s in ("ours", "theirs")
        ]
        assert len(read[0]) == len(read[1]) == 5
        assert read[0][0] == read[1][0]


def test_a_backup_is_restored_and_training_goes_on(tmp_path):
    folders = iter([tmp_path / "theirs", tmp_path / "ours"])

    class Fails(callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2 and self.model.fails:
                raise OSError("preempted")

    def build():
        made = model()
        object.__setattr__(made, "fails", True)
        return made

    def call(made):
        backup = callbacks.BackupAndRestore(next(folders))
        try:
            made.fit(X, Y, **OPTIONS, verbose=0, callbacks=[backup, Fails()])
        except OSError:
            object.__setattr__(made, "fails", False)
        return (X, Y), {**OPTIONS, "callbacks": [backup]}

    theirs, ours = both(build, call)
    assert ours.value.epoch == [2, 3]
    assert_alike(theirs, ours)


def test_a_remote_monitor_sends_what_it_sends_from_keras():
    got = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            got.append(json.loads(self.rfile.read(size)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"

        def call(_):
            monitor = callbacks.RemoteMonitor(root, send_as_json=True)
            return (X, Y), {**OPTIONS, "callbacks": [monitor]}

        assert_alike(*both(model, call))
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    assert len(got) == 8
    assert_same(got[4:], got[:4], 1e-6)


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_train_batch_end", "on_test_end"])
def test_an_exception_of_a_callback_comes_out_as_it_is(hook):
    class Broken(callbacks.Callback):
        pass

    def fail(self, *args, **kwargs):
        raise ZeroDivisionError("broken on purpose")

    setattr(Broken, hook, fail)

    def call(_):
        return (X, Y), {
            **OPTIONS,
            "callbacks": [Broken()],
            "validation_data": (X, Y),
        }

    theirs, ours = both(model, call, record=False)
    assert type(ours.error) is type(theirs.error) is ZeroDivisionError
    assert str(ours.error) == str(theirs.error)
    assert ours.error.__notes__[0].startswith("loopscope: raised")


def test_callbacks_may_come_alone_in_a_list_and_as_a_callback_list():
    for wrap in (
        lambda c: c,
        lambda c: [c],
        lambda c: [[c], []],
        lambda c: callbacks.CallbackList([c], add_history=True, epochs=4, steps=5),
    ):
        loop, told = fresh(small_loop, FUSED), []
        callback = callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, told=told: told.append(epoch),
            on_train_batch_end=lambda batch, logs, told=told: told.append("batch"),
        )
        wrapped = wrap(callback)
        if isinstance(wrapped, callbacks.CallbackList):
            wrapped.set_model(loop.model)
        history = loop.fit(X, Y, **OPTIONS, verbose=0, callbacks=wrapped)
        assert told == [t for epoch in range(4) for t in (*["batch"] * 5, epoch)]
        assert history.epoch == [0, 1, 2, 3]


def test_a_callback_can_be_used_again():
    def call(made):
        stopping = callbacks.EarlyStopping("loss", patience=1, min_delta=1.0)
        made.fit(X, Y, **OPTIONS, verbose=0, callbacks=[stopping])
        return (X, Y), {**OPTIONS, "callbacks": [stopping]}

    assert_alike(*both(model, call))


def test_weights_optimizer_and_counters_are_current_at_every_hook_in_a_fused_gear():
    loop, seen = fresh(small_loop, FUSED), []

    class Looks(callbacks.Callback):
        def _look(self, *args, **kwargs):
            kernel = keras.ops.convert_to_numpy(self.model.layers[0].kernel)
            seen.append((int(self.model.optimizer.iterations), kernel.copy()))

        on_train_batch_begin = on_train_batch_end = on_epoch_end = _look

    loop.fit(X, Y, batch_size=SIZE, epochs=1, verbose=0, callbacks=[Looks()])
    counts = [count for count, _ in seen]
    assert counts == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for (count, was), (later, now) in pairwise(seen):
        assert np.array_equal(was, now) == (count == later)


def test_what_stops_evaluate_and_predict_is_obeyed():
    for method, flag in (
        ("evaluate", "stop_evaluating"),
        ("predict", "stop_predicting"),
    ):
        told = []
        loop = fresh(small_loop, FUSED)
        hook = f"on_{'test' if method == 'evaluate' else 'predict'}_batch_end"

        def stop(batch, logs=None, flag=flag, loop=loop, told=told):
            told.append(batch)
            setattr(loop.model, flag, batch == 1)

        callback = callbacks.LambdaCallback(**{hook: stop})
        data = (X, Y) if method == "evaluate" else (X,)
        got = getattr(loop, method)(
            *data, batch_size=SIZE, verbose=0, callbacks=[callback]
        )
        assert told == [0, 1]
        if method == "predict":
            assert len(got) == 2 * SIZE


def test_callbacks_of_a_training_do_not_hear_what_a_callback_evaluates_and_predicts(
    capsys,
):
    class Hears(callbacks.Callback):
        """Told of every hook; asks the model or the loop at the end of each epoch."""

        def __init__(self, ask):
            super().__init__()
            self.ask, self.told = ask, []

        def __getattribute__(self, name):
            if name.startswith("on_") and name != "on_epoch_end":
                self.told.append(name)
            return super().__getattribute__(name)

        def on_epoch_end(self, epoch, logs=None):
            self.told.append(f"epoch {epoch}")
            self.ask.predict(X, verbose=0)
            self.ask.evaluate(X, Y, verbose=0)
            self.told.append("asked")

    def told(fit, ask):
        hears = Hears(ask)
        fit(
            X,
            Y,
            **{**OPTIONS, "epochs": 1},
            validation_data=(X, Y),
            verbose=2,
            callbacks=[hears],
        )
        begun = hears.told.index("epoch 0")
        lines = capsys.readouterr().out.splitlines()
        return [n for n in hears.told[begun:] if "batch" not in n], len(lines)

    loop, plain = Loop(model()), model()
    assert told(loop.fit, loop) == told(plain.fit, plain)


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_lines_of_the_bar_are_those_of_keras(verbose, capsys):
    def lines():
        shown = capsys.readouterr().out.replace("\x08", "").replace("\r", "\n")
        words = [line.split(" - ", 1) for line in shown.splitlines() if line.strip()]
        # Times differ; the last state of each line is what stays on the terminal.
        return [w[0].split(" ")[0] for w in words], shown

    def call(_):
        return (X, Y), {**OPTIONS, "verbose": verbose, "validation_data": (X, Y)}

    keras.utils.set_random_seed(0)
    made = model()
    args, options = call(made)
    made.fit(*args, **options)
    theirs, shown = lines()
    Loop(model(), gear=FUSED).fit(*args, **options)
    ours, mine = lines()
    for word in ("Epoch 4/4", "5/5", "val_loss", "val_accuracy", "accuracy", "step"):
        assert (word in mine) == (word in shown)
    assert ours[0] == theirs[0] == "Epoch"
    assert mine.count("Epoch") == shown.count("Epoch") == 4


def test_the_first_step_of_an_epoch_goes_alone_so_that_the_eta_leaves_compiling_out():
    loop, sizes = fresh(small_loop, FUSED), []

    def hear(event):
        if isinstance(event, ChunkEnd) and event.phase == "train":
            sizes.append(event.steps)

    loop.subscribe(hear)
    loop.fit(np.tile(X, (9, 1)), np.tile(Y, 9), batch_size=8, epochs=2, verbose=1)
    assert sizes[0] == 1
    assert sum(sizes) == 2 * 45
    assert len(sizes) < 12


# Callbacks of other packages.


def test_the_callback_of_mlflow_logs_what_it_logs_from_keras(tmp_path, monkeypatch):
    import mlflow
    from mlflow.keras import MlflowCallback

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}")
    mlflow.set_experiment("parity")
    runs = []

    def call(_):
        while mlflow.active_run():
            mlflow.end_run()
        runs.append(mlflow.start_run().info.run_id)
        return (X, Y), {**OPTIONS, "callbacks": [MlflowCallback()]}

    try:
        assert_alike(*both(model, call))
        mlflow.flush_async_logging()
    finally:
        mlflow.end_run()
    client = mlflow.MlflowClient()
    theirs, ours = (client.get_run(run).data for run in runs)
    assert set(ours.metrics) == set(theirs.metrics) >= {"loss", "accuracy"}
    for name in theirs.metrics:
        history = [client.get_metric_history(run, name) for run in runs]
        assert [m.step for m in history[0]] == [m.step for m in history[1]]
        np.testing.assert_allclose(
            [m.value for m in history[1]], [m.value for m in history[0]], rtol=1e-5
        )


def test_the_callback_of_weights_and_biases_logs_what_it_logs_from_keras(
    tmp_path, monkeypatch
):
    import wandb
    from wandb.integration.keras import WandbMetricsLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []

    def call(_):
        run = wandb.init(dir=tmp_path, project="parity", reinit="finish_previous")
        log, here = run.log, []
        logged.append(here)

        def noted(data, *args, **kwargs):
            here.append(dict(data))
            return log(data, *args, **kwargs)

        monkeypatch.setattr(run, "log", noted)
        monkeypatch.setattr(wandb, "log", noted)
        return (X, Y), {**OPTIONS, "callbacks": [WandbMetricsLogger(log_freq="batch")]}

    try:
        assert_alike(*both(model, call))
    finally:
        wandb.finish()
    theirs, ours = logged
    assert len(ours) == len(theirs) > 20
    assert_same(ours, theirs, 1e-5)
