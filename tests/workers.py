"""One of several processes that train together; run in a process of its own.

`python workers.py RANK SIZE PORT WHAT [ARGUMENT ...]`: prints a line of JSON.
"""

import json
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

RANK, SIZE, PORT = (int(word) for word in sys.argv[1:4])
BACKEND = os.environ["KERAS_BACKEND"]
HEARTBEAT_S = 10
"""When JAX ends a process that has not heard of another one."""

if BACKEND == "tensorflow" and SIZE > 1:
    os.environ["TF_CONFIG"] = json.dumps(
        {
            "cluster": {"worker": [f"127.0.0.1:{PORT + i}" for i in range(SIZE)]},
            "task": {"type": "worker", "index": RANK},
        }
    )
if BACKEND == "torch" and SIZE > 1:
    os.environ |= {"RANK": str(RANK), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
if BACKEND == "jax":
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if SIZE > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{PORT}", SIZE, RANK, heartbeat_timeout_seconds=HEARTBEAT_S
        )

import keras  # noqa: E402
import numpy as np  # noqa: E402

import loopscope  # noqa: E402
import models  # noqa: E402
import sharding  # noqa: E402
from loopscope import Recording  # noqa: E402
from loopscope.errors import LoopscopeError  # noqa: E402
from models import BATCH, blobs, fresh, small_loop  # noqa: E402

STRATEGY, OWN = None, {}
if BACKEND == "tensorflow":
    import tensorflow as tf

    import replicas_cases as cases

    OWN = cases.OWN
    tf.get_logger().setLevel("ERROR")
    if SIZE > 1:
        STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()


def made(make, gear, **options):
    """The loop, for all workers."""

    def under(gear, **options):
        if BACKEND == "jax" and SIZE > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel())
        with STRATEGY.scope() if STRATEGY is not None else nullcontext():
            return make(gear, **options)

    return fresh(under, gear, **options)


def state_of(loop):
    return {path.replace("/", "|"): value for path, value in loop.state.numpy().items()}


def follows(folder, gear, *names):
    """Two steps, the second one of five rows, of each model; the state as a file."""
    found = {}
    for name in names:
        build = OWN.get(name) or getattr(models, name)
        make, data = build()
        rows = keras.tree.map_structure(
            lambda a: np.concatenate([a] * 2)[: BATCH + 5], data
        )
        loop = made(make, gear)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        history = loop.fit(*rows, **options).history
        np.savez(Path(folder, f"{name}-{SIZE}-{RANK}.npz"), **state_of(loop))
        found[name] = history
    return found


class Seen(keras.metrics.Metric):
    """How often each example was seen, over all workers."""

    def __init__(self, rows):
        super().__init__(name="seen")
        self.rows = rows
        self.counts = self.add_variable((rows,), "zeros", name="counts")

    def update_state(self, index):
        index = keras.ops.cast(keras.ops.reshape(index, (-1,)), "int32")
        self.counts.assign_add(
            keras.ops.sum(keras.ops.one_hot(index, self.rows), axis=0)
        )

    def result(self):
        return keras.ops.max(self.counts)


def counting(rows):
    """Makes a loop that counts how often each example was seen."""

    def make(gear):
        loop = small_loop(gear)
        model, seen = loop.model, Seen(rows)
        loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @loop.train_step
        def train_step(x, y):
            def compute_loss():
                return loss_fn(y, model(x["x"], training=True))

            loss, grads = loopscope.value_and_grad(
                compute_loss, model.trainable_variables
            )
            model.optimizer.apply(grads, model.trainable_variables)
            seen.update_state(x["index"])
            return loss

        loop.seen = seen
        return loop

    return make


def counted(gear):
    """How often each example of an epoch was seen by all workers together."""
    rows = 3 * BATCH + 5
    x, y = blobs(rows)
    given = {"x": x, "index": np.arange(rows, dtype="float32")}
    loop = made(counting(rows), gear)
    loop.fit(given, y, batch_size=BATCH, verbose=0)
    return loop.seen.counts.numpy().tolist()


def by_worker(gear, folder, *which):
    """Two epochs of data by worker, each kind of `sharding.KINDS`; counts and state."""
    found = {}
    for name in which:
        loop = made(counting(sharding.ROWS), gear)
        data = loopscope.Sharded(sharding.part(name, Path(folder), BATCH))
        validation = loopscope.Sharded(sharding.examples(folder, BATCH))
        history = loop.fit(data, epochs=2, validation_data=validation, verbose=0)
        np.savez(Path(folder, f"{name}-{SIZE}-{RANK}.npz"), **state_of(loop))
        found[name] = {
            "counts": loop.seen.counts.numpy().tolist(),
            "steps": loop.step,
            "history": history.history,
            "state": loop.state.sha256(),
        }
    return found


def refused(gear):
    """What is said of data by worker that no step could be run on."""
    x, y = blobs(2 * BATCH)
    parts = {
        "arrays": lambda index, count: (x, y),
        "shapes": lambda index, count: [(x[: 4 + index], y[: 4 + index])],
    }
    said = {}
    for name, part in parts.items():
        try:
            made(small_loop, gear).fit(loopscope.Sharded(part), verbose=0)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


class Slower(keras.callbacks.Callback):
    """Lowers the learning rate; knows on which worker it runs."""

    def __init__(self):
        super().__init__()
        self.called = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.called += 1

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / (epoch + 2)


def with_callbacks(gear):
    """Callbacks run on the chief, and what they decide holds on all workers."""
    loop, slower = made(small_loop, gear), Slower()
    stop = keras.callbacks.EarlyStopping(monitor="loss", patience=0, baseline=0.0)
    x, y = blobs(3 * BATCH + 5)
    history = loop.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=5,
        verbose=0,
        validation_data=blobs(13, seed=8),
        callbacks=[slower, stop],
    )
    return {
        "called": slower.called,
        "epochs": history.epoch,
        "history": history.history,
        "rate": float(loop.model.optimizer.learning_rate.numpy()),
        "evaluated": loop.evaluate(x, y, verbose=0),
        "predicted": float(np.sum(loop.predict(x, batch_size=5, verbose=0))),
        "state": loop.state.sha256(),
    }


def streamed(gear):
    """Batches from a generator, none of which comes at the same time."""
    x, y = blobs(7 * BATCH)

    def batches():
        for start in range(0, len(x), BATCH):
            time.sleep(0.05 * ((start // BATCH + RANK) % 3))
            yield x[start : start + BATCH], y[start : start + BATCH]

    loop = made(small_loop, gear)
    loop.fit(batches(), verbose=0)
    return {"steps": loop.step, "state": loop.state.sha256()}


def failing(gear):
    """What each worker is told where a callback of the chief raises."""

    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise ArithmeticError("no more")

    class Trains(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            loop.evaluate(x, y, verbose=0)

    x, y = blobs(2 * BATCH)
    said = []
    for callback in (Fails(), Trains()):
        loop = made(small_loop, gear)
        try:
            loop.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[callback])
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def differing(gear):
    """A worker that begins with other variables is told so."""
    loop = made(small_loop, gear)
    if RANK:
        first = loop.model.trainable_variables[0]
        first.assign(first + 1)
    x, y = blobs(2 * BATCH)
    try:
        loop.fit(x, y, batch_size=BATCH, verbose=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def recorded(gear, run, epochs="4", leave="", model="mixed_loop", files=""):
    """A run; `RANK:STEP` of `leave` is killed there, `all:STEP` are all of them.

    With `files`, of data by worker, read by Grain.
    """
    x, y = blobs(5 * BATCH + 5)
    loop = made(getattr(models, model), gear)
    given = {"x": x, "y": y, "batch_size": BATCH}
    if files:
        given = {"x": loopscope.Sharded(sharding.examples(Path(files), BATCH))}
    who, _, step = leave.partition(":")

    def listener(event):
        ended = type(event).__name__ == "ChunkEnd" and event.phase == "train"
        if ended and who in ("all", str(RANK)) and loop.step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    if who:
        loop.subscribe(listener, chunk_steps={"train": 1})
    arguments = {**given, "epochs": int(epochs), "verbose": 0}
    arguments["validation_data"] = blobs(13, seed=8)
    how = Recording(run, every_s=0.01, replay_steps=2)
    try:
        history = loop.fit(run=how, resume=True, **arguments)
    except LoopscopeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "step": loop.step,
        "state": loop.state.sha256(),
        "loss": history.history["loss"][-1],
    }


def quick(gear, folder):
    """What the quick suite asks, in one process."""
    return {
        "follows": follows(folder, gear, "subclassed", *({"with_tape"} & set(OWN))),
        "counted": counted(gear),
        "with_callbacks": with_callbacks(gear),
        "streamed": streamed(gear),
        "recorded": recorded(gear, Path(folder, f"run-{SIZE}")),
        "by_worker": by_worker(gear, folder, *sharding.KINDS),
        "refused": refused(gear) if SIZE > 1 else None,
        "failing": failing(gear) if SIZE > 1 else None,
        "differing": differing(gear) if SIZE > 1 else None,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *arguments = sys.argv[4:]
    print(json.dumps(globals()[what](*arguments)), flush=True)
