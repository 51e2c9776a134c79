"""What can be timed: the protocol between the peers and the worker.

Also the one piece that every `fit` needs: a training that pauses after each epoch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Peer(Protocol):
    """One way of training one workload."""

    steps: int
    """Steps that one call of `epoch` trains."""

    def first_loss(self) -> float | None:
        """Train the first batch of the data, in order, from the initial weights.

        Sets everything back before, not after. `None`: this peer has no loss.
        """
        ...

    def epoch(self) -> float | None:
        """Train one epoch from where the last one ended; wait until it is done.

        Returns the mean loss.
        """
        ...

    def restore(self) -> None:
        """Set weights and optimizer back to their initial values."""
        ...

    def about(self) -> str:
        """Settings that were chosen by measuring, in words."""
        ...

    def close(self) -> None:
        """Stop threads."""
        ...


class PausedFit:
    """A `fit` of endless epochs, held after each until the next is asked for.

    So an epoch of `fit` is timed as it is in the middle of a long training,
    without the cost of starting one: the same for Keras's `fit` and for ours.

    Args:
        fit: Called with a callback, in a thread.
    """

    def __init__(self, fit: Callable[[Any], Any]) -> None:
        import keras

        asked: queue.Queue[str] = queue.Queue()
        done: queue.Queue[Any] = queue.Queue()

        class Pause(keras.callbacks.Callback):
            def on_train_begin(self, logs: Any = None) -> None:
                self.wait()

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                done.put(dict(logs or {}))
                self.wait()

            def wait(self) -> None:
                what = asked.get()
                if what == "close":
                    raise _Closed
                if what == "finish":
                    self.model.stop_training = True

        def run() -> None:
            try:
                fit(Pause())
            except _Closed:
                return
            except BaseException as error:
                done.put(error)

        self._asked, self._done = asked, done
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def epoch(self) -> dict[str, Any]:
        """Let one epoch run; its logs."""
        self._asked.put("epoch")
        logs = self._done.get()
        if isinstance(logs, BaseException):
            raise logs
        return logs

    def finish(self) -> None:
        """After an epoch: let `fit` return, as when a callback stops it."""
        self._asked.put("finish")
        self._thread.join()
        if not self._done.empty():
            raise self._done.get()

    def close(self) -> None:
        """End the training."""
        self._asked.put("close")
        self._thread.join(10)


class _Closed(BaseException):
    """Ends a paused `fit`."""


class KerasFit:
    """`keras.Model.fit` with a choice of settings; the fastest is kept.

    Args:
        workload: What to train.
        settings: `compile` arguments to choose from: (steps_per_execution,
            jit_compile). More than one: each trains three epochs, the fastest stays.
        dataset: Makes what `fit` is given instead of the arrays.
    """

    def __init__(
        self,
        workload: Any,
        settings: list[tuple[int, Any]],
        dataset: Callable[[Any], Any] | None = None,
    ) -> None:
        self.steps = workload.steps
        self._workload = workload
        self._data: dict[str, Any] = {}
        if dataset:
            self._data = {"x": dataset(workload), "shuffle": False}
        else:
            x, y = workload.data
            self._data = {"x": x, "y": y, "batch_size": workload.batch_size}
        self._tried: list[str] = []
        if len(settings) > 1:
            settings = [min(settings, key=self._try)]
        self._settings = settings[0]
        self._training, self._paused = self._compiled(*self._settings), None

    def _compiled(self, steps_per_execution: int, jit_compile: Any) -> Any:
        from workloads import Training

        training = Training(self._workload)
        training.model.compile(
            optimizer=training.optimizer,
            loss=training.loss,
            metrics=[training.metric],
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
        )
        return training

    def _try(self, setting: tuple[int, Any]) -> float:
        import time

        fit = self._endless(self._compiled(*setting))
        fit.epoch()
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            fit.epoch()
            seconds.append(time.perf_counter() - began)
        fit.close()
        self._tried.append(
            f"{_words(setting)} {1e3 * min(seconds) / self.steps:.3g} ms"
        )
        return min(seconds)

    def _endless(self, training: Any) -> PausedFit:
        return PausedFit(
            lambda pause: training.model.fit(
                **self._data,
                epochs=10**9,
                verbose=0,
                callbacks=[pause],
            )
        )

    def first_loss(self) -> float:
        assert self._paused is None, "first_loss comes before the first epoch"
        self.restore()
        x, y = self._workload.first_batch
        history = self._training.model.fit(
            x, y, batch_size=len(x), shuffle=False, verbose=0
        )
        return float(history.history["loss"][0])

    def epoch(self) -> float:
        if self._paused is None:
            self._paused = self._endless(self._training)
        return float(self._paused.epoch()["loss"])

    def restore(self) -> None:
        self._training.restore()

    def about(self) -> str:
        chosen = _words(self._settings)
        return f"{chosen} (tried: {'; '.join(self._tried)})" if self._tried else chosen

    def close(self) -> None:
        if self._paused is not None:
            self._paused.close()


def _words(setting: tuple[int, Any]) -> str:
    steps_per_execution, jit_compile = setting
    return f"steps_per_execution={steps_per_execution}, jit_compile={jit_compile}"
