"""The protocol between the loop and a framework.

A backend knows how to hold arrays, how to trace a step, and how to make a
program out of a step for each of its gears. It knows nothing of epochs,
metrics, callbacks or files.

A new backend is one file that passes tests/test_backend_contract.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from loopscope.cluster import Place
from loopscope.data.feed import Feed, Native, Spec
from loopscope.gear import Gear

Array = Any
"""A device array of the framework in use."""

Tree = Any
"""A nest of dicts, lists and tuples with one kind of leaf."""

Step = Callable[..., Any]
"""Takes the parts of one batch, returns a scalar or a dict of scalars."""


@dataclass(frozen=True)
class Trace:
    """What one symbolic execution of a step has shown.

    Attributes:
        outputs: The step's return value with a `Spec` for each tensor. A leaf
            that is no tensor is passed through as it came.
        variables: Every variable the step reads or writes, in order of first
            use; Keras variables where Keras knows them, else the framework's.
        handle: Whatever the backend wants back in `program` (a traced function).
    """

    outputs: Tree
    variables: tuple[Any, ...]
    handle: Any


class Program(Protocol):
    """A step made executable over a feed, in one gear."""

    def __call__(
        self, feed: Feed, start: int, stop: int, due: np.ndarray | None = None
    ) -> Tree:
        """Run steps `start` to `stop` (not included) of the feed.

        Reads and writes the live variables. Returns the step's output with
        every leaf stacked into a NumPy array of shape `(stop - start, ...)`;
        waits for the device. `due`, of shape `(stop - start,)` and dtype bool, is
        given to a watched program only.
        """
        ...


class Observer(Protocol):
    """Takes notes while a step runs eagerly; told what only the framework can see."""

    def wanted(self) -> list[Array]:
        """Arrays so far with respect to which gradients are wanted as well."""
        ...

    def differentiated(
        self, wanted: Sequence[Array], gradients: Sequence[Array | None]
    ) -> None:
        """Gradients with respect to what was wanted; `None` where none flows."""
        ...

    def computed(
        self,
        name: str,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
        *,
        place: tuple[str, str] | None = None,
    ) -> None:
        """An operation was executed: its floating inputs and outputs.

        `place` is the path of its layer and its phase, where it was not executed just
        now.
        """
        ...

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Count the time of a block for `"forward"`, `"backward"` and so on."""
        ...

    compiled: bool
    """Whether the step may be compiled: values are asked for when it is over."""

    forward_only: bool
    """Whether no gradient and no update is asked for, so that none is compiled."""

    def noted(self) -> list[Any]:
        """What notes were taken of, arrays among it."""
        ...

    def resolved(self, values: Sequence[Any]) -> None:
        """As `noted`, with arrays in the place of what stood for them."""
        ...


class Audience(Protocol):
    """Watches a script that is run in a framework."""

    def shuffled(self, buffer: int, size: int, after_batch: bool) -> None:
        """A pipeline of `size` elements (negative: unknown) is shuffled."""
        ...

    def made(self, name: str) -> None:
        """A function was made that is to run compiled."""
        ...

    def averaged(self, replicas: int, examples: int) -> None:
        """One of several replicas differentiates the mean over its own examples."""
        ...

    def called_compiled(self) -> AbstractContextManager[None]:
        """A block in which such a function is called."""
        ...


class Team(Protocol):
    """The processes that train one model together: each runs the same loop."""

    rank: int
    """Of this process; 0 is the chief."""

    size: int

    def agree(self, message: bytes) -> bytes:
        """What the chief has given, on every worker.

        All of them call it, in the same order; each waits for the others.
        """
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """What each worker has given, by rank; equally many bytes on all of them."""
        ...

    def lost(self, error: Exception) -> bool:
        """Whether this is what the framework says when a worker is gone."""
        ...


class Alone:
    """One process, which agrees with itself."""

    rank, size = 0, 1

    def agree(self, message: bytes) -> bytes:
        """What was given."""
        return message

    def gather(self, data: bytes) -> list[bytes]:
        """What was given."""
        return [data]

    def lost(self, error: Exception) -> bool:
        """Nobody can be lost."""
        return False


class Backend(Protocol):
    """One framework, as the loop sees it."""

    name: str
    gears: tuple[Gear, ...]
    """In the order in which `auto` tries them: the surest first.

    Eager is tried only where it comes first.
    """

    lacking: Mapping[str, str]
    """Why there is no other gear, by its name."""

    packages: tuple[str, ...]
    """The packages whose versions the bits of a step depend on."""

    loosens: bool
    """Whether a program can leave axes of a `"whole"` feed open."""

    runs_eagerly_at_once: bool
    """Whether an operation runs eagerly without being compiled before.

    Where not, a step that is observed can be compiled as a whole: `Observer.compiled`.
    """

    def device(self) -> str:
        """The device that steps run on, in words."""
        ...

    def threads(self) -> dict[str, int]:
        """How many threads compute a step, by what they are for."""
        ...

    def flags(self) -> dict[str, str]:
        """Settings of this process that change how numbers are computed."""
        ...

    def random_stream(self, gear: Gear) -> str:
        """Names the random numbers that a gear draws; equal names, equal numbers."""
        ...

    def random_state(self) -> list[Any]:
        """What random numbers are drawn from that is in no variable of Keras.

        Each stands for a variable where the state is read and assigned.
        """
        ...

    def is_tensor(self, value: Any) -> bool:
        """Whether `value` is an array of this framework."""
        ...

    def is_concrete(self, value: Any) -> bool:
        """Whether `value` can be read now, and does not only stand for an array."""
        ...

    def is_floating(self, value: Any) -> bool:
        """Whether `value` is an array of floating numbers."""
        ...

    def dense(self, gradient: Any) -> Array:
        """A gradient as an array, if it came as some rows of one."""
        ...

    def level(self) -> Any:
        """Where arrays are made now; one made at an equal level can be used there.

        Another one in the branch of a `cond`, in the body of a loop, and on some
        frameworks where a function is differentiated.
        """
        ...

    def place(self, array: Any) -> Array:
        """Bring a NumPy array (or a tensor of the framework) to the device."""
        ...

    def to_numpy(self, array: Array) -> np.ndarray:
        """Copy to the host. Waits for the device."""
        ...

    def adopt(self, model: Any, strategy: Any) -> None:
        """Move a model that is there already onto the devices of a strategy.

        Raises:
            UsageError: No such strategy; nothing was moved.
        """
        ...

    def distribution(self, model: Any) -> AbstractContextManager[Any] | None:
        """Where variables of a model with several replicas are made, or `None`."""
        ...

    def spread(self, step: Step, model: Any) -> Step:
        """The step, for a whole batch, on all replicas that a model was made for.

        Where there is but one, or the framework divides batches by itself, the step.
        """
        ...

    def of_workers(self, feed: Feed) -> Feed:
        """A feed on the device, made by all workers, each with its own rows.

        Args:
            feed: Arrays of this worker on the host, of kind `"slice"`; its
                `batch_size` and `specs` are those of the whole batch, `parts` is set.

        Raises:
            UsageError: The rows cannot lie on the devices so.
        """
        ...

    def along(self, count: Callable[[], Any], outputs: Sequence[Array]) -> bool:
        """Have metrics and outputs of a step exchanged along with its gradients.

        Called in a function that is differentiated, for one message less a step.

        Args:
            count: Updates metrics; called before gradients are exchanged.
            outputs: Scalars, means over the examples, that the step will return.

        Returns:
            Whether that will be; if not, `count` has still to be called.
        """
        ...

    def applied(self) -> AbstractContextManager[list[Array]]:
        """A block; the list fills with the gradients that divided steps apply in it."""
        ...

    def in_first_replica(self) -> bool:
        """Whether this is the first of several replicas that run one step."""
        ...

    def team(self, model: Any) -> Team:
        """The processes that train a model together; `Alone` where it is but one."""
        ...

    def join(self, place: Place) -> AbstractContextManager[None]:
        """A block that makes what all workers train, of which this is one.

        Waits for the others. Once in a process.
        """
        ...

    def batches(self, adapter: Any) -> Iterable[Any]:
        """The batches of one of Keras's data adapters, as this framework takes them."""
        ...

    def native(self, value: Any) -> Native | None:
        """A leaf of a batch that is no dense array of numbers; `None` if it is one.

        Sparse and ragged arrays and text, of this framework or of another that Keras
        takes, become this framework's own.
        """
        ...

    def read(self, variable: Any) -> Array:
        """A value of `variable` that later steps do not change."""
        ...

    def assign(self, variable: Any, value: Any) -> None:
        """Set `variable` to `value`, outside of any step.

        `value` is an array of the framework or of NumPy, whose memory is not shared.
        """
        ...

    def same(self, a: Array, b: Array) -> bool:
        """Whether two reads of a variable surely have the same bits.

        Looks at where they lie, not at what they hold: `False` may mean only that the
        variable was assigned in between.
        """
        ...

    def live_bytes(self) -> int:
        """Bytes of all arrays that are alive. Looks through all objects: slow."""
        ...

    def trace(
        self, step: Step, batch: tuple[Tree, ...], known: Callable[[], Sequence[Any]]
    ) -> Trace:
        """Execute `step` symbolically on a batch of `Spec`s.

        Builds what is not yet built; changes no value of any variable. `known`
        lists Keras's variables; it is asked again afterwards.
        """
        ...

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
        """Make `step` executable over feeds like `feed`.

        Args:
            step: The step.
            gear: One of `gears`.
            feed: A feed of the kind and shapes that the program will get.
            trace: What `trace` gave for this batch; `None` for the eager gear.
            variables: Every variable of the state, in order.
            capacity: The most steps of one call.
            watched: Whether `step` takes, before the parts of a batch, whether its
                signals are due: a Python bool in gear eager, else a scalar.
        """
        ...

    def model_step(self, model: Any, phase: str) -> Step:
        """A model's own `train_step`, `test_step` or `predict_step` as a step.

        Takes the data of a batch as Keras's `fit` gives them; returns the logs (of
        `predict_step`, the outputs). Where Keras's own signature is stateless, the
        variables are read before and assigned after.
        """
        ...

    def value_and_grad(
        self, fn: Callable[[], Any], variables: Sequence[Any], has_aux: bool
    ) -> tuple[Any, list[Any]]:
        """The value of `fn()` and its gradients, inside a step."""
        ...

    unseen: tuple[str, ...]
    """What an observer is not told on this framework, each with the reason."""

    def observed(
        self, observer: Observer, gear: Gear | None
    ) -> AbstractContextManager[None]:
        """Tell an observer what is computed eagerly within a block.

        Random numbers are drawn as `gear` draws them, as far as that can be done.
        """
        ...

    def scripted(self, audience: Audience) -> AbstractContextManager[None]:
        """A block in which functions that would run compiled run eagerly.

        The audience is told of them, and of pipelines that are shuffled.
        """
        ...


def cut(
    feed: Feed,
    arrays: Tree,
    order: Array | None,
    index: Any,
    *,
    rows: Callable[[Array, Array], Array],
    window: Callable[[Array, Any, int], Array],
    map_structure: Callable[..., Tree],
) -> tuple[Tree, ...]:
    """Cut the batch of step `index` out of a feed; `index` may be traced.

    Args:
        feed: Says how (its arrays are not used: they may be traced).
        arrays: The feed's arrays.
        order: The feed's order.
        index: The step's position in the feed.
        rows: `rows(array, indices)`, a gather along the first axis.
        window: `window(array, start, size)`, a slice along the first axis.
        map_structure: The framework's `tree.map_structure`.
    """
    size = feed.rows
    if feed.kind == "whole":
        batch = arrays
    elif feed.kind == "stack":
        batch = map_structure(lambda leaf: window(leaf, index, 1)[0], arrays)
    elif feed.kind == "take":
        indices = window(order, index * size, size)
        batch = map_structure(lambda leaf: rows(leaf, indices), arrays)
    else:
        batch = map_structure(lambda leaf: window(leaf, index * size, size), arrays)
    return tuple(batch)


def due_at(due: np.ndarray | None, position: int) -> tuple[bool, ...]:
    """What a step at this position of a call takes before its batch."""
    return () if due is None else (bool(due[position]),)


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def no_gradient(variables: Sequence[Any]) -> str:
    """The error text for a loss that none of these variables reaches."""
    trainable = {id(v): v for v in variables if v.trainable}.values()
    paths = [str(getattr(v, "path", v.name)) for v in trainable]
    return (
        "No trainable variable reaches the loss, so there is no gradient to apply. "
        "Expected a loss computed by Keras or backend operations from the output of "
        "a model with trainable variables (NumPy, `stop_gradient` and "
        "`trainable=False` cut the way). "
        f"Received: variables={paths}"
    )


__all__ = [
    "Alone",
    "Audience",
    "Backend",
    "Feed",
    "Observer",
    "Program",
    "Spec",
    "Step",
    "Team",
    "Trace",
    "cores",
    "cut",
    "due_at",
    "no_gradient",
]
