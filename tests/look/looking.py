"""What the tests of opened steps share: a loop in mid-training, looked into."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import keras

from loopscope.events import ChunkBegin, ChunkEnd


class Looks:
    """Looks into every step of a training, and keeps what was seen and what came.

    Args:
        loop: Whose.
        steps: The global numbers of the steps to look into; all, if not given.
    """

    def __init__(self, loop, steps=None):
        self._loop, self._steps = loop, steps
        self.opened, self.outputs, self.after = {}, {}, {}
        loop.subscribe(self, chunk_steps={"train": 1})

    def __call__(self, event):
        step = self._loop.step
        if isinstance(event, ChunkBegin) and event.phase == "train":
            if self._steps is None or step in self._steps:
                before = self._loop.state.sha256()
                self.opened[step] = self._loop.look()
                assert self._loop.state.sha256() == before
        elif isinstance(event, ChunkEnd) and step - 1 in self.opened:
            self.outputs[step - 1] = {
                name: float(values[0]) for name, values in event.outputs.items()
            }
            self.after[step - 1] = self._loop.state.numpy()


def looked_into(loop, x, y, *, batch_size, epochs=1, steps=None, **arguments):
    """Train, and look into some steps on the way."""
    looks = Looks(loop, steps)
    loop.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        **arguments,
    )
    return looks


def by_path(records):
    return {record.path: record for record in records}


def repeated(data, times):
    """One batch of data, so many times over."""
    import numpy as np

    return keras.tree.map_structure(lambda a: np.concatenate([a] * times), data)
