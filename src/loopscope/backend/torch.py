"""PyTorch's room: one graph out of a step, backward pass and update included.

A step is executed once on tensors without values (`FakeTensorMode`), while every
variable stands for an input. What it does to them is written down operation by
operation (`make_fx`) and compiled by TorchInductor, so that nothing of Keras's Python
is left in a compiled step. Variables are changed in place, as Keras changes them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.torch import core as keras_core
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from loopscope.backend import torch_parts as parts
from loopscope.backend.base import (
    Alone,
    Audience,
    Observer,
    Program,
    Step,
    Team,
    Trace,
    Tree,
    cores,
    cut,
    due_at,
    no_gradient,
)
from loopscope.backend.torch_graph import Values, readable, refuse_sums, tracing
from loopscope.backend.torch_workers import join, joined
from loopscope.cluster import Place
from loopscope.data.feed import Feed, Native, Spec, dtype_name
from loopscope.errors import StepError, UsageError
from loopscope.gear import EAGER, GRAPH, Gear

map_structure = keras.tree.map_structure


LOOPS = "PyTorch's compiler has no loop over steps that changes variables"


class TorchBackend:
    """Steps on PyTorch."""

    name = "torch"
    gears = (EAGER, GRAPH)
    lacking: Mapping[str, str] = {
        "fused-graph": LOOPS,
        "fused-xla": LOOPS,
        "xla": "PyTorch compiles by TorchInductor, in gear 'graph'",
    }
    packages = ("torch",)
    loosens = False
    runs_eagerly_at_once = True
    unseen = ()

    def __init__(self) -> None:
        self._reads = WeakTensorKeyDictionary()

    def device(self) -> str:
        return str(torch.device(keras_core.get_device()).type)

    def threads(self) -> dict[str, int]:
        return {"cores": cores(), "intra_op": torch.get_num_threads()}

    def flags(self) -> dict[str, str]:
        return {
            "deterministic": str(torch.are_deterministic_algorithms_enabled()),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "mkldnn": str(torch.backends.mkldnn.enabled),
        }

    def random_stream(self, gear: Gear) -> str:
        return "torch"

    def random_state(self) -> list[Any]:
        return GENERATORS[: 2 if torch.cuda.is_available() else 1]

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def is_concrete(self, value: Any) -> bool:
        return not isinstance(value, FakeTensor)

    def is_floating(self, value: Any) -> bool:
        return bool(value.is_floating_point())

    def dense(self, gradient: Any) -> torch.Tensor:
        return gradient.to_dense()

    def level(self) -> Any:
        return None

    def place(self, array: Any) -> torch.Tensor:
        # A copy: a tensor may otherwise share the memory of a NumPy array.
        return keras_core.convert_to_tensor(array).detach().clone()

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(keras_core.convert_to_numpy(array))

    def adopt(self, model: Any, strategy: Any) -> None:
        raise UsageError(
            "PyTorch has no strategies: start several processes (`loopscope train "
            "EXPERIMENT --workers 2`, or torchrun), and each trains on its part of a "
            f"batch. Received: strategy={strategy!r}"
        )

    def distribution(self, model: Any) -> None:
        return None

    def spread(self, step: Step, model: Any) -> Step:
        workers = joined()
        return step if workers is None else parts.spread(step, workers)

    def of_workers(self, feed: Feed) -> Feed:
        return replace(feed, arrays=map_structure(self.place, feed.arrays))

    def along(self, count: Callable[[], Any], outputs: Sequence[Any]) -> bool:
        return parts.along(count, outputs)

    def applied(self) -> AbstractContextManager[list[Any]]:
        return nullcontext([])

    def in_first_replica(self) -> bool:
        return False

    def team(self, model: Any) -> Team:
        return joined() or Alone()

    def join(self, place: Place) -> AbstractContextManager[None]:
        return join(place)

    def batches(self, adapter: Any) -> Iterable[Any]:
        batches: Iterable[Any] = adapter.get_numpy_iterator()
        return batches

    def native(self, value: Any) -> Native | None:
        return None

    def read(self, variable: Any) -> torch.Tensor:
        # Variables are changed in place: a read is a copy, and the same one as long as
        # nothing has changed. Only a write through `.data` would go unnoticed.
        if isinstance(variable, Generator):
            return variable.read()
        if in_stateless_scope():  # While a step is traced.
            return variable.value.detach().clone()
        native = _native(variable)
        known = self._reads.get(native)
        if known is None or known[0] != native._version:
            known = (native._version, native.detach().clone())
            self._reads[native] = known
        copy: torch.Tensor = known[1]
        return copy

    def assign(self, variable: Any, value: Any) -> None:
        if isinstance(variable, Generator):
            value = torch.tensor(value) if isinstance(value, np.ndarray) else value
            variable.assign(value.to("cpu", torch.uint8))
            return
        native = _native(variable)
        with torch.no_grad():
            native.copy_(keras_core.convert_to_tensor(value))
        if isinstance(value, torch.Tensor) and _alike(value, native):
            self._reads[native] = (native._version, value.detach())

    def same(self, a: Any, b: Any) -> bool:
        return a is b

    def live_bytes(self) -> int:
        tensors = (t for t in gc.get_objects() if isinstance(t, torch.Tensor))
        storages = [t.untyped_storage() for t in tensors if t.is_leaf]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def trace(
        self, step: Step, batch: tuple[Tree, ...], known: Callable[[], Sequence[Any]]
    ) -> Trace:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        values = Values(lambda tensor: fake.from_tensor(tensor, static_shapes=True))
        with tracing(values) as scope, fake:
            for variable in known():
                if not isinstance(variable, Generator):
                    scope.get_current_value(variable)
            specs = map_structure(_placeholder, batch)
            with readable(), torch.set_grad_enabled(not _is_ours(step)):
                outputs = step(*specs)
                left = values.gradients()
                if left:
                    step(*specs)
                    refuse_sums(left, values.gradients())
        return Trace(
            outputs=map_structure(_spec, outputs),
            variables=tuple(scope.variables.values()),
            handle=None,
        )

    def program(
        self,
        step: Step,
        gear: Gear,
        feed: Feed,
        trace: Trace | None,
        variables: Sequence[Any],
        capacity: int,
        *,
        watched: bool = False,
    ) -> Program:
        if watched and joined() is not None:
            raise UsageError(
                "Signals of a step that is divided among workers are not measured. "
                "Leave `watch` out, or train in one process."
            )
        if feed.parts > 1:
            step = parts.DIVIDED[step].own or step
        if trace is None:
            return _eager(step)
        if not watched:
            return _compiled({(): _Compiled(step, trace, variables)})
        # Whether signals are due is known before each step: a program for either.
        return _compiled(
            {
                (due,): _Compiled(partial(step, due), trace, variables)
                for due in (True, False)
            }
        )

    def model_step(self, model: Any, phase: str) -> Step:
        real: Step = getattr(model, f"{phase}_step")

        def step(data: Any) -> Any:
            with torch.set_grad_enabled(phase == "train"):
                return map_structure(_detached, real(data))

        return step

    def value_and_grad(
        self, fn: Callable[[], Any], variables: Sequence[Any], has_aux: bool
    ) -> tuple[Any, list[Any]]:
        with torch.enable_grad():
            value = fn()
        loss = value[0] if has_aux else value
        tensors = [v.value for v in variables]
        wanted = [t for t in tensors if t.requires_grad]
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad or not wanted:
            raise StepError(no_gradient(variables))
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        if all(grad is None for grad in found):
            raise StepError(no_gradient(variables))
        by_tensor = {id(t): g for t, g in zip(wanted, found, strict=True)}
        grads = [by_tensor.get(id(t)) for t in tensors]
        return parts.detached(value), grads

    @contextmanager
    def observed(self, observer: Observer, gear: Gear | None) -> Iterator[None]:
        def differentiate(outputs: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            wanted = [t for t in observer.wanted() if t.requires_grad]
            named["allow_unused"] = True
            inputs = list(inputs)
            with observer.timed("backward"):
                found = real_grad(outputs, [*inputs, *wanted], *rest, **named)
            observer.differentiated(wanted, found[len(inputs) :])
            return found[: len(inputs)]

        def backward(tensor: Any, *rest: Any, **named: Any) -> None:
            wanted = [t for t in observer.wanted() if t.requires_grad]
            with observer.timed("backward"):
                if wanted:
                    found = real_grad(
                        tensor, wanted, retain_graph=True, allow_unused=True
                    )
                    observer.differentiated(wanted, found)
                real_backward(tensor, *rest, **named)

        real_grad, real_backward = torch.autograd.grad, torch.Tensor.backward
        torch.autograd.grad, torch.Tensor.backward = differentiate, backward
        try:
            with _Told(observer):
                yield
        finally:
            torch.autograd.grad, torch.Tensor.backward = real_grad, real_backward

    def scripted(self, audience: Audience) -> AbstractContextManager[None]:
        raise UsageError(
            "Scripts with a loop of their own can be watched on TensorFlow only. Give "
            "the step to a `loopscope.Loop`, and the loop to the doctor."
        )


class _Told(TorchDispatchMode):
    """Tells an observer of every operation, those of the backward pass too."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = _floating((args, kwargs))  # Before they are changed in place.
        outputs = func(*args, **(kwargs or {}))
        # Where operations are seen, PyTorch does not count what those on lists change.
        changed = _changed(func, args)
        torch.autograd.graph.increment_version(changed)
        name = func.overloadpacket.__name__
        self._observer.computed(name, inputs, _floating((outputs, changed)))
        return outputs


def _changed(func: Any, args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that an operation has changed in place."""
    given = zip(func._schema.arguments, args, strict=False)
    written = [
        a for s, a in given if s.alias_info is not None and s.alias_info.is_write
    ]
    leaves = torch.utils._pytree.tree_leaves(written)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _floating(tree: Any) -> list[np.ndarray]:
    return [
        keras_core.convert_to_numpy(leaf)
        for leaf in torch.utils._pytree.tree_leaves(tree)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]


class Generator:
    """PyTorch's own generator of random numbers, in the place of a variable.

    Unseeded Dropout draws from that of its device (Keras 3.15). Its state is a tensor
    of the CPU wherever the generator is.

    Args:
        path: As a variable has one.
        read: Gives the state.
        assign: Sets it.
    """

    trainable = False
    dtype = "uint8"

    def __init__(
        self,
        path: str,
        read: Callable[[], torch.Tensor],
        assign: Callable[[torch.Tensor], None],
    ) -> None:
        self.name = self.path = path
        self.read, self.assign = read, assign

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.read().shape)


GENERATORS = [
    Generator("torch/generator", torch.get_rng_state, torch.set_rng_state),
    Generator(
        "torch/cuda_generator", torch.cuda.get_rng_state, torch.cuda.set_rng_state
    ),
]
"""Those of the CPU, and of the GPU that is used, where there is one."""


def _native(variable: Any) -> torch.Tensor:
    native: torch.Tensor = getattr(variable, "_value", variable)
    return native


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _is_ours(step: Any) -> bool:
    step = step.func if isinstance(step, partial) else step
    return getattr(step, "__module__", "").startswith("loopscope.")


def _spec(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return Spec(tuple(value.shape), dtype_name(value))


def _placeholder(spec: Spec) -> torch.Tensor:
    shape = [1 if axis is None else axis for axis in spec.shape]
    return torch.empty(shape, dtype=keras_core.to_torch_dtype(spec.dtype))


def _batch(feed: Feed, index: int) -> tuple[Tree, ...]:
    return cut(
        feed,
        feed.arrays,
        feed.order,
        index,
        rows=lambda array, rows: torch.index_select(array, 0, rows),
        # A copy: a step may change its batch in place, and not the data.
        window=lambda array, start, size: array[start : start + size].clone(),
        map_structure=map_structure,
    )


def _stacked(outputs: Sequence[Tree]) -> Tree:
    def stack(*leaves: Any) -> Any:
        if not isinstance(leaves[0], torch.Tensor):
            return np.stack(leaves)
        return keras_core.convert_to_numpy(torch.stack([_detached(v) for v in leaves]))

    return map_structure(stack, *outputs)


def _eager(step: Step) -> Program:
    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        outputs = []
        for i in range(stop - start):
            batch = _batch(feed, start + i)
            with parts.running(step, batch), torch.set_grad_enabled(not _is_ours(step)):
                outputs.append(step(*due_at(due, i), *batch))
        return _stacked(outputs)

    return run


def _compiled(by_due: dict[tuple[bool, ...], _Compiled]) -> Program:
    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        with torch.no_grad():
            outputs = [
                by_due[due_at(due, i)](_batch(feed, start + i))
                for i in range(stop - start)
            ]
        return _stacked(outputs)

    return run


class _Compiled:
    """One step, compiled when it is first called."""

    def __init__(self, step: Step, trace: Trace, variables: Sequence[Any]) -> None:
        self._step, self._trace = step, trace
        self._variables = [v for v in variables if not isinstance(v, Generator)]
        self._call: Callable[..., Any] | None = None
        self._natives: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []

    def __call__(self, batch: tuple[Tree, ...]) -> Tree:
        leaves = keras.tree.flatten(batch)
        tensors = self._detached_tensors()
        with parts.running(self._step, batch):
            if self._call is None:
                self._call = self._compile(tensors, batch, leaves)
            found = iter(self._call(*tensors, *leaves))
        outputs = [
            next(found) if isinstance(leaf, Spec) else leaf
            for leaf in keras.tree.flatten(self._trace.outputs)
        ]
        return keras.tree.pack_sequence_as(self._trace.outputs, outputs)

    def _detached_tensors(self) -> list[torch.Tensor]:
        """Those of the variables, detached once: they are changed in place."""
        natives = [_native(v) for v in self._variables]
        if not self._tensors or not all(map(is_, natives, self._natives)):
            self._natives = natives
            self._tensors = [native.detach() for native in natives]
        return self._tensors

    def _compile(
        self, tensors: Sequence[torch.Tensor], batch: Any, leaves: Sequence[Any]
    ) -> Callable[..., Any]:
        def flat(*given: torch.Tensor) -> list[torch.Tensor]:
            values = Values(lambda tensor: tensor)
            for variable, tensor in zip(self._variables, given, strict=False):
                values.put(_native(variable), tensor)
            parts = keras.tree.pack_sequence_as(batch, given[len(tensors) :])
            with tracing(values), torch.set_grad_enabled(not _is_ours(self._step)):
                outputs = self._step(*parts)
            return [
                _detached(leaf)
                for leaf in keras.tree.flatten(outputs)
                if isinstance(leaf, torch.Tensor)
            ]

        given = [*tensors, *leaves]
        graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*given)
        with inductor_config.patch(fallback_random=True):
            compiled: Callable[..., Any] = torch._inductor.compile(graph, given)
        return compiled
