"""A step on each replica of a `tf.distribute` strategy, each on its part of the batch.

The step stays the one that a single device runs: gradients are summed before an
optimizer gets them, weighted by how many of the batch's examples a replica has, so
that means over parts become the mean over the batch, uneven parts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf
from keras.src.losses import loss as keras_loss
from tensorflow.python.eager import record

from loopscope.backend.base import Step, Tree
from loopscope.errors import UsageError
from loopscope.hooks import Hook, Method, build_optimizer, hooked, owner_of, updates

map_structure = keras.tree.map_structure


@dataclass
class _Part:
    """What one replica has of a batch, and what its step has done so far.

    Attributes:
        share: Of the batch's examples, a number or a scalar of float32.
        within: Whether `value_and_grad` is at work: it weights gradients itself.
        summed: Whether it was: gradients are those of the whole batch.
        scaled: Whether a tape of the user's own has seen a loss of Keras, scaled.
        assigned: Variables with a copy for each replica that were assigned, each with
            its value before.
        counts: What updates metrics, to be called before gradients are exchanged.
        means: Outputs to be exchanged with them.
        totals: Those that were, each with the mean over the batch.
    """

    share: Any
    within: bool = False
    summed: bool = False
    scaled: bool = False
    assigned: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    counts: list[Callable[[], Any]] = field(default_factory=list)
    means: list[Any] = field(default_factory=list)
    totals: dict[int, tuple[Any, Any]] = field(default_factory=dict)


_PART: ContextVar[_Part | None] = ContextVar("part", default=None)


DIVIDED = WeakKeyDictionary[Step, Step]()
"""Steps that `spread` has made, each with the one for rows of this worker alone."""


KNOWN = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def adopt(model: Any, strategy: Any) -> None:
    """Give every variable of a model, and what trains it, a copy for each replica.

    The variables keep their values and their Keras objects. Those that have copies
    already are left alone.

    Raises:
        UsageError: Not a known strategy, or the model was made under another one.
    """
    _refuse_unknown(strategy, "`strategy`")
    made = getattr(model, "_distribute_strategy", None)
    if made not in (None, strategy):
        raise UsageError(
            "Expected a model that was made under no strategy, or under the one that "
            f"is given. Received: a model made under another {type(made).__name__}"
        )
    optimizer = getattr(model, "optimizer", None)
    found = [*model.variables, *getattr(model, "metrics_variables", ())]
    found += list(optimizer.variables) if optimizer is not None else []
    copied = tf.distribute.DistributedValues
    variables = [v for v in found if not isinstance(v.value, copied)]
    variables = list({id(v): v for v in variables}.values())
    values = [v.numpy() for v in variables]
    with strategy.scope():
        for variable, value in zip(variables, values, strict=True):
            variable._initialize(value)
    for part in model._flatten_layers():
        if hasattr(part, "_distribute_strategy"):
            part._distribute_strategy = strategy
            part.train_function = part.test_function = part.predict_function = None
    for part in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if part is not None:
            part._distribution_strategy = strategy


def strategy_of(model: Any) -> Any:
    """The strategy with several replicas that a model was made under, or `None`.

    Raises:
        UsageError: It is none of those that steps are divided under.
    """
    strategy = getattr(model, "_distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync < 2:
        return None
    _refuse_unknown(strategy, "a model made under")
    return strategy


def _refuse_unknown(strategy: Any, what: str) -> None:
    if not isinstance(strategy, KNOWN):
        names = " or a ".join(f"`tf.distribute.{kind.__name__}`" for kind in KNOWN)
        raise UsageError(
            f"Expected a model made under a {names}, or under none. "
            f"Received: {what} {type(strategy).__name__}"
        )


def spread(step: Step, strategy: Any) -> Step:
    """The step for a whole batch: each replica takes a part of its rows, in order.

    Floating outputs are the mean over all examples, whole numbers the sum, arrays are
    put together. A batch with fewer rows than replicas is not divided.
    """
    here = len(strategy.extended.worker_devices)  # Of this process.
    workers = strategy.num_replicas_in_sync // here
    on_all = _divided(step, strategy, 1)
    DIVIDED[on_all] = _divided(step, strategy, workers)
    return on_all


def _divided(step: Step, strategy: Any, workers: int) -> Step:
    """The step for a batch of which each worker has its own rows, equally many.

    With one worker: for a batch that is there as a whole.
    """
    count = strategy.num_replicas_in_sync // workers

    def on_all(*batch: Any) -> Any:
        here = keras.tree.flatten(batch)[0].shape[0]
        rows = here if here is None else here * workers
        if here is not None and here < count and workers > 1:
            raise UsageError(
                f"Expected at least {count} rows of each batch on a worker, one for "
                f"each of its replicas. Received: {here}"
            )
        if here is not None and here < count:
            return step(*batch)
        parts = [_rows(batch, here, index, count, workers) for index in range(count)]

        def on_one() -> Any:
            context = tf.distribute.get_replica_context()
            index = int(tf.get_static_value(context.replica_id_in_sync_group))
            mine, share = parts[index % count]
            part = _Part(share)
            token = _PART.set(part)
            try:
                outputs = step(*mine)
            finally:
                _PART.reset(token)
            return _settle(part, outputs)

        with _hooked():
            outputs = strategy.run(on_one)
        return map_structure(lambda leaf: _joined(leaf, rows, strategy), outputs)

    on_all.__module__ = getattr(step, "__module__", "")
    return on_all


@contextmanager
def differentiating() -> Iterator[None]:
    """A block of `value_and_grad`, whose losses stay means over a replica's rows."""
    part = _PART.get()
    if part is None or part.within:
        yield
        return
    part.within = True
    try:
        yield
    finally:
        part.within = False


def gradient(tape: Any, loss: Any, variables: Sequence[Any]) -> list[Any]:
    """The gradients of the mean over the batch, of which a replica has a part.

    The loss is weighted, not its gradients: what replicas exchange on the way forward
    (a synchronized BatchNorm) carries the others' losses back as well.
    """
    part = _PART.get()
    if part is None:
        return list(tape.gradient(loss, list(variables)))
    share = tf.cast(part.share, loss.dtype)
    grads = tape.gradient(loss, list(variables), output_gradients=share)
    part.summed = True
    for count in part.counts:
        count()
    assigned, means = _Assigned(part), part.means
    more = [*assigned.addends, *(_part_of(mean, part.share) for mean in means)]
    packed = _Packed(more)
    sums = _all_reduced([*grads, *packed.large, *packed.vectors])
    found, rest = sums[: len(grads)], packed.apart(sums[len(grads) :])
    assigned.settle(rest)
    totals = rest[len(assigned.natives) :]
    part.totals = {id(m): (m, t) for m, t in zip(means, totals, strict=True)}
    return found


def along(count: Callable[[], Any], outputs: Sequence[Any]) -> bool:
    """Have `count` called before gradients are exchanged, and `outputs` with them."""
    part = _PART.get()
    if part is None or not part.within:
        return False
    part.counts.append(count)
    part.means.extend(outputs)
    return True


def _rows(
    batch: tuple[Tree, ...], rows: int | None, index: int, count: int, workers: int
) -> tuple[tuple[Tree, ...], Any]:
    """The rows of one replica, and their share; `workers` have equally many `rows`."""
    first = keras.tree.flatten(batch)[0]
    whole = rows if rows is not None else tf.shape(first)[0]
    start, stop = whole * index // count, whole * (index + 1) // count
    part = map_structure(lambda leaf: leaf[start:stop], batch)
    if rows is not None:
        return part, (stop - start) / (rows * workers)
    return part, tf.cast(stop - start, "float32") / tf.cast(whole * workers, "float32")


def _joined(leaf: Any, rows: int | None, strategy: Any) -> Any:
    """The arrays of all replicas in order; of numbers, which are alike, the first.

    Arrays have a row for each example of the batch, of which there are `rows`.
    """
    first, *_ = values = strategy.experimental_local_results(leaf)
    if not tf.is_tensor(first) or not first.shape.rank:
        return first
    if strategy.extended._in_multi_worker_mode():
        return tf.ensure_shape(strategy.gather(leaf, 0), [rows, *first.shape[1:]])
    return tf.concat(values, 0)


TOGETHER_BYTES = 2**16
"""Up to so many bytes a tensor is sent with others, in one message.

A message costs a fraction of a millisecond whatever it holds; larger ones are not worth
a copy.
"""


def _summed(parts: Sequence[Any]) -> list[Any]:
    """The sums over all replicas, in as few messages as may be."""
    context, add = tf.distribute.get_replica_context(), tf.distribute.ReduceOp.SUM
    packed = _Packed(parts)
    sums = list(context.all_reduce(add, packed.large)) if packed.large else []
    return packed.apart([*sums, *(context.all_reduce(add, v) for v in packed.vectors)])


class _Packed:
    """Small tensors put together, one vector of each dtype; large ones as they are.

    Attributes:
        large: Those.
        vectors: Of the others.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._alone: list[int] = []
        by_dtype: dict[Any, list[int]] = {}
        for index, part in enumerate(parts):
            sparse = isinstance(part, tf.IndexedSlices)
            size = None if sparse else part.shape.num_elements()
            if size is None or size * part.dtype.size > TOGETHER_BYTES:
                self._alone.append(index)
            else:
                by_dtype.setdefault(part.dtype, []).append(index)
        self._together = list(by_dtype.values())
        self._shapes = {i: parts[i].shape for among in self._together for i in among}
        self.large = [parts[i] for i in self._alone]
        self.vectors = [self._vector([parts[i] for i in a]) for a in self._together]

    def _vector(self, tensors: Sequence[Any]) -> Any:
        if all(not tensor.shape.rank for tensor in tensors):
            return tf.stack(tensors)  # In one operation.
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)

    def apart(self, sums: Sequence[Any]) -> list[Any]:
        """What has become of each tensor: `sums` are of `large`, then of `vectors`."""
        count = len(self._alone)
        found = dict(zip(self._alone, sums[:count], strict=True))
        for among, vector in zip(self._together, sums[count:], strict=True):
            shapes = [self._shapes[i] for i in among]
            if all(not shape.rank for shape in shapes):
                found.update(zip(among, tf.unstack(vector), strict=True))
                continue
            pieces = tf.split(vector, [shape.num_elements() for shape in shapes])
            for i, piece, shape in zip(among, pieces, shapes, strict=True):
                found[i] = tf.reshape(piece, shape)
        return [found[index] for index in range(len(found))]


def _all_reduced(grads: Sequence[Any]) -> list[Any]:
    context, add = tf.distribute.get_replica_context(), tf.distribute.ReduceOp.SUM
    there = [g for g in grads if g is not None]  # TensorFlow packs what it is given.
    found = iter(context.all_reduce(add, there) if there else ())
    return [None if g is None else next(found) for g in grads]


def _loss_scaled(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keras's losses divide by the number of replicas: by a replica's share instead."""

    def scale(value: Any) -> Any:
        part = _PART.get()
        if part is None:
            return real(value)
        if part.within or not record.could_possibly_record():
            return value
        part.scaled = True
        return value * tf.cast(part.share, value.dtype)

    return scale


def _loss_unscaled(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def unscale(value: Any) -> Any:
        part = _PART.get()
        if part is None:
            return real(value)
        return value / tf.cast(part.share, value.dtype) if part.scaled else value

    return unscale


def _before_clipping(real: Method) -> Method:
    """Sum what an own tape has given; Keras itself does so after it has clipped."""

    def apply(optimizer: Any, grads: Any, variables: Any) -> Any:
        part, grads = _PART.get(), list(grads)
        if part is not None and not part.summed:
            grads = _all_reduced(grads)
        if part is not None and _APPLIED is not None:
            context = tf.distribute.get_replica_context()
            if tf.get_static_value(context.replica_id_in_sync_group) == 0:
                _APPLIED.extend(g for g in grads if g is not None)
        return real(optimizer, grads, variables)

    return apply


_APPLIED: list[Any] | None = None
"""Where the gradients of divided steps are kept, if anybody asks for them."""


@contextmanager
def applied() -> Iterator[list[Any]]:
    """A block; the list fills with the gradients that steps apply eagerly in it."""
    global _APPLIED
    found: list[Any] = []
    _APPLIED = found
    try:
        yield found
    finally:
        _APPLIED = None


def _as_they_are(real: Method) -> Method:
    def reduce(optimizer: Any, grads_and_vars: Any) -> Any:
        return list(grads_and_vars)

    return reduce


def _built_before(real: Method) -> Method:
    """Slots are made outside of the replicas, for all of them at once."""

    def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
        def build(strategy: Any) -> None:
            with tf.init_scope(), strategy.scope():
                build_optimizer(optimizer, list(trainable_variables))

        if _PART.get() is not None and not optimizer.built:
            tf.distribute.get_replica_context().merge_call(build)
        return real(optimizer, grads, trainable_variables)

    return apply


def _noted(real: Method) -> Method:
    """Note what each replica keeps for itself: metrics, statistics of BatchNorm."""

    def assign(variable: Any, value: Any) -> Any:
        part, native = _PART.get(), variable._value
        copied = isinstance(native, tf.distribute.DistributedValues)
        if part is not None and copied and id(native) not in part.assigned:
            with _COPIES:
                settled(native)
            part.assigned[id(native)] = native, tf.identity(native)
        return real(variable, value)

    return assign


ON_READ = tf.VariableSynchronization.ON_READ
FIRST = tf.VariableAggregation.ONLY_FIRST_REPLICA

_COPIES = Lock()
"""Replicas of one process are threads: one of them at a time looks at a variable."""


def settled(native: Any) -> Any:
    """A variable that adds up what the replicas have, with the sum on each of them.

    TensorFlow sums such a variable whenever it is read, over all processes, which all
    of them would have to do at once; and divides what is assigned, which rounds. With
    the sum on each replica the first one's copy is the value.
    """
    adds_up = (
        getattr(native, "synchronization", None) == ON_READ
        and native.aggregation == tf.VariableAggregation.SUM
    )
    if adds_up:
        with tf.init_scope():
            total = tf.add_n([tf.identity(copy) for copy in native.values])
            for copy in native.values:
                copy.assign(total)
        native._aggregation = FIRST
    return native


def first(native: Any) -> Any:
    """The first replica's copy of a variable, which has its value.

    To read it as a plain variable takes a tenth of the time of `read_value`, which
    looks for the replica that it is called in.
    """
    return settled(native).values[0]


class _Assigned:
    """What one replica has assigned since variables had one value on all of them.

    What each has added to a metric is to be summed. Where each has its own, as
    BatchNorm has its moving statistics, all are to get the mean.

    Args:
        part: The replica's; it begins anew.
    """

    def __init__(self, part: _Part) -> None:
        self.natives: list[Any] = []
        self.addends: list[Any] = []
        self._before: list[Any] = []
        for native, was in part.assigned.values():
            own, sync = tf.identity(native), getattr(native, "synchronization", None)
            if sync == ON_READ and not native.dtype.is_bool:
                self.addends.append(own - was)
                self._before.append(was)
            elif (
                native.aggregation == tf.VariableAggregation.NONE
                and native.dtype.is_floating
            ):
                self.addends.append(own * tf.cast(part.share, native.dtype))
                self._before.append(None)
            else:
                continue
            self.natives.append(native)
        part.assigned.clear()

    def settle(self, sums: Sequence[Any]) -> None:
        """Assign what all replicas have together: the first of these sums."""
        found = zip(self.natives, self._before, sums, strict=False)
        for native, was, total in found:
            native.assign(total if was is None else was + total)


def _settle(part: _Part, outputs: Any) -> Any:
    """Make one value of what the replicas have: of each variable, and each output.

    Called on each of them, when its step is over. Outputs that are arrays stay as they
    are.
    """
    assigned = _Assigned(part)
    # A loss that was scaled for a tape is a part of the mean, and not a mean.
    weight = 1.0 if part.scaled else part.share
    leaves = keras.tree.flatten(outputs)
    for i, leaf in enumerate(leaves):
        if id(leaf) in part.totals:
            leaves[i] = part.totals[id(leaf)][1]
    known = {id(total) for _, total in part.totals.values()}
    numbers = [
        i
        for i, v in enumerate(leaves)
        if tf.is_tensor(v) and not v.shape.rank and id(v) not in known
    ]
    addends = [_part_of(leaves[i], weight) for i in numbers]
    sums = _summed([*assigned.addends, *addends])
    assigned.settle(sums)
    for i, total in zip(numbers, sums[len(assigned.natives) :], strict=True):
        leaves[i] = total > 0 if leaves[i].dtype.is_bool else total
    return keras.tree.pack_sequence_as(outputs, leaves)


def _part_of(number: Any, weight: Any) -> Any:
    """What a replica's output adds to the one of all."""
    if number.dtype.is_bool:
        return tf.cast(number, "int32")
    floating = number.dtype.is_floating
    return number * tf.cast(weight, number.dtype) if floating else number


def assign(native: Any, value: Any) -> None:
    """Set a variable that has a copy for each replica, outside of any step."""
    settled(native).assign(value)


HOOKS = (
    ("_backend_apply_gradients", _before_clipping),
    ("_all_reduce_sum_gradients", _as_they_are),
)


@contextmanager
def _hooked() -> Iterator[None]:
    optimizer = keras.optimizers.Optimizer
    methods: list[Hook] = [
        *updates(_built_before),
        (owner_of(keras.Variable, "assign"), "assign", _noted),
        *((owner_of(optimizer, name), name, around) for name, around in HOOKS),
    ]
    names = ("scale_loss_for_distribution", "unscale_loss_for_distribution")
    real = [getattr(keras_loss, name) for name in names]
    keras_loss.scale_loss_for_distribution = _loss_scaled(real[0])
    keras_loss.unscale_loss_for_distribution = _loss_unscaled(real[1])
    try:
        with hooked(methods, also=lambda: _PART.get() is not None):
            yield
    finally:
        for name, function in zip(names, real, strict=True):
            setattr(keras_loss, name, function)


__all__ = [
    "DIVIDED",
    "adopt",
    "along",
    "applied",
    "assign",
    "differentiating",
    "first",
    "gradient",
    "settled",
    "spread",
    "strategy_of",
]
