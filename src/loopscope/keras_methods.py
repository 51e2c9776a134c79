"""`fit`, `evaluate` and `predict`: Keras's words for what the open loop does.

Arguments and return values are Keras's. There is no loop in here: each function
prepares its data, subscribes the callbacks and lets the loop run. `Loop` takes
them in as its methods.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope import checks
from loopscope.callbacks import CallbackListener
from loopscope.data.source import Source, as_source
from loopscope.data.split import split, unpack

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
) -> Any:
    """Train as `keras.Model.fit` does, argument by argument.

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
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = split(
            (x, y, sample_weight), validation_split, self.backend
        )
    with ExitStack() as held:
        train = held.enter_context(
            _held(
                x,
                as_source(
                    x,
                    y,
                    sample_weight,
                    backend=self.backend,
                    batch_size=batch_size,
                    shuffle=shuffle,
                    seed=self.seed,
                    steps_per_epoch=steps_per_epoch,
                    class_weight=class_weight,
                ),
            )
        )
        validation = None
        if validation_data is not None:
            given = unpack(validation_data)
            source = self.source(
                *given,
                batch_size=validation_batch_size or batch_size,
                shuffle=False,
                steps_per_epoch=validation_steps,
            )
            validation = held.enter_context(_held(given[0], source))
            self.prepare("test", validation)
        self.prepare("train", train, epochs_left=max(1, epochs - initial_epoch))
        listener = CallbackListener(
            self, callbacks, verbose=verbose, epochs=epochs, steps=train.steps
        )
        held.enter_context(listener.subscribed())
        for epoch in self.epochs(epochs, initial_epoch=initial_epoch):
            for _ in epoch.train(train, every=None):
                pass
            if validation is not None and _is_due(epoch.index, validation_freq):
                epoch.validate(validation)
    return listener.history


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
) -> Any:
    """Loss and metrics over some data, as `keras.Model.evaluate` gives them.

    The metrics of a training that is under way are left as they were.

    Returns:
        A float or a list of floats in the order of `model.metrics_names`; with
        `return_dict=True` a dict by name.
    """
    source = self.source(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        shuffle=False,
        steps_per_epoch=steps,
    )
    with _held(x, source):
        self.prepare("test", source)
        listener = CallbackListener(
            self, callbacks, verbose=verbose, epochs=1, steps=source.steps
        )
        with listener.subscribed():
            logs = self.test(source)
    if return_dict:
        return logs
    values = list(logs.values())
    return values[0] if len(values) == 1 else values


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
    source = self.source(x, batch_size=batch_size, shuffle=False, steps_per_epoch=steps)
    outputs: list[Any] = []
    with _held(x, source):
        self.prepare("predict", source)
        listener = CallbackListener(
            self, callbacks, verbose=verbose, epochs=1, steps=source.steps
        )
        self._failed = self._stopping = False
        with listener.subscribed():
            for chunk in self.run_pass("predict", source, None):
                outputs.append(chunk.outputs)
    return _concatenate(outputs)


def _held(given: Any, source: Source) -> AbstractContextManager[Source]:
    """The source for a block; closed after it unless the user gave it as a source."""
    return nullcontext(source) if source is given else closing(source)


def _is_due(epoch: int, frequency: int | list[int]) -> bool:
    """Whether validation comes after this epoch (counted from 0)."""
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency


def _concatenate(chunks: list[Any]) -> Any:
    """Outputs of shape (steps, batch, ...) as one row an example."""
    import keras

    return keras.tree.map_structure(
        lambda *parts: np.concatenate([p.reshape(-1, *p.shape[2:]) for p in parts]),
        *chunks,
    )
