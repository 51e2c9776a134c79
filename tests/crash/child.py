"""A training to be killed: `python child.py FOLDER CASE [--aim POINT:N]`.

It trains one case of `CASES`, recorded into FOLDER/run, going on where the process
before it was ended, and leaves what it ended in as FOLDER/result.json. It says on a
line of its own when `fit` is called, when training begins, when all is compiled and
training goes, and when it is over.

With `--aim` it kills itself when it passes a point for the N-th time. The points lie
around and inside of everything that changes a run folder.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPLAY_STEPS = 20
DISK_BYTES = 160_000
"""About twelve checkpoints: older ones are let go all the time."""

BATCH = 8
EPOCHS = 40
PATIENCE = 14
PAUSE_S = 0.03
"""How long each epoch begins: on its own, a model this small is done in no time."""


@dataclass(frozen=True)
class Case:
    """One way of training.

    Attributes:
        backend: Of Keras.
        gear: Of the loop.
        stream: Whether the data are a `tf.data.Dataset`, not arrays.
        hooked: Whether a callback is called at every batch.
        examples: To train on.
    """

    backend: str
    gear: str
    stream: bool = False
    hooked: bool = False
    examples: int = 26 * BATCH


CASES = {
    "tf-graph": Case("tensorflow", "graph", hooked=True, examples=26 * BATCH - 5),
    "tf-fused": Case("tensorflow", "fused-graph"),
    "tf-stream": Case("tensorflow", "fused-graph", stream=True),
    "tf-xla": Case("tensorflow", "fused-xla"),
    "jax-xla": Case("jax", "xla", hooked=True),
    "jax-fused": Case("jax", "fused-xla"),
    "jax-stream": Case("jax", "fused-xla", stream=True),
}

POINTS = (
    "fsync-before",
    "fsync-after",
    "replace-before",
    "replace-after",
    "unlink-before",
    "unlink-after",
    "half-written",
    "commit-before",
    "commit-after",
    "half-removed",
    "cut-before",
    "cut-after",
    "checkpoints-cut",
    "log-shortened",
    "close-before",
    "close-after",
)


class Aim:
    """Counts how often this process passes each point, and dies at one of them.

    Args:
        point: Where; `None` for nowhere.
        number: At which passage.
    """

    def __init__(self, point, number):
        self.passed = Counter(dict.fromkeys(POINTS, 0))
        self._point, self._number = point, number

    def reached(self, point):
        self.passed[point] += 1
        return (point, self.passed[point]) == (self._point, self._number)

    def die_at(self, point):
        if self.reached(point):
            die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def lay(aim):
    """Lay the points of an aim into what writes run folders."""
    from loopscope.run import checkpoint, files
    from loopscope.run.journal import JournalWriter

    def around(owner, name, before, after=""):
        real = getattr(owner, name)

        def passed(*args, **kwargs):
            aim.die_at(before)
            result = real(*args, **kwargs)
            if after:
                aim.die_at(after)
            return result

        setattr(owner, name, passed)

    # pathlib calls these two by their names in `os`.
    around(os, "replace", "replace-before", "replace-after")
    around(os, "unlink", "unlink-before", "unlink-after")
    around(os, "fsync", "fsync-before", "fsync-after")
    around(JournalWriter, "cut", "cut-before", "cut-after")
    around(JournalWriter, "close", "close-before", "close-after")
    around(checkpoint, "cut", "checkpoints-cut")
    _lay_into_the_middle(aim, checkpoint, files, JournalWriter)


def _lay_into_the_middle(aim, checkpoint, files, journal):
    write, transaction, remove = files.write, journal.transaction, checkpoint.remove
    write_bytes, os_truncate = Path.write_bytes, os.truncate

    def write_half(path, data):
        if aim.reached("half-written"):
            temporary = path.with_name(path.name + files.TEMPORARY)
            temporary.write_bytes(data[: len(data) // 2])
            die()
        write(path, data)

    # A resume shortens a log that has grown past its checkpoint.
    def write_nothing(path, data):
        if path.suffix == ".csv" and aim.reached("log-shortened"):
            path.open("wb").close()
            die()
        return write_bytes(path, data)

    def truncate(path, size):
        os_truncate(path, size)
        if str(path).endswith(".csv"):
            aim.die_at("log-shortened")

    def remove_half(folder, name):
        if aim.reached("half-removed"):
            (folder / f"{name}.json").unlink()
            die()
        remove(folder, name)

    @contextlib.contextmanager
    def commit(self, **kwargs):
        with transaction(self, **kwargs):
            yield
            aim.die_at("commit-before")
        aim.die_at("commit-after")

    files.write, checkpoint.remove = write_half, remove_half
    Path.write_bytes, os.truncate = write_nothing, truncate
    journal.transaction = commit


def train(folder, case, say, *, grown=False):
    """Train a case to its end, from wherever it stands.

    Args:
        folder: For all that it writes.
        case: One of `CASES`.
        say: Told how far it has come.
        grown: Whether its log has been written to since the last checkpoint.
    """
    import keras

    import loopscope

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(24, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(0.01)
    loop = loopscope.Loop(model, optimizer, loss, ["accuracy"], gear=case.gear)
    log = folder / "log.csv"
    x, y = _examples(case.examples, seed=2)
    data = {"x": x, "y": y, "batch_size": BATCH}
    if case.stream:
        data = {"x": _stream(x, y)}
    if grown:
        _grow(log, folder / "run")
    say("fit")
    history = loop.fit(
        **data,
        validation_data=_examples(64, seed=3),
        epochs=EPOCHS,
        callbacks=_callbacks(case, log, say),
        verbose=0,
        run=loopscope.Recording(
            folder / "run", replay_steps=REPLAY_STEPS, disk_bytes=DISK_BYTES
        ),
        resume=True,
    )
    say("trained")
    return {
        "state_sha256": loop.state.sha256(),
        "history": history.history,
        "epochs": history.epoch,
        "csv": log.read_text(),
    }


def _grow(log, run):
    """Leave a log as a process does that is killed while it writes a line."""
    if log.exists() and not list(run.glob("checkpoints/*-end.json")):
        with log.open("a") as file:
            file.write("0,0.5,")


def _examples(count, *, seed):
    import numpy as np

    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 12)).astype("float32")
    # Half of the labels are noise: the loss on others gets worse after a while.
    noise = random.integers(0, 3, count)
    y = np.where(random.random(count) < 0.5, x[:, :3].argmax(1), noise)
    return x, y.astype("int32")


def _stream(x, y):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((x, y))
    return data.shuffle(64, seed=3).batch(BATCH)


def _callbacks(case, log, say):
    import keras

    # Not an attribute of the callback: a run would remember it.
    gone = []

    class Pace(keras.callbacks.Callback):
        """Says how far it has come, and takes its time."""

        def on_train_begin(self, logs=None):
            say("training")

        def on_epoch_begin(self, epoch, logs=None):
            time.sleep(PAUSE_S)

        def on_epoch_end(self, epoch, logs=None):
            if not gone:
                say("going")
                gone.append(epoch)

    class EveryBatch(keras.callbacks.Callback):
        """Makes every chunk one step."""

        def on_train_batch_end(self, batch, logs=None):
            pass

    return [
        Pace(),
        keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.8),
        keras.callbacks.CSVLogger(log),
        *([EveryBatch()] if case.hooked else []),
    ]


def _aim(word):
    point, _, number = word.partition(":")
    if point not in POINTS or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected POINT:N, one of {POINTS}")
    return point, int(number)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--aim", type=_aim, metavar="POINT:N", default=(None, 0))
    options = parser.parse_args()
    case = CASES[options.case]
    os.environ["KERAS_BACKEND"] = case.backend
    # What is started in the background of a shell ignores Ctrl-C otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Most of the time goes into starting: Keras imports these, and does without them.
    unneeded = ["matplotlib", "pandas", "sklearn"]
    unneeded += ["tensorflow"] if case.backend == "jax" and not case.stream else []
    sys.modules.update(dict.fromkeys(unneeded))
    aim = Aim(*options.aim)
    lay(aim)
    result = train(
        options.folder,
        case,
        lambda word: print(word, flush=True),
        grown=options.aim[0] == "log-shortened",
    )
    result["passed"] = aim.passed
    path = options.folder / "result.json"
    temporary = path.with_suffix(".unfinished")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)


if __name__ == "__main__":
    main()
