"""JAX's room: a stateful Keras step made pure by `keras.StatelessScope`.

Every variable is mapped to a traced value, the step runs, the updates are read
back; then `jit` and `lax.while_loop`. Arrays are immutable here, so a snapshot
of the state costs nothing, and nothing is donated: an interrupted call leaves
the state as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.extend.core import Literal, get_opaque_trace_state
from keras.src.trainers.data_adapters import data_adapter_utils as kinds

from loopscope.backend import jax_devices as devices
from loopscope.backend import jax_workers as workers
from loopscope.backend.base import (
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
from loopscope.cluster import Place
from loopscope.data.feed import Feed, Native, NativeSpec, Spec
from loopscope.errors import StepError, UsageError
from loopscope.gear import EAGER, FUSED_XLA, XLA, Gear

map_structure = keras.tree.map_structure


GRAPHS = "JAX compiles by XLA all that is not eager"


class JaxBackend:
    """Steps on JAX."""

    name = "jax"
    gears = (XLA, FUSED_XLA, EAGER)
    lacking: Mapping[str, str] = {
        "graph": GRAPHS,
        "fused-graph": GRAPHS,
    }
    packages = ("jax", "jaxlib")
    loosens = False
    runs_eagerly_at_once = False
    unseen = (
        "gradients with respect to layers' outputs: JAX differentiates a function, and "
        "only with respect to its arguments",
    )

    def device(self) -> str:
        kind, distribution = str(jax.devices()[0].device_kind), devices.current()
        if distribution is None:
            return kind
        return f"{devices.mesh_of(distribution).size} x {kind}"

    def threads(self) -> dict[str, int]:
        return {"cores": cores()}

    def flags(self) -> dict[str, str]:
        distribution = devices.current()
        divided = (
            {}
            if distribution is None
            else {"keras.distribution": devices.named(distribution)}
        )
        return {
            **divided,
            "jax_enable_x64": str(jax.config.jax_enable_x64),
            "jax_default_matmul_precision": str(
                jax.config.jax_default_matmul_precision
            ),
            "jax_threefry_partitionable": str(jax.config.jax_threefry_partitionable),
        }

    def random_stream(self, gear: Gear) -> str:
        return "jax"

    def random_state(self) -> list[Any]:
        return []

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, jax.Array)

    def is_concrete(self, value: Any) -> bool:
        if not isinstance(value, jax.core.Tracer):
            return True
        # What a glance has traced itself, and nothing within it, is read afterwards.
        level = _Observed.level
        return level is not None and getattr(value, "_trace", None) is level

    def is_floating(self, value: Any) -> bool:
        return bool(jnp.issubdtype(value.dtype, jnp.floating))

    def dense(self, gradient: Any) -> jax.Array:
        return gradient

    def level(self) -> Any:
        return get_opaque_trace_state()

    def place(self, array: Any) -> jax.Array:
        return devices.place(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return devices.to_numpy(array)

    def adopt(self, model: Any, strategy: Any) -> None:
        devices.adopt(model, strategy)

    def distribution(self, model: Any) -> AbstractContextManager[Any] | None:
        # In one process nothing is asked that all of its devices would not answer.
        if not workers.several():
            return None
        scope: AbstractContextManager[Any] = devices.current().scope()
        return scope

    def spread(self, step: Step, model: Any) -> Step:
        distribution = devices.check(model)
        return step if distribution is None else devices.spread(step, distribution)

    def of_workers(self, feed: Feed) -> Feed:
        return devices.assembled(feed)

    def along(self, count: Callable[[], Any], outputs: Sequence[Any]) -> bool:
        return False  # The compiler joins messages.

    def applied(self) -> AbstractContextManager[list[Any]]:
        return nullcontext([])

    def in_first_replica(self) -> bool:
        return False  # One thread runs them all.

    def team(self, model: Any) -> Team:
        return workers.team()

    def join(self, place: Place) -> AbstractContextManager[None]:
        return workers.joined(place)

    def batches(self, adapter: Any) -> Iterable[Any]:
        batches: Iterable[Any] = adapter.get_jax_iterator()
        return batches

    def native(self, value: Any) -> Native | None:
        if isinstance(value, np.ndarray):
            return None
        if kinds.is_scipy_sparse(value):
            value = kinds.scipy_sparse_to_jax_sparse(value)
        elif kinds.is_tensorflow_sparse(value):
            value = kinds.tf_sparse_to_jax_sparse(value)
        if not kinds.is_jax_sparse(value):
            return None
        text = (
            f"{type(value).__name__}:{value.dtype}{list(value.shape)}, {value.nse} set"
        )
        spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), value)
        tensor = kinds.get_keras_tensor_spec([value])
        return Native(value, NativeSpec(text, tuple(value.shape), spec, tensor))

    def read(self, variable: Any) -> jax.Array:
        return variable.value

    def assign(self, variable: Any, value: Any) -> None:
        if isinstance(value, np.ndarray):
            value = self.place(value)
        variable.assign(value)

    def same(self, a: Any, b: Any) -> bool:
        return a is b  # Arrays are immutable.

    def live_bytes(self) -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def trace(
        self, step: Step, batch: tuple[Tree, ...], known: Callable[[], Sequence[Any]]
    ) -> Trace:
        specs = map_structure(
            lambda s: (
                jax.ShapeDtypeStruct(s.shape, s.dtype)
                if isinstance(s, Spec)
                else s.handle
            ),
            batch,
        )
        # Outside of eval_shape, so that variables made by the trace (an
        # optimizer's slots) are initialized with real values on leaving.
        with _Scope([(v, v.value) for v in known()], collect_losses=True) as scope:
            outputs = jax.eval_shape(_with_loss_scaling(step), *specs)
        return Trace(
            outputs=map_structure(_spec, outputs),
            variables=tuple(scope.seen.values()),
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
        one = _cutter(feed, _with_loss_scaling(step))
        if trace is None:
            return _eager(one, variables)
        pure = _pure(one, variables)
        if not gear.fused or feed.kind == "whole":
            return _stepwise(devices.compiled(pure, variables), variables)
        return _fused(pure, variables, trace, capacity)

    def model_step(self, model: Any, phase: str) -> Step:
        def step(data: Any) -> Any:
            groups = [model.trainable_variables, model.non_trainable_variables]
            if phase == "train":
                groups.append(model.optimizer.variables)
            if phase != "predict":
                groups.append(model.metrics_variables)
            state = tuple(_load(group) for group in groups)
            outputs, new = getattr(model, f"{phase}_step")(state, data)
            if phase == "predict":
                new = (state[0], new)
            for variables, values in zip(groups, new, strict=True):
                _store(variables, values)
            return outputs

        return step

    def value_and_grad(
        self, fn: Callable[[], Any], variables: Sequence[Any], has_aux: bool
    ) -> tuple[Any, list[Any]]:
        if not variables:
            raise StepError(no_gradient([]))
        touched: dict[int, Any] = {}

        def pure(values: list[Any]) -> tuple[Any, Any]:
            mapping = zip(variables, values, strict=True)
            with _Scope(mapping, collect_losses=True) as scope:
                value = fn()
            loss = value[0] if has_aux else value
            # Only a loss with a tangent comes out as this trace's own tracer.
            if type(loss) is not type(values[0]):
                raise StepError(no_gradient(variables))
            # Keep what the forward pass has assigned (BatchNorm, seeds).
            own = {id(v) for v in variables}
            touched.update((k, v) for k, v in scope.written.items() if k not in own)
            return loss, (value, {key: scope.state_mapping[key] for key in touched})

        values = [jnp.asarray(v.value) for v in variables]
        differentiate = jax.value_and_grad(pure, has_aux=True)
        if _Observed.by is None:
            (_, (value, updates)), grads = differentiate(values)
        else:
            _Observed.forward(fn, zip(variables, values, strict=True))
            with _Observed.backward():
                (_, (value, updates)), grads = differentiate(values)
        for key, update in updates.items():
            touched[key].assign(update)
        return value, list(grads)

    @contextmanager
    def observed(self, observer: Observer, gear: Gear | None) -> Iterator[None]:
        outer, _Observed.by = _Observed.by, observer
        try:
            yield
        finally:
            _Observed.by = outer

    def scripted(self, audience: Audience) -> AbstractContextManager[None]:
        raise UsageError(
            "Scripts with a loop of their own can be watched on TensorFlow only: on "
            "JAX their model runs inside of a transformation, where nobody can look. "
            "Give the step to a `loopscope.Loop`, and the loop to the doctor."
        )


class _Observed:
    """Who takes notes of eager steps, if anybody does."""

    by: Observer | None = None
    level: Any = None
    """The trace whose values can be read when it has been compiled and run."""

    @classmethod
    def forward(cls, fn: Callable[[], Any], mapping: Iterable[Any]) -> None:
        """Run the forward pass once more, where its values can be read.

        While it is differentiated they stand for derivatives as well.
        """
        with _Undone(state_mapping=mapping, collect_losses=True):
            fn()

    @classmethod
    @contextmanager
    def backward(cls) -> Iterator[None]:
        """The time of a forward and a backward pass, unseen but for that."""
        observer, cls.by = cls.by, None
        assert observer is not None
        try:
            with observer.timed("backward"):
                yield
        finally:
            cls.by = observer


class _Undone(keras.StatelessScope):
    """A scope that sees through to what is around it, and leaves nothing behind."""

    def get_current_value(self, variable: Any) -> Any:
        value = super().get_current_value(variable)
        if value is None and _Scope.current is not None:
            value = _Scope.current.get_current_value(variable)
        return value


class _Scope(keras.StatelessScope):
    """A stateless scope that sees through to an outer one and keeps a list.

    Keras's own nested scope does not know the values of the scope around it.
    """

    current: _Scope | None = None

    def __init__(self, mapping: Any, collect_losses: bool = False) -> None:
        super().__init__(state_mapping=mapping, collect_losses=collect_losses)
        self.outer = _Scope.current
        self.seen: dict[int, Any] = {} if self.outer is None else self.outer.seen
        self.written: dict[int, Any] = {}

    def __enter__(self) -> _Scope:
        super().__enter__()
        _Scope.current = self
        return self

    def __exit__(self, *args: Any) -> None:
        _Scope.current = self.outer
        super().__exit__(*args)

    def get_current_value(self, variable: Any) -> Any:
        self.seen.setdefault(id(variable), variable)
        value = super().get_current_value(variable)
        if value is None and self.outer is not None:
            value = self.outer.get_current_value(variable)
        return value

    def add_update(self, update: Any) -> None:
        self.seen.setdefault(id(update[0]), update[0])
        self.written[id(update[0])] = update[0]
        super().add_update(update)


def _with_loss_scaling(step: Step) -> Step:
    """The step, able to call `LossScaleOptimizer.apply`.

    On JAX, Keras's own (3.15) assigns variables inside of `ops.cond` and so leaks
    tracers; Keras's `fit` takes `stateless_apply` instead, and so does this.
    """
    optimizers = keras.optimizers.LossScaleOptimizer

    def scaled(*batch: Any) -> Any:
        original, optimizers.apply = optimizers.apply, _apply_scaled
        try:
            return step(*batch)
        finally:
            optimizers.apply = original

    return scaled


def _apply_scaled(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
    if not optimizer.built:
        with keras.name_scope(optimizer.name):
            optimizer.build(trainable_variables)
    trained, slots = optimizer._trainable_variables, optimizer.variables
    new_trained, new_slots = optimizer.stateless_apply(
        _load(slots), grads, _load(trainable_variables or trained)
    )
    _store(trainable_variables or trained, new_trained)
    _store(slots, new_slots)


def _spec(value: Any) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Spec(tuple(value.shape), jnp.dtype(value.dtype).name)
    return value


def _window(array: Any, start: Any, size: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _rows(array: Any, indices: Any) -> Any:
    return array.at[indices].get(mode="promise_in_bounds")


def _cutter(feed: Feed, step: Step) -> Callable[..., Any]:
    def one(arrays: Any, order: Any, index: Any, *due: Any) -> Any:
        batch = cut(
            feed,
            arrays,
            order,
            index,
            rows=_rows,
            window=_window,
            map_structure=map_structure,
        )
        return step(*due, *batch)

    return one


def _pure(one: Callable[..., Any], variables: Sequence[Any]) -> Callable[..., Any]:
    """`(values, arrays, order, index, *due) -> (new values, outputs)`."""
    layouts = devices.own(variables)

    def pure(
        values: Any, arrays: Any, order: Any, index: Any, *due: Any
    ) -> tuple[Any, Any]:
        with _Scope(zip(variables, values, strict=True), True) as scope:
            outputs = one(arrays, order, index, *due)
        new = [scope.get_current_value(v) for v in variables]
        # Carried values must keep their type: no weak types.
        new = [
            jax.lax.convert_element_type(n, v.dtype)
            for n, v in zip(new, values, strict=True)
        ]
        return devices.kept(new, layouts), map_structure(jnp.asarray, outputs)

    return pure


def _load(variables: Sequence[Any]) -> list[Any]:
    return [v.value for v in variables]


def _store(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _eager(one: Callable[..., Any], variables: Sequence[Any]) -> Program:
    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        if _Observed.by is not None and _Observed.by.compiled:
            return _glanced(_Observed.by, one, variables, feed, start)
        before = _load(variables)
        outputs = [
            one(feed.arrays, feed.order, start + i, *due_at(due, i))
            for i in range(stop - start)
        ]
        observer, _Observed.by = _Observed.by, None
        if observer is not None and not _all_finite(outputs, _load(variables)):
            # Executed once more, operation by operation.
            _retell(observer, one, variables, before, feed, start)
        _Observed.by = observer
        return map_structure(lambda *leaves: np.stack(leaves), *outputs)

    return run


QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""Options for a program that runs once: it compiles in half the time."""


def _glanced(
    observer: Observer,
    one: Callable[..., Any],
    variables: Sequence[Any],
    feed: Feed,
    index: int,
) -> Tree:
    """Run a step compiled, with all that an observer notes among its outputs.

    Eagerly each operation would be compiled by itself, which takes ten times as long.
    """
    pure = _pure(one, variables)
    notes: list[Any] = []

    def step(values: Any, arrays: Any, order: Any, index: Any) -> Any:
        _Observed.level = index._trace
        new, outputs = pure(values, arrays, order, index)
        notes[:] = observer.noted()
        traced = {id(n): n for n in notes if isinstance(n, jax.core.Tracer)}
        # What is not asked for is not compiled.
        return [] if observer.forward_only else new, outputs, traced

    given = (_load(variables), feed.arrays, feed.order, np.int32(index))
    try:
        lowered = jax.jit(step).lower(*given)
    finally:
        _Observed.level = None
    new, outputs, traced = lowered.compile(compiler_options=QUICKLY)(*given)
    # What was one array stays one.
    observer.resolved([traced.get(id(n), n) for n in notes])
    if new:
        _store(variables, new)
    return map_structure(lambda leaf: np.asarray(leaf)[None], outputs)


def _all_finite(*trees: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(trees) if hasattr(leaf, "dtype")]
    return all(
        bool(jnp.isfinite(leaf).all())
        for leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _retell(
    observer: Observer,
    one: Callable[..., Any],
    variables: Sequence[Any],
    values: Sequence[Any],
    feed: Feed,
    index: int,
) -> None:
    """Tell an observer every operation of a step, from the state before it."""
    pure = _pure(one, variables)

    def step(values: Any, arrays: Any) -> Any:
        return pure(values, arrays, feed.order, index)

    given = (list(values), feed.arrays)
    closed, arguments = jax.make_jaxpr(step)(*given), jax.tree.leaves(given)
    _evaluate(observer, closed.jaxpr, closed.consts, arguments)


def _evaluate(
    observer: Observer, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    """Evaluate a jaxpr, one equation after the other; functions in it likewise."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if equation.primitive.name in ("pjit", "jit") and inner is not None:
            outputs = _evaluate(observer, inner.jaxpr, inner.consts, inputs)
        else:
            outputs = _bind(equation, inputs)
            if not equation.primitive.multiple_results:
                outputs = [outputs]
            observer.computed(
                equation.primitive.name,
                _floating(inputs),
                _floating(outputs),
                place=_place(str(equation.source_info.name_stack)),
            )
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation: Any, inputs: Sequence[Any]) -> Any:
    found = equation.primitive.get_bind_params(equation.params)
    # Up to JAX 0.9 the functions of a call come beside its parameters.
    functions, params = found if isinstance(found, tuple) else ((), found)
    return equation.primitive.bind(*functions, *inputs, **params)


def _floating(arrays: Sequence[Any]) -> list[np.ndarray]:
    return [
        np.asarray(a)
        for a in arrays
        if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)
    ]


def _place(stack: str) -> tuple[str, str]:
    """Layer and phase, from what JAX calls a stack of names: `transpose(jvp(a))/b`."""
    phase = "backward" if "transpose(" in stack else "forward"
    plain = re.sub(r"\w+\(|\)", "", stack).strip("/")
    return plain, phase if plain else "other"


def _stepwise(pure: Callable[..., Any], variables: Sequence[Any]) -> Program:
    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        values, outputs = _load(variables), []
        for i in range(stop - start):
            given = (feed.arrays, feed.order, start + i, *due_at(due, i))
            values, output = pure(values, *given)
            outputs.append(output)
        stacked = map_structure(lambda *leaves: np.stack(leaves), *outputs)
        _store(variables, values)
        return stacked

    return run


def _fused(
    pure: Callable[..., Any], variables: Sequence[Any], trace: Trace, capacity: int
) -> Program:
    specs = keras.tree.flatten(trace.outputs)

    def many(
        values: Any, arrays: Any, order: Any, start: Any, stop: Any, *due: Any
    ) -> Any:
        def body(carry: Any) -> Any:
            index, values, buffers = carry
            here = [flags[index - start] for flags in due]
            values, outputs = pure(values, arrays, order, index, *here)
            leaves = keras.tree.flatten(outputs)
            slot = index - start
            buffers = [
                b.at[slot].set(leaf) for b, leaf in zip(buffers, leaves, strict=True)
            ]
            return index + 1, values, buffers

        empty = [jnp.zeros((capacity, *s.shape), s.dtype) for s in specs]
        _, values, buffers = jax.lax.while_loop(
            lambda carry: carry[0] < stop, body, (start, values, empty)
        )
        return values, buffers

    compiled = devices.compiled(many, variables)

    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        bounds = (np.int32(start), np.int32(stop))
        given = [] if due is None else [np.resize(due, capacity)]
        values, buffers = compiled(
            _load(variables), feed.arrays, feed.order, *bounds, *given
        )
        leaves = [np.asarray(buffer)[: stop - start] for buffer in buffers]
        _store(variables, values)
        return keras.tree.pack_sequence_as(trace.outputs, leaves)

    return run
