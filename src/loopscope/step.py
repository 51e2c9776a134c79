"""The built-in train, test and predict step, and `value_and_grad`.

This is the definition of a step that every gear executes. Loss, metrics,
loss scaling and the optimizer are Keras's; here is only their order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loopscope import backend
from loopscope.events import Phase
from loopscope.watching import handing_out

Output = TypeVar("Output")


def value_and_grad(
    fn: Callable[[], Any], variables: Sequence[Any], *, has_aux: bool = False
) -> tuple[Any, list[Any]]:
    """Compute `fn()` and the gradients of its value, on any backend.

    For use inside a step. What `fn` assigns on its way (BatchNorm's moving
    statistics, seeds of Dropout) is kept, as in a plain call.

    Example:
        ```python
        (loss, logits), grads = loopscope.value_and_grad(
            compute_loss, model.trainable_variables, has_aux=True
        )
        optimizer.apply(grads, model.trainable_variables)
        ```

    Args:
        fn: Takes nothing; returns a scalar, or a tuple (scalar, anything) with
            `has_aux=True`.
        variables: The `keras.Variable`s to differentiate with respect to.
        has_aux: Whether `fn` returns more than the scalar.

    Returns:
        `(fn(), gradients)`, one gradient for each variable, in order, of the
        variable's shape and dtype. On TensorFlow a variable that the value does
        not depend on has the gradient `None`, on JAX zeros.

    Raises:
        StepError: No variable reaches the value.
    """
    here = backend.current()
    return handing_out(here.value_and_grad, fn, variables, has_aux, here)


def train_step(model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """One optimizer update of a compiled model. Returns the loss, a scalar."""
    loss, _ = keras_train_step(model, x, y, sample_weight, logs=False)
    return loss


def test_step(model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """Loss and metrics of a compiled model, nothing trained. Returns the loss."""
    loss, _ = keras_test_step(model, x, y, sample_weight, logs=False)
    return loss


def predict_step(model: Any, x: Any) -> Any:
    """The model's output, in inference mode."""
    return _call(model, x, training=False)


def keras_train_step(
    model: Any, x: Any, y: Any = None, sample_weight: Any = None, *, logs: bool = True
) -> tuple[Any, Any]:
    """`train_step` with what the model's `compute_metrics` has returned.

    Args:
        model: A compiled model.
        x: Of a batch.
        y: Of a batch.
        sample_weight: Of a batch.
        logs: Whether that is asked for; otherwise it is `None`.
    """
    variables = model.trainable_variables
    optimizer = model.optimizer
    here = backend.current()
    counted = False

    def compute_loss() -> tuple[Any, tuple[Any, Any]]:
        nonlocal counted
        y_pred = _call(model, x, training=True)
        loss = _loss(model, x, y, y_pred, sample_weight, training=True)
        if not logs:
            counted = here.along(lambda: count(y_pred, loss), [loss])
        return optimizer.scale_loss(loss), (loss, y_pred)

    def count(y_pred: Any, loss: Any) -> Any:
        return _update_metrics(model, x, y, y_pred, sample_weight, loss, logs=logs)

    if variables:
        (_, (loss, y_pred)), gradients = value_and_grad(
            compute_loss, variables, has_aux=True
        )
        optimizer.apply(gradients, variables)
    else:
        # As Keras does: such a model still has metrics to follow.
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        _, (loss, y_pred) = compute_loss()
        counted = False
    return loss, None if counted else count(y_pred, loss)


def keras_test_step(
    model: Any, x: Any, y: Any = None, sample_weight: Any = None, *, logs: bool = True
) -> tuple[Any, Any]:
    """`test_step` with what the model's `compute_metrics` has returned."""
    y_pred = _call(model, x, training=False)
    loss = _loss(model, x, y, y_pred, sample_weight, training=False)
    return loss, _update_metrics(model, x, y, y_pred, sample_weight, loss, logs=logs)


LOGS = "loopscope/logs"
"""The entry of a step's outputs that holds what Keras calls a step's logs."""


@dataclass(frozen=True)
class ModelStep:
    """A step in Keras's words: its return value are the logs that callbacks get.

    Args:
        model: A compiled model.
        phase: Which of its steps.
        overridden: Whether the model has its own `train_step` (and so on), which is
            then called with the data as Keras's `fit` gives them. Otherwise the
            built-in step, with what the model's own `compute_metrics` returns.
    """

    model: Any
    phase: Phase
    overridden: bool

    def __call__(self, *parts: Any) -> Any:
        """Run it on the parts of a batch."""
        if self.overridden:
            run = backend.current().model_step(self.model, self.phase)
            result = run(_data(parts))
            return result if self.phase == "predict" else {LOGS: result}
        built_in = keras_train_step if self.phase == "train" else keras_test_step
        loss, logs = built_in(self.model, *parts)
        return {"loss": loss, LOGS: logs}


def _data(parts: tuple[Any, ...]) -> Any:
    """A batch as Keras's `fit` hands it to a model's own step."""
    if len(parts) == 1 and not isinstance(parts[0], (tuple, list)):
        return parts[0]
    return parts


def _call(model: Any, x: Any, *, training: bool) -> Any:
    # Keras 3.15 keeps in these two words whether a method takes `training`.
    takes = getattr(model, "_call_has_training_arg", True)
    return model(x, training=training) if takes else model(x)


def _loss(
    model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool
) -> Any:
    if getattr(model, "_compute_loss_has_training_arg", True):
        return model.compute_loss(x, y, y_pred, sample_weight, training=training)
    return model.compute_loss(x, y, y_pred, sample_weight)


def _update_metrics(
    model: Any,
    x: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
    loss: Any,
    *,
    logs: bool,
) -> Any:
    # Keras's own tracker of the mean loss, weighted by the examples of a batch.
    tracker = getattr(model, "_loss_tracker", None)
    if tracker is not None:
        tracker.update_state(loss, sample_weight=batch_size(x))
    if not logs and hasattr(model, "_compile_metrics"):
        # What Keras's own method does, which then reads every result.
        if model._compile_metrics is not None:
            model._compile_metrics.update_state(y, y_pred, sample_weight)
        return None
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def loss_of(outputs: Mapping[str, Output]) -> Output | None:
    """The loss among a step's outputs: the first, where none is called so."""
    return outputs.get("loss", next(iter(outputs.values()), None))


def batch_size(x: Any) -> Any:
    """The examples of a batch: the length of its first array."""
    import keras

    first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
    return keras.ops.shape(first)[0]
