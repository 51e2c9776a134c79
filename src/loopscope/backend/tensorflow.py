"""TensorFlow's room: programs out of `tf.function`.

A step is traced once per batch shape; the traced function is then called as it
is (graph), under XLA, from a `tf.while_loop`, or both, so that four gears cost
one trace. Loops use `while i < stop`: a `tf.range(start, stop)` is compiled
again for every new (start, stop) under XLA.
"""

from __future__ import annotations

import gc
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters import data_adapter_utils as kinds
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks
from tensorflow.python.framework.config import is_op_determinism_enabled

from loopscope.backend import tensorflow_replicas as replicas
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
from loopscope.backend.tensorflow_workers import joined, workers_of
from loopscope.cluster import Place
from loopscope.data.adapters import out_of_order, pipeline
from loopscope.data.feed import Feed, Native, NativeSpec, Spec
from loopscope.errors import GearError, StepError
from loopscope.gear import EAGER, FUSED_GRAPH, FUSED_XLA, GRAPH, XLA, Gear
from loopscope.hooks import hooked, owner_of

map_structure = keras.tree.map_structure


class TensorFlowBackend:
    """Steps on TensorFlow."""

    name = "tensorflow"
    gears = (GRAPH, FUSED_GRAPH, XLA, FUSED_XLA, EAGER)
    lacking: Mapping[str, str] = {}
    packages = ("tensorflow",)
    loosens = True
    runs_eagerly_at_once = True
    unseen = ()

    def device(self) -> str:
        return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"

    def threads(self) -> dict[str, int]:
        return {
            "cores": cores(),
            "intra_op": tf.config.threading.get_intra_op_parallelism_threads(),
            "inter_op": tf.config.threading.get_inter_op_parallelism_threads(),
        }

    def flags(self) -> dict[str, str]:
        return {"op_determinism": str(is_op_determinism_enabled())}

    def random_stream(self, gear: Gear) -> str:
        # The bits are the same, their conversion to floats differs.
        return "tensorflow-xla" if gear.jit_compile else "tensorflow"

    def random_state(self) -> list[Any]:
        return []

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, tf.Tensor)

    def is_concrete(self, value: Any) -> bool:
        return hasattr(getattr(value, "values", value), "numpy")

    def is_floating(self, value: Any) -> bool:
        return bool(value.dtype.is_floating)

    def dense(self, gradient: Any) -> tf.Tensor:
        return tf.convert_to_tensor(gradient)

    def level(self) -> Any:
        return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

    def place(self, array: Any) -> tf.Tensor:
        return tf.convert_to_tensor(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(_host(array))

    def adopt(self, model: Any, strategy: Any) -> None:
        replicas.adopt(model, strategy)

    def distribution(self, model: Any) -> AbstractContextManager[Any] | None:
        strategy = replicas.strategy_of(model)
        if strategy is None:
            return None
        scope: AbstractContextManager[Any] = strategy.scope()
        return scope

    def spread(self, step: Step, model: Any) -> Step:
        strategy = replicas.strategy_of(model)
        return step if strategy is None else replicas.spread(step, strategy)

    def of_workers(self, feed: Feed) -> Feed:
        return replace(feed, arrays=map_structure(self.place, feed.arrays))

    def along(self, count: Callable[[], Any], outputs: Sequence[Any]) -> bool:
        return replicas.along(count, outputs)

    def applied(self) -> AbstractContextManager[list[Any]]:
        return replicas.applied()

    def in_first_replica(self) -> bool:
        return _replicas() > 1 and _replica() == 0

    def team(self, model: Any) -> Team:
        strategy = replicas.strategy_of(model)
        found: Team = workers_of(strategy) or Alone()
        return found

    def join(self, place: Place) -> AbstractContextManager[None]:
        return joined(place)

    def batches(self, adapter: Any) -> Iterable[Any]:
        # Where Keras's own way is a tf.data pipeline around Python, go without it.
        if type(adapter).__name__ in ("TFDatasetAdapter", "ArrayDataAdapter"):
            dataset: Iterable[Any] = adapter.get_tf_dataset()
            # One device executes all steps: it takes what each replica would get.
            return (map_structure(_joined, batch) for batch in dataset)
        batches: Iterable[Any] = adapter.get_numpy_iterator()
        return batches

    def native(self, value: Any) -> Native | None:
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OSU":
            return None
        if kinds.is_scipy_sparse(value):
            value = kinds.scipy_sparse_to_tf_sparse(value)
        elif kinds.is_jax_sparse(value):
            value = kinds.jax_sparse_to_tf_sparse(value)
        elif isinstance(value, np.ndarray):
            value = tf.convert_to_tensor(value)
        composite = isinstance(value, (tf.SparseTensor, tf.RaggedTensor))
        if not composite and not (tf.is_tensor(value) and value.dtype == tf.string):
            return None
        spec = tf.type_spec_from_value(value)
        text = f"{type(value).__name__}:{value.dtype.name}{list(spec.shape)}"
        tensor = kinds.get_keras_tensor_spec([value])
        return Native(value, NativeSpec(text, tuple(spec.shape), spec, tensor))

    def read(self, variable: Any) -> tf.Tensor:
        # Shares the variable's buffer; an assignment copies it first if shared. The
        # plain operation takes half of the time of `variable.value()`.
        native = _native(variable)
        if isinstance(native, tf.distribute.DistributedValues):
            native = replicas.first(native)
        return tf.raw_ops.ReadVariableOp(resource=native.handle, dtype=native.dtype)

    def assign(self, variable: Any, value: Any) -> None:
        if isinstance(value, np.ndarray):
            value = self.place(value)
        native = _native(variable)
        if isinstance(native, tf.distribute.DistributedValues):
            replicas.assign(native, value)
        elif isinstance(value, tf.Tensor) and value.dtype == native.dtype:
            # The plain operation takes a sixth of the time of `variable.assign`.
            tf.raw_ops.AssignVariableOp(resource=native.handle, value=value)
        else:
            native.assign(value)

    def same(self, a: Any, b: Any) -> bool:
        if a is b:
            return True
        if not all(isinstance(v, tf.Tensor) and "CPU" in v.device for v in (a, b)):
            return False
        if a.shape.rank == 0:
            return False  # To look at a number costs no more than to look where it is.
        # Both are alive, so one address is one buffer.
        return _address(a) == _address(b)

    def live_bytes(self) -> int:
        alive = (t for t in gc.get_objects() if type(t).__name__ == "EagerTensor")
        return sum(t.shape.num_elements() * t.dtype.size for t in alive)

    def trace(
        self, step: Step, batch: tuple[Tree, ...], known: Callable[[], Sequence[Any]]
    ) -> Trace:
        specs = map_structure(_type_spec, batch)
        traced = tf.function(step, autograph=not _is_ours(step))
        with _clear_errors(known), _initialized():
            concrete = traced.get_concrete_function(*specs)
        return Trace(
            outputs=map_structure(_spec, concrete.structured_outputs),
            variables=_captured(concrete, known()),
            handle=concrete,
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
        if gear.jit_compile and step in replicas.DIVIDED:
            raise GearError(
                f"Gear {gear.name!r} compiles by XLA, for one device: a step that is "
                "divided among replicas runs in 'graph', 'fused-graph' or 'eager'."
            )
        if feed.parts > 1:
            step = replicas.DIVIDED[step]
            if trace is not None:
                own = map_structure(partial(_of_worker, feed.parts), feed.specs)
                own_trace = self.trace(step, own, lambda: variables)
                trace = replace(trace, handle=own_trace.handle)
        if trace is None:
            return _stepwise(_cutter(feed, _told(step, variables)))
        if not gear.fused or feed.kind == "whole":
            step = trace.handle
            if gear.jit_compile:
                # The batch is cut outside: XLA would compile for every new index.
                step = tf.function(step, jit_compile=True, autograph=False)
            asked = (INDEX, *([DUE] if watched else []))
            return _stepwise(_flat(_cutter(feed, step), feed, GRAPH, asked))
        return _fused(feed, gear, trace, capacity, watched=watched)

    def model_step(self, model: Any, phase: str) -> Step:
        step: Step = getattr(model, f"{phase}_step")
        return step

    def value_and_grad(
        self, fn: Callable[[], Any], variables: Sequence[Any], has_aux: bool
    ) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape, replicas.differentiating():
            value = fn()
            loss = value[0] if has_aux else value
        grads = replicas.gradient(tape, loss, variables)
        if all(grad is None for grad in grads):
            raise StepError(no_gradient(variables))
        return value, grads

    @contextmanager
    def observed(self, observer: Observer, gear: Gear | None) -> Iterator[None]:
        def gradient(
            tape: Any, target: Any, sources: Any, *rest: Any, **named: Any
        ) -> Any:
            wanted = observer.wanted()
            with observer.timed("backward"):
                grads, more = real(tape, target, [sources, wanted], *rest, **named)
            observer.differentiated(wanted, more)
            return grads

        def executed(
            name: str,
            inputs: Any,
            attrs: Any,
            outputs: Any,
            op_name: str | None = None,
            graph: Any = None,
        ) -> None:
            if graph is None:
                observer.computed(name, _floating(inputs), _floating(outputs))

        real = tf.GradientTape.gradient
        compiled = gear is not None and bool(gear.jit_compile)
        tf.GradientTape.gradient = gradient
        op_callbacks.add_op_callback(executed)
        try:
            with _seeds_kept(), _random_as_compiled() if compiled else nullcontext():
                yield
        finally:
            op_callbacks.remove_op_callback(executed)
            tf.GradientTape.gradient = real

    @contextmanager
    def scripted(self, audience: Audience) -> Iterator[None]:
        def shuffle(dataset: Any, buffer_size: Any, *rest: Any, **named: Any) -> Any:
            parts = [type(part).__name__ for part in pipeline(dataset)]
            if not out_of_order(dataset):
                audience.shuffled(
                    int(buffer_size),
                    int(dataset.cardinality()),
                    any("Batch" in name for name in parts),
                )
            return real_shuffle(dataset, buffer_size, *rest, **named)

        def function(func: Any = None, *rest: Any, **named: Any) -> Any:
            if func is None:
                return lambda given: function(given, *rest, **named)
            audience.made(getattr(func, "__name__", repr(func)))
            return _Told(real_function(func, *rest, **named), audience)

        means: deque[tuple[Any, int]] = deque(maxlen=MEANS)

        def mean(values: Any, *rest: Any, **named: Any) -> Any:
            result = real_mean(values, *rest, **named)
            if self.in_first_replica() and len(getattr(values, "shape", ())) == 1:
                means.append((result, int(values.shape[0])))
            return result

        def gradient(tape: Any, target: Any, *rest: Any, **named: Any) -> Any:
            if self.in_first_replica():
                for _, examples in [m for m in means if m[0] is target]:
                    audience.averaged(_replicas(), examples)
            return real_gradient(tape, target, *rest, **named)

        real_mean, real_gradient = tf.reduce_mean, tf.GradientTape.gradient
        real_function, real_shuffle = tf.function, tf.data.Dataset.shuffle
        was_eager = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        tf.function, tf.data.Dataset.shuffle = function, shuffle
        tf.reduce_mean = tf.math.reduce_mean = mean
        tf.GradientTape.gradient = gradient
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Even though the")
                yield
        finally:
            tf.function, tf.data.Dataset.shuffle = real_function, real_shuffle
            tf.reduce_mean = tf.math.reduce_mean = real_mean
            tf.GradientTape.gradient = real_gradient
            tf.config.run_functions_eagerly(was_eager)


MEANS = 16
"""Of so many means that a step computes, one may be its loss."""


def _replicas() -> int:
    """How many replicas run what this thread runs; 0 outside of any of them."""
    context = tf.distribute.get_replica_context()
    return 0 if context is None else int(context.num_replicas_in_sync)


def _replica() -> int:
    context = tf.distribute.get_replica_context()
    return int(context.replica_id_in_sync_group)


class _Told:
    """A compiled function that says when it is called."""

    def __init__(self, function: Any, audience: Audience) -> None:
        self._function, self._audience = function, audience

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self._audience.called_compiled():
            return self._function(*arguments, **named)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return _Told(self._function.__get__(instance, owner), self._audience)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


RANDOM = (
    (tf.random, "stateless_uniform"),
    (tf.random, "stateless_normal"),
    (tf.random, "stateless_truncated_normal"),
    (tf.random, "stateless_categorical"),
    (tf.nn.experimental, "stateless_dropout"),
)
"""What Keras draws random numbers with."""

_COMPILED: dict[str, Any] = {}
"""The same, each compiled by itself."""


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """Random operations without a seed, run eagerly, take no seed from later ones.

    TensorFlow draws one for each from a generator of Python's that has no public name.
    Others are drawn here, since each seed has a kernel that remembers how far it is.
    """
    eager = context.context()
    kept = getattr(eager, "_rng", None)
    if kept is not None:
        eager._rng = random.Random("loopscope")
    try:
        yield
    finally:
        if kept is not None:
            eager._rng = kept


@contextmanager
def _random_as_compiled() -> Iterator[None]:
    """Draw random numbers as XLA does: it makes other floats of the same bits."""
    real = [(owner, name, getattr(owner, name)) for owner, name in RANDOM]
    for owner, name, function in real:
        if name not in _COMPILED:  # It is traced anew for each shape, once.
            _COMPILED[name] = tf.function(function, jit_compile=True, autograph=False)
        setattr(owner, name, _COMPILED[name])
    try:
        yield
    finally:
        for owner, name, function in real:
            setattr(owner, name, function)


def _floating(tensors: Any) -> list[np.ndarray]:
    return [
        np.asarray(_host(t))
        for t in tensors
        if isinstance(t, tf.Tensor) and t.dtype.is_floating
    ]


def _host(value: Any) -> Any:
    # A bfloat16 (or float8) of rank 0 gives a NumPy number, which `np.asarray` of the
    # tensor refuses. Copies nothing larger.
    if isinstance(value, tf.IndexedSlices):
        value = tf.convert_to_tensor(value)
    alone = isinstance(value, tf.Tensor) and value.shape.rank == 0
    return value.numpy() if alone else value


def _address(tensor: tf.Tensor) -> int:
    address: int = np.asarray(tensor).__array_interface__["data"][0]
    return address


def _joined(value: Any) -> Any:
    """What a distributed dataset has for each replica, as one batch."""
    if not isinstance(value, tf.distribute.DistributedValues):
        return value
    parts = value.values
    sparse = isinstance(parts[0], tf.SparseTensor)
    return tf.sparse.concat(0, list(parts)) if sparse else tf.concat(parts, 0)


def _type_spec(spec: Spec | NativeSpec) -> Any:
    if isinstance(spec, NativeSpec):
        return spec.handle
    return tf.TensorSpec(spec.shape, spec.dtype)


def _native(variable: Any) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


@contextmanager
def _initialized() -> Iterator[None]:
    """Give variables their first values that a trace has made and then has failed.

    They exist, an optimizer's slots among them; TensorFlow would have filled them in
    the end.
    """
    made: list[tuple[Any, Any]] = []

    def around(real: Callable[..., None]) -> Callable[..., None]:
        def init(variable: Any, initializer: Any, *rest: Any, **named: Any) -> None:
            real(variable, initializer, *rest, **named)
            made.append((variable, initializer))

        return init

    try:
        with hooked([(owner_of(keras.Variable, "__init__"), "__init__", around)]):
            yield
    except Exception:
        for variable, initializer in made:
            if not bool(_native(variable).is_initialized()):
                variable.assign(_first_value(variable, initializer))
        raise


def _first_value(variable: Any, initializer: Any) -> Any:
    if isinstance(initializer, str):
        initializer = keras.initializers.get(initializer)
    if not callable(initializer):
        return initializer
    return initializer(tuple(variable.shape), dtype=variable.dtype)


@contextmanager
def _clear_errors(variables: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Let what a step did wrong come out as StepError, whoever noticed it."""
    try:
        yield
    except Exception as error:
        # AutoGraph puts an exception of its own around the one that was raised.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, StepError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if "No gradients provided for any variable" in str(error):
            raise StepError(no_gradient(variables())) from error
        raise


def _told(step: Step, variables: Sequence[Any]) -> Step:
    def told(*batch: Any) -> Any:
        with _clear_errors(lambda: variables):
            return step(*batch)

    return told


def _is_ours(step: Any) -> bool:
    return getattr(step, "__module__", "").startswith("loopscope.")


def _spec(value: Any) -> Any:
    if isinstance(value, (tf.Tensor, tf.TensorSpec)):
        return Spec(tuple(value.shape.as_list()), value.dtype.name)
    return value


def _of_worker(parts: int, spec: Spec) -> Spec:
    """What a worker has of a batch."""
    rows, *rest = spec.shape
    return Spec((rows // parts, *rest), spec.dtype) if rows is not None else spec


def _captured(concrete: Any, known: Sequence[Any]) -> tuple[Any, ...]:
    """Every variable that a concrete function touches, Keras's own where known."""
    by_handle = {}
    for variable in (*concrete.graph.variables, *known):
        native = _native(variable)
        divided = isinstance(native, tf.distribute.DistributedValues)
        for copy in native.values if divided else [variable]:
            by_handle[id(copy.handle)] = variable
    captured = (by_handle.get(id(handle)) for handle in concrete.captured_inputs)
    return tuple(variable for variable in captured if variable is not None)


def _window(array: Any, start: Any, size: int) -> tf.Tensor:
    begin = tf.concat([[start], tf.zeros(len(array.shape) - 1, tf.int32)], 0)
    return tf.slice(array, begin, [size, *array.shape[1:]])


def _cutter(feed: Feed, step: Callable[..., Any]) -> Callable[..., Any]:
    def one(arrays: Any, order: Any, index: Any, *due: Any) -> Any:
        batch = cut(
            feed,
            arrays,
            order,
            index,
            rows=tf.gather,
            window=_window,
            map_structure=map_structure,
        )
        return step(*due, *batch)

    return one


INDEX, DUE = tf.TensorSpec((), tf.int32), tf.TensorSpec((), tf.bool)


def _flat(
    fn: Callable[..., Any], feed: Feed, gear: Gear, asked: Sequence[tf.TensorSpec]
) -> Callable[..., Any]:
    """`fn(arrays, order, *asked)` compiled, callable without signature checks."""
    compiled = tf.function(fn, jit_compile=gear.jit_compile or None, autograph=False)
    spec = map_structure(tf.type_spec_from_value, feed.arrays)
    if feed.kind == "whole":
        spec = map_structure(_type_spec, feed.specs)
    order = None if feed.order is None else tf.TensorSpec(feed.order.shape, tf.int32)
    concrete = compiled.get_concrete_function(spec, order, *asked)

    def call(arrays: Any, order: Any, *given: Any) -> Any:
        constants = (
            tf.constant(value, spec.dtype)
            for value, spec in zip(given, asked, strict=True)
        )
        return concrete(arrays, order, *constants)

    return call


def _stepwise(one: Callable[..., Any]) -> Program:
    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        outputs = [
            one(feed.arrays, feed.order, start + i, *due_at(due, i))
            for i in range(stop - start)
        ]
        return map_structure(
            lambda *leaves: np.stack([_host(leaf) for leaf in leaves]), *outputs
        )

    return run


def _fused(
    feed: Feed, gear: Gear, trace: Trace, capacity: int, *, watched: bool
) -> Program:
    one = _cutter(feed, trace.handle)
    specs = keras.tree.flatten(trace.outputs)

    def many(arrays: Any, order: Any, start: Any, stop: Any, *due: Any) -> list[Any]:
        def body(index: Any, *buffers: Any) -> tuple[Any, ...]:
            # A slice would be compiled by XLA for every new start.
            here = [tf.gather(flags, index - start) for flags in due]
            leaves = keras.tree.flatten(one(arrays, order, index, *here))
            slot = [[index - start]]
            return index + 1, *(
                tf.tensor_scatter_nd_update(buffer, slot, [leaf])
                for buffer, leaf in zip(buffers, leaves, strict=True)
            )

        empty = [tf.zeros((capacity, *s.shape), s.dtype) for s in specs]
        _, *buffers = tf.while_loop(
            lambda index, *_: index < stop,
            body,
            [start, *empty],
            parallel_iterations=1,
        )
        return list(buffers)

    flags = [tf.TensorSpec((capacity,), tf.bool)] if watched else []
    compiled = _flat(many, feed, gear, (INDEX, INDEX, *flags))

    def run(feed: Feed, start: int, stop: int, due: np.ndarray | None = None) -> Tree:
        given = [] if due is None else [np.resize(due, capacity)]
        buffers = compiled(feed.arrays, feed.order, start, stop, *given)
        leaves = [buffer.numpy()[: stop - start] for buffer in buffers]
        return keras.tree.pack_sequence_as(trace.outputs, leaves)

    return run
