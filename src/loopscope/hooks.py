"""Hearing what Keras's objects are called with, for the duration of a block.

Layers, losses, metrics and optimizers are called through a few methods of a few
classes. Replaced there, they are heard in every model and in steps of any form.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Method = Callable[..., Any]
Hook = tuple[type, str, Callable[[Method], Method]]
"""A class, the name of a method, and what makes another one of the real one."""


@contextmanager
def hooked(
    hooks: Iterable[Hook], *, also: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Replace methods for a block, in this thread only: others may prepare data.

    Args:
        hooks: What is replaced.
        also: Whether it is heard in another thread, asked there.
    """
    wanted = list(hooks)
    real = [(owner, name, vars(owner)[name]) for owner, name, _ in wanted]
    for owner, name, around in wanted:
        method = vars(owner)[name]
        setattr(owner, name, _in_this_thread(around(method), method, also))
    try:
        yield
    finally:
        for owner, name, function in real:
            setattr(owner, name, function)


def calls(around: Callable[[Method], Method]) -> list[Hook]:
    """Every call of a layer."""
    import keras

    return [(keras.layers.Layer, "__call__", around)]


def updates(around: Callable[[Method], Method]) -> list[Hook]:
    """Every call of an optimizer's `apply`."""
    import keras

    kinds = reversed(keras.optimizers.Optimizer.__mro__)
    optimizer = next(kind for kind in kinds if "apply" in vars(kind))
    scaled = keras.optimizers.LossScaleOptimizer
    return [(optimizer, "apply", around), (scaled, "apply", around)]


def owner_of(kind: type, name: str) -> type:
    """The class that a method comes from."""
    return next(c for c in kind.__mro__ if name in vars(c))


def given_to_apply(
    optimizer: Any, grads: Iterable[Any], trainable_variables: Any
) -> tuple[list[Any], list[Any]]:
    """The gradients and the variables of a call of `apply`, as it takes them."""
    known = trainable_variables is None
    variables = optimizer._trainable_variables if known else trainable_variables
    return list(grads), list(variables)


def build_optimizer(optimizer: Any, variables: list[Any]) -> bool:
    """Build it as its first `apply` would; whether that was still to be done."""
    import keras

    if optimizer.built:
        return False
    with keras.name_scope(optimizer.name, caller=optimizer):
        optimizer.build(variables)
    optimizer.built = True
    return True


def _in_this_thread(heard: Method, plain: Method, also: Callable[[], bool]) -> Method:
    here = threading.get_ident()

    def method(*arguments: Any, **named: Any) -> Any:
        is_heard = threading.get_ident() == here or also()
        return (heard if is_heard else plain)(*arguments, **named)

    return method


__all__ = [
    "Hook",
    "Method",
    "build_optimizer",
    "calls",
    "given_to_apply",
    "hooked",
    "owner_of",
    "updates",
]
