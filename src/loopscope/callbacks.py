"""Events to Keras callbacks.

The callbacks are Keras's, in Keras's `CallbackList`, and run unmodified: this file
only says which event is which hook, and how often each callback has to be called.
Where none looks at single batches, chunks stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loopscope.events import (
    PHASES,
    ChunkBegin,
    ChunkEnd,
    EpochBegin,
    EpochEnd,
    Event,
    Phase,
    PhaseBegin,
    PhaseEnd,
    TrainBegin,
    TrainEnd,
)

if TYPE_CHECKING:
    from loopscope.loop import Loop

STOP = {
    "train": "stop_training",
    "test": "stop_evaluating",
    "predict": "stop_predicting",
}
"""The attribute of a model by which a callback ends a phase."""


class CallbackListener:
    """Listens to a loop and calls Keras callbacks.

    Args:
        loop: The loop to listen to.
        callbacks: A callback, a list of them, a `CallbackList`, or `None`.
        phase: What is begun: `"train"` adds a `History`.
        verbose: Keras's `verbose`.
        epochs: The number at which training stops.
        steps: Steps of an epoch, `None` if unknown.
    """

    def __init__(
        self,
        loop: Loop,
        callbacks: Any,
        *,
        phase: Phase,
        verbose: str | int,
        epochs: int,
        steps: int | None,
    ) -> None:
        import keras

        self._loop, self._model = loop, loop.model
        if not loop.together.chief:
            callbacks, verbose = None, 0
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList(
                # As a list: of anything else Keras does not look whether its hooks
                # may be called from a thread, while the next step runs.
                keras.tree.flatten(callbacks) if callbacks else [],
                add_history=phase == "train",
                add_progbar=verbose != 0,
                model=self._model,
                verbose=verbose,
                epochs=epochs,
                steps=steps,
            )
        self._callbacks = callbacks
        self.callbacks: list[Any] = list(callbacks.callbacks)
        """Every callback that is called, Keras's own included."""
        self._phase = phase
        # Keras calls batch hooks once for so many steps.
        self._every = max(1, int(getattr(self._model, "steps_per_execution", 1) or 1))
        self._told = {phase: self._hooked(phase) for phase in PHASES}
        """The callbacks that do something at the batches of each phase."""
        self._begun: int | None = None
        """The step that batch hooks were told to begin with, until told its end."""
        self._unsaid: ChunkEnd | None = None

    @property
    def within_call(self) -> bool:
        """Whether callbacks were told the beginning of a batch, and not yet its end.

        Keras tells them once for so many steps as `steps_per_execution` says.
        """
        return self._begun is not None

    @property
    def hooked(self) -> bool:
        """Whether a callback that may change anything is called between steps."""
        return any(not _only_looks(callback) for callback in self._told["train"])

    @contextmanager
    def subscribed(self) -> Iterator[None]:
        """Listen for the duration of a block."""
        limits = {phase: self._limit(phase) for phase in PHASES if self._told[phase]}
        setattr(self._model, STOP[self._phase], False)
        self._loop.subscribe(self._hear, chunk_steps=limits)
        self._loop.hearing.append(self)
        try:
            yield
        finally:
            self._loop.hearing.remove(self)
            self._loop.unsubscribe(self._hear, chunk_steps=limits)

    def _hooked(self, phase: Phase) -> list[Any]:
        """The callbacks that do something at the batches of a phase."""
        silent = phase == "test" and self._phase == "train"
        return [
            callback
            for callback in self._callbacks.callbacks
            if (not silent if _is_bar(callback) else _has_hooks(callback, phase))
        ]

    def _limit(self, phase: Phase) -> Callable[[int], int]:
        """The most steps before a callback has to be called again."""
        callbacks = self._told[phase]

        def limit(index: int) -> int:
            if self._every > 1:
                return self._every - index % self._every
            if index == 0:
                return 1  # So that a bar can leave the compilation out of its pace.
            return min(_patience(callback) for callback in callbacks)

        return limit

    def _hear(self, event: Event) -> None:
        # What a callback evaluates or predicts is not told to those of the training.
        if self._loop.hearing[-1] is self:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        match event:
            case TrainBegin():
                self._callbacks.on_train_begin()
            case EpochBegin(epoch=epoch):
                self._callbacks.on_epoch_begin(epoch)
            case PhaseBegin(phase=phase):
                self._begun = self._unsaid = None
                if phase != "train":
                    setattr(self._model, STOP[phase], False)
                    getattr(self._callbacks, f"on_{phase}_begin")()
            case ChunkBegin(phase=phase, index=index):
                if self._told[phase] and self._begun is None:
                    self._begun = index
                    getattr(self._callbacks, f"on_{phase}_batch_begin")(index)
            case ChunkEnd(phase=phase):
                if self._told[phase]:
                    self._unsaid = event
                    if (event.index + event.steps) % self._every == 0:
                        self._end_batch()
            case PhaseEnd(phase=phase, logs=logs):
                self._end_batch()
                if phase == "test":
                    self._callbacks.on_test_end(dict(logs))
                elif phase == "predict":
                    self._callbacks.on_predict_end()
            case EpochEnd(epoch=epoch, logs=logs):
                self._callbacks.on_epoch_end(epoch, dict(logs))
            case TrainEnd(logs=logs):
                self._callbacks.on_train_end(dict(logs))
        phase = getattr(event, "phase", "train")
        if getattr(self._model, STOP[phase], False):
            self._loop.stop(phase)

    def _end_batch(self) -> None:
        event, self._unsaid = self._unsaid, None
        if event is None:
            return
        assert self._begun is not None
        begun, self._begun = self._begun, None
        # Keras counts a call of several steps as whole, also the last of an epoch.
        whole = begun + self._every - 1
        last = event.index + event.steps - 1 if self._every == 1 else whole
        logs: dict[str, Any] = (
            {"outputs": rows(event.outputs)}
            if event.phase == "predict"
            else dict(event.logs())
        )
        getattr(self._callbacks, f"on_{event.phase}_batch_end")(last, logs)


def _is_bar(callback: Any) -> bool:
    import keras

    return isinstance(callback, keras.callbacks.ProgbarLogger)


def _only_looks(callback: Any) -> bool:
    """Whether it is one of Keras's own that change no variable."""
    import keras

    known = keras.callbacks
    looking = (known.ProgbarLogger, known.ModelCheckpoint, known.BackupAndRestore)
    return type(callback) in (*looking, known.TensorBoard, known.TerminateOnNaN)


def _has_hooks(callback: Any, phase: Phase) -> bool:
    """Whether a callback has batch hooks for a phase, not Keras's empty ones."""
    import keras

    names = [f"on_{phase}_batch_begin", f"on_{phase}_batch_end"]
    names += ["on_batch_begin", "on_batch_end"] if phase == "train" else []
    return any(
        getattr(getattr(callback, name), "__func__", None)
        is not getattr(keras.callbacks.Callback, name)
        for name in names
    )


ALWAYS = 2**62


def _patience(callback: Any) -> int:
    """How many steps may go by before a callback's batch hooks have to be called.

    Keras's own callbacks that count batches are told to count by more than one: that
    is how they work where Keras itself executes several steps in one call.
    """
    import keras

    known = keras.callbacks
    if type(callback) is known.ProgbarLogger:
        return ALWAYS
    if type(callback) in (known.ModelCheckpoint, known.BackupAndRestore):
        if callback.save_freq == "epoch":
            return ALWAYS
        seen: int = getattr(callback, "_batches_seen_since_last_saving", 0)
        return max(1, int(callback.save_freq) - seen)
    if type(callback) is known.TensorBoard:
        quiet = (
            callback.update_freq == "epoch"
            and not callback.write_steps_per_second
            and not getattr(callback, "_should_trace", True)
        )
        return ALWAYS if quiet else 1
    return 1


def rows(outputs: Any) -> Any:
    """Outputs of shape (steps, batch, ...) as one row an example."""
    import keras

    return keras.tree.map_structure(
        lambda value: value.reshape(-1, *value.shape[2:]), outputs
    )
