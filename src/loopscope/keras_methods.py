"""`fit`, `evaluate` and `predict`: Keras's words for what the open loop does.

Arguments and return values are Keras's. There is no loop in here: each function
prepares its data, subscribes the callbacks and lets the loop run. `Loop` takes
them in as its methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope import checks
from loopscope.callbacks import CallbackListener, rows
from loopscope.data.source import Source
from loopscope.data.split import split, unpack
from loopscope.doctor import first_chunk
from loopscope.errors import UsageError
from loopscope.events import Phase
from loopscope.run.resume import recording
from loopscope.sharded import as_source

if TYPE_CHECKING:
    from loopscope.loop import Loop


def fit(
    self: Loop,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool = True,
    class_weight: dict[int, float] | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | list[int] = 1,
    *,
    run: Any = None,
    resume: bool | str = False,
    fast_dev_run: int = 0,
    doctor: bool = True,
) -> Any:
    """Train as `keras.Model.fit` does, argument by argument, and record it if asked to.

    Args:
        run: Record into this folder: a path or a `loopscope.Recording`.
        resume: Go on with the run that is in the folder, at the next batch, to the
            bits that it would have ended in; begin one if there is none. `"anyway"`:
            even if something has changed that can change bits.
        fast_dev_run: Run so many steps of everything, training and validation, to see
            that it runs: nothing is recorded, callbacks that write files or to
            services are left out, and the loop is as it was after it.
        doctor: Make the doctor's cheap checks in the first chunk, once for a loop: at
            most 0.6 s, and no bit changes. What it finds is the event
            `loopscope.events.Diagnosed`, and each error a warning.

    Returns:
        A `keras.callbacks.History`.

    Raises:
        UsageError: Before training, with everything as it was.
        Exception: What a source, a step or a callback raised, with a note that
            names the step; the variables are as the last finished step left
            them.
    """
    checks.count("epochs", epochs, least=0)
    checks.count("initial_epoch", initial_epoch, least=0)
    checks.count("fast_dev_run", fast_dev_run, least=0)
    _check_frequency(validation_freq)
    epochs = _capped(epochs)
    steps = fast_dev_run or None
    if steps:
        epochs, initial_epoch, run = 1, 0, None
        callbacks = _that_write_nothing(callbacks)
    of_data: dict[str, Any] = {
        "batch_size": batch_size,
        "validation_split": validation_split,
        "shuffle": shuffle,
        "class_weight": class_weight,
        "steps_per_epoch": steps_per_epoch,
        "validation_steps": validation_steps,
        "validation_batch_size": validation_batch_size,
    }
    with ExitStack() as held:
        recorder = None
        if run is not None:
            recorder = held.enter_context(recording(self, run, resume, epochs))
        train, validation = sources(
            self,
            x,
            y,
            sample_weight,
            validation_data=validation_data,
            hold=held,
            **of_data,
        )
        if validation is not None:
            self.prepare("test", validation)
        self.prepare("train", train, epochs_left=max(1, epochs - initial_epoch))
        if steps:
            held.enter_context(_set_back(self, train))
        listener = CallbackListener(
            self,
            callbacks,
            phase="train",
            verbose=verbose,
            epochs=epochs,
            steps=steps or steps_per_epoch or train.steps,
        )
        held.enter_context(listener.subscribed())
        if recorder is not None:
            when = {
                "epochs": epochs,
                "initial_epoch": initial_epoch,
                "validation_freq": validation_freq,
            }
            held.enter_context(recorder.listening(listener, train, {**of_data, **when}))
        # A look runs as long as it has time: several workers would part.
        if doctor and first_chunk.wanted() and not self.together.several:
            held.enter_context(_examined(self, train))

        def first() -> int:
            # BackupAndRestore sets it when training begins.
            return getattr(self.model, "_initial_epoch", None) or initial_epoch

        for epoch in self.run_epochs(first, epochs):
            for _ in epoch.train(train, every=None, steps=steps):
                pass
            if validation is not None and _is_due(epoch.index, validation_freq):
                epoch.validate(validation, steps=steps)
    return self.model.history


@contextmanager
def _examined(self: Loop, train: Source) -> Iterator[None]:
    """Make the cheap checks while training begins within this block.

    Who listens last comes when all others are done with a chunk.
    """
    listener = first_chunk.FirstChunk(
        self._runner,
        train,
        ahead=self.ahead,
        gear=lambda: self.gear,
        tell=self._emit,
    )
    self.subscribe(listener)
    try:
        yield
    finally:
        self.unsubscribe(listener)


WRITERS = (
    "BackupAndRestore",
    "CSVLogger",
    "ModelCheckpoint",
    "OrbaxCheckpoint",
    "RemoteMonitor",
    "TensorBoard",
)
"""Keras's callbacks that write files or to services."""

SERVICES = ("aim", "clearml", "comet_ml", "mlflow", "neptune", "wandb")
"""Packages whose callbacks do."""


def _that_write_nothing(callbacks: Any) -> list[Any]:
    """The callbacks of a run that must leave no trace."""
    given = getattr(callbacks, "callbacks", callbacks) or []
    given = given if isinstance(given, (list, tuple)) else [given]

    def writes(callback: Any) -> bool:
        kinds = type(callback).__mro__
        keras = any(
            kind.__name__ in WRITERS and kind.__module__.startswith("keras.")
            for kind in kinds
        )
        return keras or any(kind.__module__.split(".")[0] in SERVICES for kind in kinds)

    return [callback for callback in given if not writes(callback)]


@contextmanager
def _set_back(self: Loop, train: Source) -> Iterator[None]:
    """Training within this block leaves the loop as it was."""
    self.settle("train", train.specs)
    before = self.standing()
    with self.state.kept():
        yield
    self.stand(before)


def sources(
    self: Loop,
    x: Any = None,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool = True,
    class_weight: dict[int, float] | None = None,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    hold: ExitStack,
    **_: Any,
) -> tuple[Source, Source | None]:
    """What `fit` trains on and validates with, from its arguments.

    Args:
        hold: Closes what had to be made for them.
    """
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = split(
            (x, y, sample_weight), validation_split, self.backend
        )
    train = as_source(
        x,
        y,
        sample_weight,
        backend=self.backend,
        together=self.together,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=self.seed,
        steps_per_epoch=_whole_calls(self, steps_per_epoch),
        class_weight=class_weight,
        any_parts=checks.overrides(self.model, "train_step"),
    )
    hold.enter_context(_held(x, train))
    if validation_data is None:
        return train, None
    given = unpack(validation_data)
    validation = _in_order_from_the_start(
        self,
        "test",
        *given,
        batch_size=validation_batch_size or batch_size,
        steps=validation_steps,
    )
    hold.enter_context(_held(given[0], validation))
    return train, validation


def evaluate(
    self: Loop,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
    **kwargs: Any,
) -> Any:
    """Loss and metrics over some data, as `keras.Model.evaluate` gives them.

    The metrics of a training that is under way are left as they were.

    Returns:
        A float or a list of floats in the order of `model.metrics_names`; with
        `return_dict=True` a dict by name.

    Raises:
        UsageError: An argument that Keras's `evaluate` does not have either.
    """
    if kwargs:
        raise UsageError(
            f"`evaluate` has no argument {next(iter(kwargs))!r}. "
            f"Received: {sorted(kwargs)}"
        )
    source = _in_order_from_the_start(
        self, "test", x, y, sample_weight, batch_size=batch_size, steps=steps
    )
    with _held(x, source):
        self.prepare("test", source)
        listener = CallbackListener(
            self,
            callbacks,
            phase="test",
            verbose=verbose,
            epochs=1,
            steps=steps or source.steps,
        )
        with listener.subscribed():
            logs = _flat(self.test(source))
    return logs if return_dict else _in_order(self.model, logs)


def predict(
    self: Loop,
    x: Any,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    steps: int | None = None,
    callbacks: Any = None,
) -> Any:
    """The model's output for some data, as `keras.Model.predict` gives it.

    Returns:
        NumPy arrays in the structure of the model's output, one row an example.
    """
    source = _in_order_from_the_start(
        self, "predict", x, batch_size=batch_size, steps=steps
    )
    outputs: list[Any] = []
    with _held(x, source):
        self.prepare("predict", source)
        listener = CallbackListener(
            self,
            callbacks,
            phase="predict",
            verbose=verbose,
            epochs=1,
            steps=steps or source.steps,
        )
        self._failed = False
        self._stopped.discard("predict")
        with listener.subscribed():
            for chunk in self.run_pass("predict", source, None):
                outputs.append(chunk.outputs)
    return _concatenate(outputs)


def _in_order_from_the_start(
    loop: Loop,
    phase: Phase,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None,
    steps: int | None,
) -> Source:
    """Data to test or predict on: each pass begins with the first batch."""
    return as_source(
        x,
        y,
        sample_weight,
        backend=loop.backend,
        together=loop.together,
        batch_size=batch_size,
        shuffle=False,
        steps_per_epoch=_whole_calls(loop, steps),
        continues=False,
        any_parts=checks.overrides(loop.model, f"{phase}_step"),
    )


def _whole_calls(loop: Loop, steps: int | None) -> int | None:
    """Steps as Keras counts them: in whole calls of `steps_per_execution`."""
    every = getattr(loop.model, "steps_per_execution", 1) or 1
    asked = isinstance(steps, int) and steps > 0 and every > 1
    return -(-steps // every) * every if asked and steps else steps


def _held(given: Any, source: Source) -> AbstractContextManager[Source]:
    """The source for a block; closed after it unless the user gave it as a source."""
    return nullcontext(source) if source is given else closing(source)


def _capped(epochs: int) -> int:
    """The number of epochs under `keras.config.max_epochs`."""
    import keras

    most: int | None = keras.config.max_epochs()
    if not most or epochs <= most:
        return epochs
    warnings.warn(f"Limiting epochs to {most}", stacklevel=3)
    return most


def _is_due(epoch: int, frequency: int | list[int]) -> bool:
    """Whether validation comes after this epoch (counted from 0)."""
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency


def _check_frequency(frequency: Any) -> None:
    whole = isinstance(frequency, int) and frequency >= 1
    if not whole and not isinstance(frequency, (list, tuple, set)):
        raise UsageError(
            "`validation_freq` must be a whole number of at least 1, or a list of the "
            "epochs to validate after, counted from 1. "
            f"Received: validation_freq={frequency!r}"
        )


def _flat(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Logs as Keras returns them: sorted by name, dicts in them taken apart."""
    flat: dict[str, Any] = {}
    for name, value in sorted(logs.items()):
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat


def _in_order(model: Any, logs: dict[str, Any]) -> Any:
    """The values of logs in the order of the model's metrics; one alone as it is."""
    names = [] if getattr(model, "compiled", False) else ["loss"]
    for metric in getattr(model, "metrics", []):
        # The metrics of `compile` are kept in one metric.
        parts = getattr(metric, "metrics", None)
        names += [m.name for m in parts] if parts is not None else [metric.name]
    names = [name for name in names if name in logs]
    values = [logs[name] for name in [*names, *sorted(logs.keys() - set(names))]]
    return values[0] if len(values) == 1 else values


def _concatenate(chunks: list[Any]) -> Any:
    """Outputs of shape (steps, batch, ...) as one row an example."""
    import keras

    return keras.tree.map_structure(
        lambda *parts: np.concatenate(parts), *map(rows, chunks)
    )
