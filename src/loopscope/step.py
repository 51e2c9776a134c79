"""The built-in train, test and predict step, and `value_and_grad`.

This is the definition of a step that every gear executes. Loss, metrics,
loss scaling and the optimizer are Keras's; here is only their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loopscope import backend


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
    return backend.current().value_and_grad(fn, variables, has_aux)


def train_step(model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """One optimizer update of a compiled model. Returns the loss, a scalar."""
    variables = model.trainable_variables
    optimizer = model.optimizer

    def compute_loss() -> tuple[Any, tuple[Any, Any]]:
        y_pred = model(x, training=True)
        loss = model.compute_loss(x, y, y_pred, sample_weight, training=True)
        return optimizer.scale_loss(loss), (loss, y_pred)

    (_, (loss, y_pred)), gradients = value_and_grad(
        compute_loss, variables, has_aux=True
    )
    optimizer.apply(gradients, variables)
    _update_metrics(model, x, y, y_pred, sample_weight, loss)
    return loss


def test_step(model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """Loss and metrics of a compiled model, nothing trained. Returns the loss."""
    y_pred = model(x, training=False)
    loss = model.compute_loss(x, y, y_pred, sample_weight, training=False)
    _update_metrics(model, x, y, y_pred, sample_weight, loss)
    return loss


def predict_step(model: Any, x: Any) -> Any:
    """The model's output, in inference mode."""
    return model(x, training=False)


def _update_metrics(
    model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, loss: Any
) -> None:
    # Keras's own tracker of the mean loss, weighted by the examples of a batch.
    tracker = next((m for m in model.metrics if m.name == "loss"), None)
    if tracker is not None:
        tracker.update_state(loss, sample_weight=batch_size(x))
    model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def batch_size(x: Any) -> int:
    """The examples of a batch: the length of its first array."""
    import keras

    size: int = keras.tree.flatten(x)[0].shape[0]
    return size
