"""A step of PyTorch on what only stands for tensors, so that a graph of it can be had.

Keras's layers, losses and optimizers run as they are, but for what has no place in a
graph: branches that depend on a number, and generators of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import torch
from keras.src.backend.torch import core as keras_core
from keras.src.backend.torch import math as keras_math
from keras.src.backend.torch import random as keras_random
from torch.optim.optimizer import register_optimizer_step_pre_hook

from loopscope.errors import TraceError

map_structure = keras.tree.map_structure


class Values:
    """What stands for each variable while a step is traced.

    Args:
        lift: Makes it of a variable's tensor.
    """

    def __init__(self, lift: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._lift = lift
        self._by_id: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._by_id.values())

    def gradients(self) -> dict[int, tuple[torch.Tensor, int]]:
        """What `backward()` has left, each with the count of its changes."""
        known = ((id(v), v.grad) for v in self)
        return {key: (g, g._version) for key, g in known if g is not None}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for a variable's tensor, a leaf as it is one."""
        if id(tensor) not in self._by_id:
            self.put(tensor, self._lift(tensor.detach()))
        return self._by_id[id(tensor)]

    def put(self, tensor: torch.Tensor, stand_in: torch.Tensor) -> None:
        """Say what stands for a variable's tensor."""
        leaf = stand_in.detach().requires_grad_(tensor.requires_grad)
        self._by_id[id(tensor)] = leaf

    def stand_in(self, tensor: Any) -> Any:
        """The same, or the tensor itself if nothing stands for it."""
        return self._by_id.get(id(tensor), tensor)


class _Scope(keras.StatelessScope):
    """Gives a traced step what stands for its variables; assigns in place."""

    def __init__(self, values: Values) -> None:
        super().__init__(collect_losses=True)
        self.values = values
        self.variables: dict[int, Any] = {}

    def get_current_value(self, variable: Any) -> Any:
        if variable._value is None:  # Made just now: not yet initialized.
            value = super().get_current_value(variable)
            self.variables.setdefault(id(variable), variable)
            if value is None:
                value = variable._initializer(variable._shape, dtype=variable._dtype)
                value = keras_core.convert_to_tensor(value, dtype=variable._dtype)
                value = value.requires_grad_(variable.trainable)
                self.state_mapping[id(variable)] = value
            return value
        self.variables.setdefault(id(variable), variable)
        return self.values.of(variable._value)

    def add_update(self, update: Any) -> None:
        variable, value = update
        with torch.no_grad():
            self.get_current_value(variable).copy_(value)


def refuse_sums(
    left: dict[int, tuple[torch.Tensor, int]],
    after: dict[int, tuple[torch.Tensor, int]],
) -> None:
    """Refuse a step that adds to what the step before has left in `.grad`.

    Args:
        left: What `Values.gradients` found after the step had run once.
        after: The same, after it has run again.
    """
    for key, (gradient, changes) in left.items():
        now, count = after.get(key, (None, changes))
        if now is gradient and count > changes:
            error = TraceError(
                "`backward()` adds to the gradients of the step before, which are no "
                "variables of Keras: call `model.zero_grad()` in the step, before it"
            )
            error.accumulates = True
            raise error


def _refuse_torch_optimizer(optimizer: Any, *_: Any) -> None:
    raise TraceError(
        f"torch.optim.{type(optimizer).__name__} changes parameters behind Keras's "
        "variables: use an optimizer of Keras"
    )


@contextmanager
def tracing(values: Values) -> Iterator[_Scope]:
    """A block in which steps see what stands for their variables.

    What has no place in a graph is replaced: branches are both computed, generators
    of random numbers are operations that take a seed, and layers that cuDNN has as a
    whole (an LSTM) are what they consist of.
    """

    def zero_grad(module: torch.nn.Module, set_to_none: bool = True) -> None:
        for parameter in module.parameters():
            values.stand_in(parameter).grad = None

    def attribute(module: torch.nn.Module, name: str) -> Any:
        real = real_getattr(module, name)
        value = values.stand_in(real)
        if isinstance(real, torch.Tensor) and value is real:
            raise TraceError(
                f"{type(module).__name__}.{name} is a tensor that is no variable of "
                "Keras"
            )
        return value

    scope = _Scope(values)
    owner: Any = torch.nn.Module
    real_getattr = owner.__getattr__
    replaced = [
        (keras_core, "cond", _both(keras_core.cond, values)),
        (keras_math, "torch", _Counting()),
        (keras_random, "torch", _Seeded()),
        (keras_random, "torch_seed_generator", _seed),
        (torch, "_foreach_add_", _added),
        (owner, "zero_grad", zero_grad),
        (owner, "__getattr__", attribute),
    ]
    real = [(o, name, getattr(o, name)) for o, name, _ in replaced]
    hook = register_optimizer_step_pre_hook(_refuse_torch_optimizer)
    # Of convolutions a graph only says that they are; cuDNN computes them later.
    with scope, torch.backends.cudnn.flags(enabled=False):
        for holder, name, new in replaced:
            setattr(holder, name, new)
        try:
            yield scope
        finally:
            hook.remove()
            for holder, name, old in real:
                setattr(holder, name, old)


def _added(tensors: Any, others: Any, *, alpha: Any = 1) -> None:
    """`torch._foreach_add_`, which reads a factor that is a tensor as a number."""
    if isinstance(alpha, torch.Tensor):
        others, alpha = torch._foreach_mul(others, alpha), 1
    _FOREACH_ADD(tensors, others, alpha=alpha)


_FOREACH_ADD = torch._foreach_add_


def _both(real: Callable[..., Any], values: Values) -> Callable[..., Any]:
    """`keras.ops.cond` for a condition without a value: both branches, then a choice.

    What the branches assign is chosen likewise.
    """

    def cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
        pred = getattr(pred, "value", pred)
        if not isinstance(pred, torch.Tensor) or keras_core.get_device() == "meta":
            return real(pred, true_fn, false_fn)
        with torch.no_grad():
            before = [(v, v.detach().clone()) for v in values]
        chosen = true_fn()
        with torch.no_grad():
            after = [(v, v.detach().clone()) for v in values]
            for variable, was in before:
                variable.copy_(was)
        other = false_fn()
        with torch.no_grad():
            for variable, was in after:
                variable.copy_(torch.where(pred, was, variable))
        return map_structure(lambda a, b: _either(pred, a, b), chosen, other)

    return cond


def _either(pred: torch.Tensor, a: Any, b: Any) -> Any:
    if a is None and b is None:
        return None
    a, b = keras_core.convert_to_tensor(a), keras_core.convert_to_tensor(b)
    return torch.where(pred, a, b)


@contextmanager
def readable() -> Iterator[None]:
    """Say in words why a step has no graph."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ in DATA_DEPENDENT:
            raise TraceError(
                "a number is read in Python (`if loss > 1`, `float(loss)`, `.item()`, "
                f"`.numpy()`) or decides on a shape: {error}"
            ) from error
        raise


DATA_DEPENDENT = (
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
)


class _Counting:
    """The module `torch` where the product of a shape's axes is a plain number.

    Keras (3.15) makes a tensor of it, and then repeats segments so many times.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, data: Any, **named: Any) -> Any:
        return data if isinstance(data, torch.Size) else torch.tensor(data, **named)

    def prod(self, given: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(given, torch.Size):
            return _Count(math.prod(given))
        return torch.prod(given, *rest, **named)


class _Count(int):
    def long(self) -> int:
        return int(self)


# Random numbers.


def _seed(seed: Any) -> torch.Tensor:
    first, second = keras_random.draw_seed(seed)
    return first.to(torch.int64) + second.to(torch.int64)


class _Seeded:
    """The module `torch` where `generator=` is a seed, a tensor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def bernoulli(self, given: Any, generator: Any = None) -> Any:
        if generator is None:
            return torch.bernoulli(given)
        return _draw("bernoulli", given, list(given.shape), [], generator, given.dtype)

    def normal(self, mean: Any, std: Any, **named: Any) -> Any:
        return self._drawn("normal", torch.normal, (mean, std), named)

    def rand(self, *size: Any, **named: Any) -> Any:
        named.setdefault("size", size)
        return self._drawn("rand", torch.rand, (), named)

    def randint(self, *, low: Any, high: Any, **named: Any) -> Any:
        return self._drawn("randint", torch.randint, (low, high), named)

    def multinomial(self, given: Any, count: int, **named: Any) -> Any:
        seed = named.pop("generator", None)
        if seed is None:
            return torch.multinomial(given, count, **named)
        shape = [*given.shape[:-1], count]
        return _draw("multinomial", given, shape, [], seed, torch.int64)

    def _drawn(
        self, kind: str, plain: Callable[..., Any], numbers: Any, named: dict[str, Any]
    ) -> Any:
        seed = named.pop("generator", None)
        if seed is None:
            return plain(*numbers, **named)
        size = named["size"]
        shape = list(size[0] if size and not isinstance(size[0], int) else size)
        given = [float(number) for number in numbers]
        return _draw(kind, None, shape, given, seed, named.get("dtype"))


@torch.library.custom_op("loopscope::draw", mutates_args=())  # type: ignore[untyped-decorator]
def _draw(
    kind: str,
    given: torch.Tensor | None,
    shape: list[int],
    numbers: list[float],
    seed: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    generator = torch.Generator(device=seed.device)
    # As Keras seeds it (3.15).
    generator.manual_seed(int(seed) & 0xFFFFFFFF)
    named = {"generator": generator, "device": seed.device, "dtype": dtype}
    if kind == "bernoulli":
        return torch.bernoulli(given, generator=generator)
    if kind == "multinomial":
        return torch.multinomial(
            given, shape[-1], replacement=True, generator=generator
        )
    if kind == "normal":
        return torch.normal(*numbers, size=shape, **named)
    if kind == "randint":
        low, high = map(int, numbers)
        return torch.randint(low=low, high=high, size=shape, **named)
    return torch.rand(size=shape, **named)


@_draw.register_fake  # type: ignore[untyped-decorator]
def _(
    kind: str,
    given: torch.Tensor | None,
    shape: list[int],
    numbers: list[float],
    seed: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


__all__ = ["Values", "readable", "refuse_sums", "tracing"]
