"""What Keras's stateless methods have computed in a step, and what the step has kept.

`stateless_call`, `stateless_apply` and `stateless_update_state` change nothing: they
return new values of variables, which a step has to return or assign. One that does not
trains with statistics, seeds, slots or metrics that never move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loopscope.hooks import Method, hooked


@dataclass(frozen=True, eq=False)
class Computed:
    """New values that one call has returned.

    Attributes:
        method: Whose: `"stateless_call"` and so on.
        owner: The name of the layer, optimizer or metric.
        variables: Those that have got a new value.
    """

    method: str
    owner: str
    variables: Sequence[Any]


@contextmanager
def noted() -> Iterator[list[Computed]]:
    """For the duration of a block, note what stateless methods return."""
    import keras

    notes: list[Computed] = []
    optimizer = next(
        c for c in keras.optimizers.Optimizer.__mro__ if "stateless_apply" in vars(c)
    )
    methods: list[tuple[type, str, Callable[..., Any]]] = [
        (keras.layers.Layer, "stateless_call", _of_layer),
        (optimizer, "stateless_apply", _of_optimizer),
        (keras.metrics.Metric, "stateless_update_state", _of_metric),
    ]
    with hooked(
        (owner, name, _noting(name, pairs, notes)) for owner, name, pairs in methods
    ):
        yield notes


def _noting(
    name: str, pairs: Callable[..., Any], notes: list[Computed]
) -> Callable[[Method], Method]:
    def around(real: Method) -> Method:
        def call(owner: Any, *arguments: Any, **named: Any) -> Any:
            result = real(owner, *arguments, **named)
            variables, given, computed = pairs(owner, result, *arguments, **named)
            new = [
                variable
                for variable, was, now in zip(variables, given, computed, strict=False)
                if now is not was
            ]
            if new:
                notes.append(Computed(name, owner.name, new))
            return result

        return call

    return around


def _of_layer(
    layer: Any, result: Any, trainable: Any, non_trainable: Any, *_: Any, **__: Any
) -> Any:
    return layer.non_trainable_variables, non_trainable, result[1]


def _of_optimizer(
    optimizer: Any, result: Any, variables: Any, *_: Any, **__: Any
) -> Any:
    return optimizer.variables, variables, result[1]


def _of_metric(metric: Any, result: Any, variables: Any, *_: Any, **__: Any) -> Any:
    return metric.variables, variables, result
