"""`fit` with the callbacks that most trainings have: Keras's, and the drop-in.

One class for both: what is timed differs in nothing but the function that is called.
The model is compiled with Keras's defaults; the data are arrays, the callbacks new.
Checkpoints and logs go to the worker's temporary folder, bars to its log.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

import loopscope
from loopscope.drop_in import _loop
from peer import PausedFit, Peer
from workloads import Training, Workload


class Fit:
    """A `fit` with the usual callbacks.

    Args:
        workload: What to train.
        fit: `keras.Model.fit`, or what stands in its place.
        data: Makes the arguments that hold the data.
        about: Says in words how the model is trained.
    """

    def __init__(
        self,
        workload: Workload,
        fit: Callable[..., Any],
        *,
        data: Callable[[Workload], dict[str, Any]] | None = None,
        about: Callable[[Any], str] = lambda model: "",
    ) -> None:
        self.steps = workload.steps
        self._workload, self._fit, self._about = workload, fit, about
        self._data = (data or _arrays)(workload)
        self._training = Training(workload)
        self._training.model.compile(
            optimizer=self._training.optimizer,
            loss=self._training.loss,
            metrics=[self._training.metric],
        )
        self._held: PausedFit | None = None
        self._begin()

    def _begin(self) -> None:
        """One epoch of a training of some minutes: `auto` chooses for such a one."""
        model = self._training.model
        stop = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
        )
        epochs = max(1, self._workload.horizon // self.steps)
        self._fit(model, **self._data, epochs=epochs, verbose=0, callbacks=[stop])

    def _train(self, epochs: int, *more: Any) -> Any:
        return self._fit(
            self._training.model,
            **self._data,
            epochs=epochs,
            verbose=1,
            callbacks=[*usual_callbacks(), *more],
        )

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A block in which a long training has begun and `epoch` goes on with it.

        It ends with the block. Held while others train, a `fit` of Keras's on
        TensorFlow ended its next epoch up to a minute late: a thread of `tf.data`'s
        autotuning slept for as long as it had been held.
        """
        self._held = PausedFit(lambda pause: self._train(10**9, pause))
        self._held.epoch()
        yield
        self._held.finish()
        self._held = None

    def first_loss(self) -> float:
        self.restore()
        x, y = self._workload.first_batch
        history = self._fit(
            self._training.model, x, y, batch_size=len(x), shuffle=False, verbose=0
        )
        return float(history.history["loss"][0])

    def epoch(self) -> float:
        if self._held is None:
            return float(self._train(1).history["loss"][0])
        return float(self._held.epoch()["loss"])

    def restore(self) -> None:
        self._training.restore()

    def about(self) -> str:
        return self._about(self._training.model)

    def close(self) -> None:
        """Nothing to stop."""


def usual_callbacks() -> list[Any]:
    """New ones, in a folder of their own. `verbose=1` adds the bar."""
    folder = Path(tempfile.mkdtemp())
    return [
        keras.callbacks.ModelCheckpoint(folder / "model.keras"),
        # It compares at each epoch, but the training must not end.
        keras.callbacks.EarlyStopping(monitor="loss", patience=10**9),
        keras.callbacks.CSVLogger(folder / "log.csv"),
    ]


def _arrays(workload: Workload) -> dict[str, Any]:
    x, y = workload.data
    return {"x": x, "y": y, "batch_size": workload.batch_size}


def _without_autotune(workload: Workload) -> dict[str, Any]:
    from peers_tensorflow import shuffled_batches

    return {"x": shuffled_batches(workload), "shuffle": False}


def _gear(model: Any) -> str:
    gear = _loop(model).gear
    assert gear is not None
    return gear.name


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "keras.fit": lambda w: Fit(w, keras.Model.fit),
    "keras.fit, no autotuning": lambda w: Fit(
        w, keras.Model.fit, data=_without_autotune
    ),
    "loopscope.fit": lambda w: Fit(w, loopscope.fit, about=_gear),
}
"""For every workload; the one without autotuning on TensorFlow."""
