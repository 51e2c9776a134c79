"""Events to Keras callbacks, and Keras's progress bar.

The callbacks are Keras's and run unmodified. Batch hooks bound the chunks only
where some callback has them. The bar is Keras's `ProgbarLogger`, told of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loopscope.events import (
    PHASES,
    ChunkBegin,
    ChunkEnd,
    EpochBegin,
    EpochEnd,
    Event,
    PhaseBegin,
    PhaseEnd,
    TrainBegin,
    TrainEnd,
)

if TYPE_CHECKING:
    from loopscope.loop import Loop


class CallbackListener:
    """Listens to a loop and calls Keras callbacks.

    Args:
        loop: The loop to listen to.
        callbacks: A callback, a list of them, a `CallbackList`, or `None`.
        verbose: Keras's `verbose`.
        epochs: The number at which training stops.
        steps: Steps of an epoch, `None` if unknown.
    """

    def __init__(
        self,
        loop: Loop,
        callbacks: Any,
        *,
        verbose: str | int,
        epochs: int,
        steps: int | None,
    ) -> None:
        import keras

        self._loop, self._model = loop, loop.model
        params = {"verbose": verbose, "epochs": epochs, "steps": steps}
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList(
                callbacks, add_history=True, model=self._model, **params
            )
        self._callbacks = callbacks
        self._bars: list[Any] = []
        if verbose != 0:
            bar = keras.callbacks.ProgbarLogger()
            bar.set_params(params)
            bar.set_model(self._model)
            self._bars.append(bar)
        self._hooked = {phase: self._has_batch_hooks(phase) for phase in PHASES}
        self._training = False

    @property
    def history(self) -> Any:
        """The `keras.callbacks.History` of the training."""
        import keras

        return next(
            c
            for c in self._callbacks.callbacks
            if isinstance(c, keras.callbacks.History)
        )

    @contextmanager
    def subscribed(self) -> Iterator[None]:
        """Listen for the duration of a block."""
        limits = {phase: 1 for phase in PHASES if self._hooked[phase]}
        self._model.stop_training = False
        self._loop.subscribe(self._hear, chunk_steps=limits)
        try:
            yield
        finally:
            self._loop.unsubscribe(self._hear, chunk_steps=limits)

    def _has_batch_hooks(self, phase: str) -> bool:
        import keras

        names = [f"on_{phase}_batch_begin", f"on_{phase}_batch_end"]
        names += ["on_batch_begin", "on_batch_end"] if phase == "train" else []
        return any(
            getattr(getattr(callback, name), "__func__", None)
            is not getattr(keras.callbacks.Callback, name)
            for callback in self._callbacks.callbacks
            if not _saves_at_epoch_ends(callback)
            for name in names
        )

    def _hear(self, event: Event) -> None:
        match event:
            case TrainBegin():
                self._training = True
                self._call("on_train_begin")
            case EpochBegin(epoch=epoch):
                self._call("on_epoch_begin", epoch)
            case PhaseBegin(phase=phase) if phase != "train":
                self._call(f"on_{phase}_begin")
            case ChunkBegin(phase=phase, index=index):
                if self._hooked[phase]:
                    getattr(self._callbacks, f"on_{phase}_batch_begin")(index)
            case ChunkEnd():
                self._chunk(event)
            case PhaseEnd(phase="test", logs=logs):
                self._call("on_test_end", dict(logs))
            case PhaseEnd(phase="predict"):
                self._call("on_predict_end")
            case EpochEnd(epoch=epoch, logs=logs):
                self._call("on_epoch_end", epoch, dict(logs))
            case TrainEnd(logs=logs):
                self._training = False
                self._call("on_train_end", dict(logs))
        if getattr(self._model, "stop_training", False):
            self._loop.stop()

    def _chunk(self, event: ChunkEnd) -> None:
        hook = f"on_{event.phase}_batch_end"
        last = event.index + event.steps - 1
        if event.phase == "predict":
            logs: dict[str, Any] = {"outputs": event.outputs}
        elif self._hooked[event.phase] or self._bars:
            logs = dict(event.logs())
        if self._hooked[event.phase]:
            getattr(self._callbacks, hook)(last, logs)
        for bar in self._bars:
            getattr(bar, hook)(last, {} if event.phase == "predict" else logs)

    def _call(self, hook: str, *args: Any) -> None:
        getattr(self._callbacks, hook)(*args)
        for bar in self._bars:
            getattr(bar, hook)(*args)


def _saves_at_epoch_ends(callback: Any) -> bool:
    """Whether a callback has a batch hook that does nothing as it is set."""
    import keras

    savers = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
    return isinstance(callback, savers) and callback.save_freq == "epoch"
