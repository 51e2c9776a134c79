"""`loopscope.fit(model, ...)`: a compiled model's own methods, run by a loop.

For people who have `model.compile(...)` and `model.fit(...)` already: the name in
front is all that changes.
"""

from __future__ import annotations

from typing import Any

from loopscope.gear import words_of
from loopscope.loop import Loop

_KEPT = "_loopscope_loop"
"""The attribute of a model that holds its loop: the two are forgotten together."""


def fit(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Train a compiled model: `model.fit(...)`, in the gear that pays.

    A second call goes on where the first stopped, with what it had compiled.

    Example:
        ```python
        history = loopscope.fit(model, x_train, y_train, batch_size=64, epochs=5)
        ```

    Args:
        model: A compiled `keras.Model`.
        *args: As in `keras.Model.fit`.
        **kwargs: As in `keras.Model.fit`.

    Returns:
        A `keras.callbacks.History`.

    Raises:
        UsageError: Before training, with everything as it was.
    """
    return _loop(model).fit(*args, **kwargs)


def evaluate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Loss and metrics of a compiled model: `model.evaluate(...)`.

    Args:
        model: A compiled `keras.Model`.
        *args: As in `keras.Model.evaluate`.
        **kwargs: As in `keras.Model.evaluate`.

    Returns:
        A float, a list of floats, or with `return_dict=True` a dict by name.
    """
    return _loop(model).evaluate(*args, **kwargs)


def predict(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The outputs of a model: `model.predict(...)`.

    Args:
        model: A `keras.Model`.
        *args: As in `keras.Model.predict`.
        **kwargs: As in `keras.Model.predict`.

    Returns:
        NumPy arrays in the structure of the model's output, one row an example.
    """
    return _loop(model).predict(*args, **kwargs)


def _loop(model: Any) -> Loop:
    kept: tuple[Loop, dict[str, bool]] | None = getattr(model, _KEPT, None)
    words = words_of(model)
    if kept is not None and kept[0].model is model and kept[1] == words:
        return kept[0]
    loop = Loop(model)
    if kept is not None and kept[0].model is model:
        loop.step = kept[0].step  # Compiled anew, with other words: it goes on.
    # Past Keras, which looks into every attribute that is set on a layer.
    object.__setattr__(model, _KEPT, (loop, words))
    return loop
