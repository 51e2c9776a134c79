"""Finding the Keras objects that a step written by the user works on.

An own step names its model, optimizers and metrics as any Python function names
things: as globals, as closed-over variables, as attributes of `self`. They are
found there, so that nobody has to list them again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

_DEPTH = 4


@dataclass
class Found:
    """Keras objects, each once, in order of discovery."""

    models: list[Any] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    variables: list[Any] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def all_variables(self) -> list[Any]:
        """Every variable of every object found, models first."""
        lists = [m.variables for m in self.models]
        lists += [o.variables for o in self.optimizers]
        lists += [m.variables for m in self.metrics]
        return [v for variables in lists for v in variables] + self.variables


def discover(*functions: Callable[..., Any]) -> Found:
    """What these functions, and those they call, refer to.

    Looks through globals, closures, defaults, bound `self` and its attributes,
    and containers of these; into functions of the user's own, not into packages.
    """
    import keras

    found, seen = Found(), set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > _DEPTH:
            return
        seen.add(id(value))
        if isinstance(value, keras.Layer):
            found.models.append(value)
        elif isinstance(value, keras.optimizers.Optimizer):
            found.optimizers.append(value)
        elif isinstance(value, keras.metrics.Metric):
            found.metrics.append(value)
        elif isinstance(value, keras.Variable):
            found.variables.append(value)
        elif isinstance(value, keras.random.SeedGenerator):
            found.variables.append(value.state)
        else:
            for child in _children(value, found.names):
                visit(child, depth + 1)

    for function in functions:
        visit(function, 0)
    return found


def global_seed() -> list[Any]:
    """The state of Keras's generator for random numbers without a seed, once made.

    It belongs to no object, and Keras 3.15 has no public way to it. Where a step is
    traced, the trace shows whether it is used.
    """
    from keras.src.backend.common import global_state

    generator = global_state.get_global_attribute("global_seed_generator")
    return [] if generator is None else [generator.state]


def _children(value: Any, names: set[str]) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__
    elif isinstance(value, FunctionType):
        if is_foreign(value.__module__):
            return
        for code in codes(value.__code__):
            names.update(code.co_names)
            for name in code.co_names:
                if name in value.__globals__:
                    yield value.__globals__[name]
        yield from inspect.getclosurevars(value).nonlocals.values()
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif hasattr(value, "python_function"):  # a tf.function
        yield value.python_function
    elif _is_users_object(value):
        yield from vars(value).values()


def _is_users_object(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    # A subclass of Loop is the user's, and its attributes are part of its steps.
    return not is_foreign(type(value).__module__)


def codes(code: CodeType) -> Iterator[CodeType]:
    """This code object and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def is_foreign(module: str | None) -> bool:
    """Whether a module is a package's rather than the user's or ours."""
    root = (module or "").partition(".")[0]
    return root in _FOREIGN


_FOREIGN = frozenset(
    {"keras", "tensorflow", "jax", "jaxlib", "torch", "numpy", "builtins", "loopscope"}
)
