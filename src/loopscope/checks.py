"""What is refused before a step runs.

Each check looks and raises; none changes a value.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from loopscope import backend as backends
from loopscope.data.feed import NativeSpec, Spec, on_host
from loopscope.data.source import Source
from loopscope.errors import DataError, UsageError


def model(candidate: Any) -> None:
    """Refuse what is no Keras model or layer."""
    import keras

    if not isinstance(candidate, keras.Layer):
        raise UsageError(
            "Expected a `keras.Model` (or layer) as `model`. "
            f"Received: model={candidate!r} of type {type(candidate).__name__}"
        )


def overrides(model: Any, method: str) -> bool:
    """Whether a model has its own `method`, not Keras's."""
    own = vars(model).get(method, getattr(type(model), method, None))
    return not getattr(own, "__module__", "keras").startswith("keras.")


def compiled(model: Any, phase: str) -> None:
    """Refuse the built-in step for a model without a loss."""
    if phase == "predict" or getattr(model, "compiled", False):
        return
    raise UsageError(
        f"The built-in {phase} step needs a loss"
        f"{' and an optimizer' if phase == 'train' else ''}. Give them: "
        "`Loop(model, optimizer=..., loss=...)`, compile the model, or write the step "
        f"yourself with `@loop.{phase}_step`. Received: model={model.name!r}, which is "
        "not compiled"
    )


def definition(model: Any) -> tuple[Any, ...]:
    """What a step's program was made from, as identities: equal as long as it holds."""
    parts = [getattr(model, "optimizer", None), getattr(model, "loss", None)]
    # Compiling makes a new tracker of the loss; building adds metrics behind it.
    parts += list(getattr(model, "metrics", ()))[:1]
    parts += list(model.trainable_variables)
    return tuple(id(part) for part in parts)


def count(name: str, value: Any, *, least: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise UsageError(
            f"`{name}` must be a whole number of at least {least}. "
            f"Received: {name}={value!r}"
        )


def build(model: Any, specs: tuple[Any, ...], phase: str) -> None:
    """Call the model symbolically: builds it if need be, refuses wrong shapes."""
    import keras

    leaves = keras.tree.flatten(specs[0])
    if any(_is_text(leaf) for leaf in leaves) and not _takes_text(model):
        raise DataError(
            "Arrays must hold numbers or booleans: the model has no input for text. "
            f"Received: {words(specs[:1])}"
        )
    x = keras.tree.map_structure(_symbol, specs[0])
    scope = backends.current().distribution(model)
    try:
        with scope or contextlib.nullcontext():
            model(x)
    except Exception as error:
        raise DataError(
            "The model does not take these data. "
            f"Expected: {_expected(model)}. Received: {words(specs[:1])} (the first "
            f"axis is the batch). The model says: {error}"
        ) from error
    scope = backends.current().distribution(model)
    if scope is not None:
        # Copies for each replica: Keras itself makes all of them at once.
        with scope:
            model._symbolic_build(
                data_batch=keras.tree.map_structure(_symbol, tuple(specs))
            )
    optimizer = getattr(model, "optimizer", None)
    if phase == "train" and optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)


def _symbol(spec: Spec | NativeSpec) -> Any:
    import keras

    if isinstance(spec, NativeSpec):
        return spec.tensor
    return keras.KerasTensor((None, *spec.shape[1:]), spec.dtype)


def _is_text(spec: Spec | NativeSpec) -> bool:
    dtype = spec.tensor.dtype if isinstance(spec, NativeSpec) else spec.dtype
    return str(dtype) == "string"


def _takes_text(model: Any) -> bool:
    inputs = getattr(model, "inputs", None)
    return not inputs or any(i.dtype == "string" for i in inputs)


def logits(model: Any) -> None:
    """Warn of a softmax (or sigmoid) output whose loss has `from_logits=True`.

    Keras on TensorFlow notices it while tracing, and takes the logits; elsewhere the
    loss is computed from the probabilities as if they were logits.
    """
    for operation, name, loss in _activated(model):
        warnings.warn(
            f"The output {operation.name!r} ends in a {name}, but its loss "
            f"{loss.name!r} has from_logits=True: it expects what comes before the "
            f"{name}. Drop the activation, or set from_logits=False.",
            stacklevel=6,
        )


def activated_losses(model: Any) -> set[str]:
    """The names of the losses that `logits` warns of."""
    return {loss.name for _, _, loss in _activated(model)}


def _activated(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """Each output operation with a softmax or sigmoid, its name, and such a loss."""
    losses, outputs = getattr(model, "loss", None), getattr(model, "outputs", None)
    if not outputs or losses is None:
        return
    import keras

    flat = keras.tree.flatten(losses)
    if len(flat) != len(outputs):
        return
    for loss, output in zip(flat, outputs, strict=True):
        operation: Any = getattr(
            getattr(output, "_keras_history", None), "operation", None
        )
        activation = getattr(operation, "activation", None)
        name = getattr(activation, "__name__", type(operation).__name__).lower()
        config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
        if name in ("softmax", "sigmoid") and config.get("from_logits"):
            yield operation, name, loss


def build_quietly(model: Any, specs: tuple[Any, ...], phase: str) -> None:
    """Build what a model's own step will read, where the data say how.

    Only the step itself knows what it does with its data, so what fails here is left
    for the step to say.
    """
    with contextlib.suppress(Exception):
        build(model, specs, phase)


def labels(model: Any, source: Source) -> None:
    """Refuse integer labels that are outside of the model's outputs.

    Of a stream, the first chunk is looked at.
    """
    arrays = source.shown()
    if len(arrays) < 2:
        return
    loss, y = getattr(model, "loss", None), arrays[1]
    name = loss if isinstance(loss, str) else getattr(loss, "name", "")
    name = name or getattr(loss, "__name__", "")
    shape = getattr(model, "output_shape", None) if model.built else None
    if name != "sparse_categorical_crossentropy" or not _is_flat(shape, y):
        return
    assert shape is not None
    values = on_host(y)
    ignored = getattr(loss, "ignore_class", None)
    if ignored is not None:
        values = values[values != ignored]
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if low < 0 or high >= shape[-1]:
        raise DataError(
            f"Labels must lie in 0..{shape[-1] - 1}: the model has {shape[-1]} "
            "outputs. "
            f"Received: y from {low} to {high}. Give the last layer more units, or "
            "number the classes from 0."
        )


def _is_flat(shape: Any, y: Any) -> bool:
    return (
        isinstance(shape, tuple) and isinstance(shape[-1], int) and hasattr(y, "shape")
    )


def _expected(model: Any) -> str:
    shape = getattr(model, "input_shape", None) if model.built else None
    return f"input of shape {shape}" if shape else "data that its `call` can take"


def words(specs: tuple[Any, ...]) -> str:
    """A batch's specs as `x=uint8[64, 784], y=uint8[64]`."""
    import keras

    names = ("x", "y", "sample_weight")
    parts = [
        s if isinstance(s, Spec) else keras.tree.map_structure(str, s) for s in specs
    ]
    return ", ".join(f"{n}={part}" for n, part in zip(names, parts, strict=False))
