"""A step of PyTorch on each worker of a team, each on its part of the batch.

The step stays the one that a single process runs: gradients are summed before an
optimizer gets them, weighted by how many of the batch's examples a worker has, so
that means over parts become the mean over the batch, uneven parts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import keras
import torch
from keras.src.backend.common.stateless_scope import (
    get_stateless_scope,
    in_stateless_scope,
)
from torch.nn.parallel import DistributedDataParallel

from loopscope.backend.base import Step, Tree
from loopscope.backend.torch_workers import Workers
from loopscope.hooks import Hook, Method, hooked, owner_of, updates

map_structure = keras.tree.map_structure


@dataclass
class _Part:
    """What one worker has of a batch, and what its step has done so far.

    Attributes:
        workers: The team.
        share: Of the batch's examples.
        summed: Whether gradients were: those of the whole batch.
        updating: Whether an optimizer is at work, the same on all workers.
        inside: Whether a variable is being assigned.
        differentiating: Whether the engine is at work: it may call itself.
        adding: Whether it is being added to.
        counted: Variables that add up (a metric's), assigned and not yet summed; each
            with the value that it had, or `None` if that counts no more.
        read: Those whose value was read since.
        kept: Other floating variables that were assigned.
        averaged: Parameters whose gradients `DistributedDataParallel` averages.
        counts: What updates metrics, to be called before gradients are exchanged.
        means: Outputs to be exchanged with them.
        totals: Those that were, each with the mean over the batch.
    """

    workers: Workers
    share: float
    summed: bool = False
    updating: bool = False
    inside: bool = False
    differentiating: bool = False
    adding: bool = False
    counted: dict[int, tuple[Any, torch.Tensor | None]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    kept: dict[int, Any] = field(default_factory=dict)
    averaged: set[int] = field(default_factory=set)
    counts: list[Callable[[], Any]] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)
    totals: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @contextmanager
    def flagged(self, name: str) -> Iterator[None]:
        """A block in which one of the flags is set."""
        was = getattr(self, name)
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, was)

    def settle(self, more: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """Give every variable one value; gives the sums of more tensors.

        What adds up gets what all have added. Where each has its own, as BatchNorm has
        its moving statistics, all get the mean.
        """
        counted, kept = list(self.counted.values()), list(self.kept.values())
        with self.flagged("inside"), torch.no_grad():
            mine = [self._added(v, v.value, was) for v, was in counted]
            mine += [v.value * self.share for v in kept]
            sums = self.workers.sum([*mine, *more]) if [*mine, *more] else []
            variables = [*(v for v, _ in counted), *kept]
            for variable, value in zip(variables, sums, strict=False):
                variable.assign(value)
        self.counted.clear()
        self.kept.clear()
        self.read.clear()
        return sums[len(variables) :]

    def _added(self, variable: Any, now: Any, was: torch.Tensor | None) -> Any:
        """What this worker gives to the sum; the chief, what there was before too."""
        return now if was is None or self.workers.rank == 0 else now - was


_PART: ContextVar[_Part | None] = ContextVar("part", default=None)


@dataclass(frozen=True)
class Divided:
    """How a step is executed by several workers.

    Attributes:
        workers: All of them.
        own: The step for batches of which a worker has its own rows alone; `None` if
            it is that.
    """

    workers: Workers
    own: Step | None

    def bounds(self, batch: tuple[Tree, ...]) -> list[int] | None:
        """Where each worker's rows begin in a batch, and their end.

        `None` if there are too few to divide them.
        """
        rows, count = keras.tree.flatten(batch)[0].shape[0], self.workers.size
        if self.own is None:
            return [rows * i for i in range(count + 1)]
        return [rows * i // count for i in range(count + 1)] if rows >= count else None


DIVIDED = WeakKeyDictionary[Step, Divided]()
"""Steps that `spread` has made."""


def spread(step: Step, workers: Workers) -> Step:
    """The step for a whole batch: each worker takes a part of its rows, in order.

    Floating outputs are the mean over all examples, whole numbers the sum, arrays with
    a row for each example are put together. A batch with fewer rows than workers is
    not divided: each computes it whole.
    """
    own = _divided(step, Divided(workers, None))
    return _divided(step, Divided(workers, own))


def _divided(step: Step, how: Divided) -> Step:
    workers = how.workers

    def on_all(*batch: Any) -> Any:
        bounds = how.bounds(batch)
        if bounds is None:
            return step(*batch)
        start, stop = bounds[workers.rank : workers.rank + 2]
        mine: Any = batch
        if how.own is not None:
            mine = map_structure(lambda leaf: leaf[start:stop], batch)
        part = _Part(workers, (stop - start) / bounds[-1])
        token = _PART.set(part)
        try:
            with _hooked():
                return _joined(step(*mine), part, bounds)
        finally:
            _PART.reset(token)

    on_all.__module__ = getattr(step, "__module__", "")
    DIVIDED[on_all] = how
    return on_all


@contextmanager
def running(step: Step, batch: tuple[Tree, ...]) -> Iterator[None]:
    """A block in which a step is executed on a batch, by all workers if it is divided.

    Raises:
        WorkerError: Another worker is gone.
    """
    how = DIVIDED.get(step)
    if how is None:
        yield
        return
    with how.workers.waiting():
        if how.bounds(batch) is None:
            yield
        else:
            with _drawing(how.workers.rank):
                yield


@contextmanager
def _drawing(rank: int) -> Iterator[None]:
    """A block in which workers draw different numbers; they go on from one state."""
    generator = torch.default_generator
    before = generator.get_state()
    seed = int(torch.randint(2**62, (), generator=generator))
    after = generator.get_state()
    own = generator.manual_seed(seed + rank).get_state()
    drawn = True
    try:
        yield
        drawn = not torch.equal(generator.get_state(), own)
    finally:
        generator.set_state(after if drawn else before)


def _joined(outputs: Tree, part: _Part, bounds: list[int]) -> Tree:
    """The outputs of the whole batch; every variable has one value afterwards."""
    rows = [stop - start for start, stop in pairwise(bounds)]
    leaves = keras.tree.flatten(outputs)
    totals = [part.totals.get(id(leaf)) for leaf in leaves]
    known = {i: found[1] for i, found in enumerate(totals) if found is not None}
    added = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
        and leaf.shape[:1] != (rows[part.workers.rank],)
        and i not in known
    ]
    sums = part.settle([_addend(leaves[i], part.share) for i in added])
    for i, total in zip(added, sums, strict=True):
        leaves[i] = total.to(leaves[i].dtype)
    for i, leaf in enumerate(leaves):
        if i in known:
            leaves[i] = known[i].to(leaf.dtype)
        elif isinstance(leaf, torch.Tensor) and i not in added:
            leaves[i] = part.workers.concat(leaf, rows)
    return keras.tree.pack_sequence_as(outputs, leaves)


def _addend(leaf: torch.Tensor, share: float) -> torch.Tensor:
    leaf = leaf.detach()
    if leaf.dtype == torch.bool:
        return leaf.to(torch.int32)  # Whether it is true anywhere.
    return leaf * share if leaf.is_floating_point() else leaf


# Gradients.


def _is_variable(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, torch.nn.Parameter):
        return True
    values = (
        getattr(get_stateless_scope(), "values", ()) if in_stateless_scope() else ()
    )
    return any(tensor is value for value in values)


def _weighted(given: Any, outputs: Sequence[torch.Tensor], weight: float) -> Any:
    """What gradients of outputs begin with, so that they are parts of a mean."""
    if given is None:
        return [torch.full_like(output, weight) for output in outputs]
    several = [given] if isinstance(given, torch.Tensor) else given
    return [None if g is None else g * weight for g in several]


def _grad_of_all(real: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.grad` with respect to variables: of the mean over the batch."""

    def grad(
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        **named: Any,
    ) -> Any:
        part = _PART.get()
        tensors = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        places = [i for i, t in enumerate(tensors) if _is_variable(t)]
        rest = (retain_graph, create_graph)
        if part is None or part.differentiating or create_graph or not places:
            return real(outputs, inputs, grad_outputs, *rest, **named)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        begun = _weighted(grad_outputs, outputs, part.share)
        with part.flagged("differentiating"):
            found = list(real(outputs, tensors, begun, *rest, **named))
        there = [i for i in places if found[i] is not None]
        sums = _exchanged(part, [found[i] for i in there])
        for i, total in zip(there, sums, strict=True):
            found[i] = total
        part.summed = True
        return tuple(found)

    return grad


def _exchanged(part: _Part, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of gradients; with them goes what is to go along, if anything is."""
    if not part.counts:
        return part.workers.sum(gradients)
    counts, means = part.counts, part.means
    part.counts, part.means = [], []
    with torch.no_grad():
        for count in counts:
            count()
    sums = part.settle([*gradients, *(_addend(m, part.share) for m in means)])
    totals = sums[len(gradients) :]
    part.totals = {id(m): (m, t) for m, t in zip(means, totals, strict=True)}
    return sums[: len(gradients)]


def along(count: Callable[[], Any], outputs: Sequence[torch.Tensor]) -> bool:
    """Have `count` called before gradients are exchanged, and `outputs` with them."""
    part = _PART.get()
    if part is None:
        return False
    part.counts.append(count)
    part.means.extend(outputs)
    return True


def detached(value: Tree) -> Tree:
    """The tensors of a value without their past."""
    part = _PART.get()

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        found = leaf.detach()
        if part is not None and id(leaf) in part.totals:
            part.totals[id(found)] = found, part.totals[id(leaf)][1]
        return found

    return map_structure(one, value)


def _backward_of_all(real: Callable[..., Any]) -> Callable[..., Any]:
    """`loss.backward()`, which leaves gradients of the mean over the batch."""

    def backward(
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        **named: Any,
    ) -> None:
        part = _PART.get()
        rest = (retain_graph, create_graph)
        if part is None or part.differentiating or create_graph:
            real(tensors, grad_tensors, *rest, **named)
            return
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        reached = [t for t in _leaves(tensors) if _is_variable(t)]
        ours = [t for t in reached if id(t) not in part.averaged]
        # `DistributedDataParallel` divides its sums by the number of workers.
        times = 1 if len(ours) == len(reached) else part.workers.size
        before = [t.grad for t in ours]
        for tensor in ours:
            tensor.grad = None
        begun = _weighted(grad_tensors, tensors, part.share * times)
        with part.flagged("differentiating"):
            real(tensors, begun, *rest, **named)
        with torch.no_grad():
            there = [i for i, t in enumerate(ours) if t.grad is not None]
            sums = part.workers.sum([ours[i].grad / times for i in there])
            found = dict(zip(there, sums, strict=True))
            for i, tensor in enumerate(ours):
                tensor.grad = _accumulated(before[i], found.get(i))
        part.summed = True

    return backward


def _accumulated(before: Any, new: Any) -> Any:
    """As PyTorch adds to a gradient that is there: in place."""
    if before is None or new is None:
        return before if new is None else new
    return before.add_(new)


def _leaves(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves that `backward` reaches, in an order that all workers have."""
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen, found = set(nodes), []
    while nodes:
        node: Any = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return found


def _before_updating(real: Method) -> Method:
    """Sum what was found by other means (`torch.func.grad`), as that of a mean."""

    def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
        part = _PART.get()
        if part is None or part.updating:
            return real(optimizer, grads, trainable_variables)
        grads = list(grads)
        if not part.summed:
            there = [i for i, g in enumerate(grads) if g is not None]
            sums = part.workers.sum([grads[i] * part.share for i in there])
            for i, total in zip(there, sums, strict=True):
                grads[i] = total
        with part.flagged("updating"):
            return real(optimizer, grads, trainable_variables)

    return apply


def _forward_of_all(real: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedDataParallel`: averages by itself, but has no place in a graph."""

    def forward(wrapper: Any, *arguments: Any, **named: Any) -> Any:
        part = _PART.get()
        if part is not None and in_stateless_scope():
            return wrapper.module(*arguments, **named)
        if part is not None:
            part.averaged |= {id(p) for p in wrapper.parameters() if p.requires_grad}
        return real(wrapper, *arguments, **named)

    return forward


# Variables.


def _adds_up(variable: Any) -> bool:
    """Whether a variable is the sum of what workers have: a metric's."""
    return bool(variable.synchronization == "on_read" and variable.aggregation == "sum")


def _noted(real: Method) -> Method:
    """Note what each worker keeps for itself: metrics, statistics of BatchNorm."""

    def assign(variable: Any, value: Any) -> Any:
        part = _PART.get()
        if part is None or part.inside or part.updating:
            return real(variable, value)
        key = id(variable)
        with part.flagged("inside"):
            if not _adds_up(variable):
                if variable.value.is_floating_point():
                    part.kept[key] = variable
            elif not part.adding and key not in part.read:
                # Set to what has nothing to do with what it was.
                part.counted[key] = (variable, None)
            elif key not in part.counted:
                part.counted[key] = (variable, variable.value.detach().clone())
            part.read.discard(key)
            return real(variable, value)

    return assign


def _added(real: Method) -> Method:
    def add(variable: Any, value: Any) -> Any:
        part = _PART.get()
        if part is None:
            return real(variable, value)
        with part.flagged("adding"):
            return real(variable, value)

    return add


def _value_of_all(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What a metric has counted is summed before it is read."""

    def value(variable: Any) -> Any:
        part = _PART.get()
        if part is not None and not part.inside and _adds_up(variable):
            if id(variable) in part.counted and not part.adding:
                part.settle()
            part.read.add(id(variable))
        return real(variable)

    return value


@contextmanager
def _hooked() -> Iterator[None]:
    """Hear what variables, optimizers and the engine are called with, for a step."""
    variable = keras.Variable
    methods: list[Hook] = [
        *updates(_before_updating),
        *(
            (owner_of(variable, name), name, around)
            for name, around in (
                ("assign", _noted),
                ("assign_add", _added),
                ("assign_sub", _added),
            )
        ),
    ]
    owner: Any = owner_of(variable, "value")
    engine: Any = torch.autograd
    wrapper: Any = DistributedDataParallel
    real = [
        (owner, "value", owner.value),
        (engine, "grad", engine.grad),
        (engine, "backward", engine.backward),
        (wrapper, "forward", wrapper.forward),
    ]
    owner.value = property(_value_of_all(owner.value.fget))
    engine.grad = _grad_of_all(engine.grad)
    engine.backward = _backward_of_all(engine.backward)
    wrapper.forward = _forward_of_all(wrapper.forward)
    try:
        with hooked(methods, also=lambda: _PART.get() is not None):
            yield
    finally:
        for holder, name, old in real:
            setattr(holder, name, old)


__all__ = ["DIVIDED", "along", "detached", "running", "spread"]
