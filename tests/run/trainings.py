"""The trainings that the tests here record, disturb and go on with.

    python trainings.py FOLDER GEAR PHASE EPOCHS EPOCH

records one in a process of its own. It says `began` after an epoch; at the end of a
chunk of PHASE in EPOCH it says `held`, waits for a line, and trains on.
"""

import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
from keras import layers

from loopscope import Recording
from loopscope.events import ChunkEnd
from models import FUSED, blobs, built_in_by_hand, fresh, small_loop

BATCH = 8
ROWS = 64
STEPS = ROWS // BATCH


class Ended(Exception):
    """Stands for whatever ends a training."""


class At(keras.callbacks.Callback):
    """Asks for a checkpoint at the end of every so many epochs, and does other things.

    Args:
        loop: Whose run it is; `None` where nothing is recorded.
        every: Epochs.
        acts: What to do at the end of an epoch, by its number.
    """

    def __init__(self, loop, every=1, acts=None):
        super().__init__()
        self._loop, self._every, self._acts = loop, every, acts or {}

    def on_epoch_end(self, epoch, logs=None):
        if self._loop is not None and (epoch + 1) % self._every == 0:
            self._loop.save()
        if epoch in self._acts:
            self._acts[epoch]()


def wide_loop(gear=FUSED, *, width=512, **options):
    """A loop whose checkpoints are larger than its journal."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(3),
        ]
    )
    return small_loop(gear, model=model, **options)


def two_outputs(gear=FUSED, **options):
    """A loop whose steps return two numbers: a journal with more rows than one."""
    loop = small_loop(gear, **options)
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        loss = built_in_by_hand(model, x, y)
        return {"also": 2 * loss, "loss": loss}

    return loop


def train(
    path=None,
    *,
    gear=FUSED,
    make=small_loop,
    epochs=8,
    every=1,
    acts=None,
    listener=None,
    resume=False,
    validation=False,
    more=(),
):
    """Train a new loop, recorded into `path` if there is one.

    Returns:
        The loop and the History.
    """
    loop = fresh(make, gear)
    if listener is not None:
        loop.subscribe(listener(loop))
    x, y = blobs(ROWS)
    recorded = {}
    if path is not None:
        recorded = {"run": Recording(path, replay_steps=10**6), "resume": resume}
    history = loop.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        callbacks=[At(loop if path else None, every, acts), *more],
        validation_data=blobs(2 * BATCH, seed=9) if validation else None,
        **recorded,
    )
    return loop, history


def end():
    raise Ended


@contextmanager
def warned():
    """What is said of a run within a block, one text a warning, as soon as it is."""
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_: (
            said.append(str(message)) if category is UserWarning else None
        )
        yield said


def remembering():
    """Callbacks that write between steps, and that have arrays to remember."""
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (epoch + 1)),
        keras.callbacks.EarlyStopping("loss", patience=99, restore_best_weights=True),
    ]


class During:
    """Does something at the end of a chunk of one phase, in one epoch, once."""

    def __init__(self, act, phase, epoch):
        self._act, self._phase, self._epoch = act, phase, epoch

    def __call__(self, loop):
        self._loop = loop
        return self._hear

    def _hear(self, event):
        here = isinstance(event, ChunkEnd) and event.phase == self._phase
        if here and self._act and self._loop.cursor.epoch == self._epoch:
            act, self._act = self._act, None
            act()


def held(path, gear, phase, epochs, epoch):
    """Train, and wait for a line from outside at the end of a chunk."""
    acts = dict.fromkeys(range(epochs), breathe) | {0: began}
    return train(
        path,
        gear=gear,
        epochs=epochs,
        every=4,
        acts=acts,
        listener=During(hold, phase, epoch),
        validation=True,
        more=remembering(),
    )


def began():
    print("began", flush=True)


def breathe():
    time.sleep(0.03)


def hold():
    print("held", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    # By its name, as others import it: the kind of a callback is part of a run.
    from trainings import held

    folder, gear, phase, epochs, epoch = sys.argv[1:]
    held(folder, gear, phase, int(epochs), int(epoch))
