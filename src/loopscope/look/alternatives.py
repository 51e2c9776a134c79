"""What a loss would have been, had the step before it been another one: measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loopscope.data.feed import Segment
from loopscope.gear import Gear
from loopscope.look.opening import executed
from loopscope.look.probe import Probe
from loopscope.look.seen import scalars
from loopscope.runner import Runner


@dataclass(frozen=True)
class Alternative:
    """A step, had it been run otherwise.

    Attributes:
        change: What was changed, in words.
        loss: Of the step that came after it, on that step's own batch.
    """

    change: str
    loss: float | None


def alternatives(
    runner: Runner,
    before: Sequence[Any],
    segments: tuple[Segment, Segment],
    *,
    gear: Gear | None,
    clipnorm: float | None,
) -> list[Alternative]:
    """Run a step as it was and otherwise; each time, the loss of the one after it.

    Executes six steps eagerly, and sets the state back.

    Args:
        runner: Has the train step.
        before: A snapshot of the state before the step.
        segments: The data of the step, and of the one after it.
        gear: In which training runs them.
        clipnorm: To clip all gradients together to; not tried if `None`.
    """
    tried: list[tuple[str, Callable[[], Any]]] = [
        ("as it was", _unchanged),
        ("at half the learning rate", lambda: _learning_rate(0.5)),
    ]
    if clipnorm is not None:
        words = f"with gradients clipped to a global norm of {clipnorm:.3g}"
        tried.append((words, lambda: _clipped(clipnorm)))
    state = runner.state
    found = []
    with state.kept():
        for words, change in tried:
            state.restore(list(before))
            with change():
                _run(runner, segments[0], gear)
            outputs = _run(runner, segments[1], gear)
            loss = outputs.get("loss", next(iter(outputs.values()), None))
            found.append(Alternative(words, loss))
    return found


def _run(runner: Runner, segment: Segment, gear: Gear | None) -> dict[str, float]:
    probe = Probe(runner.backend, [], list)
    return scalars(executed(runner, segment, gear, probe)[0])


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


@contextmanager
def _learning_rate(factor: float) -> Iterator[None]:
    """Every optimizer takes a part of its learning rate."""
    owner, name = _base("_get_current_learning_rate")
    real = vars(owner)[name]
    setattr(owner, name, lambda optimizer: real(optimizer) * factor)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextmanager
def _clipped(norm: float) -> Iterator[None]:
    """Every optimizer gets its gradients clipped, all together."""
    from keras.src.optimizers.base_optimizer import clip_by_global_norm

    owner, name = _base("_clip_gradients")
    real = vars(owner)[name]

    def clip(optimizer: Any, grads: Any) -> Any:
        return clip_by_global_norm(real(optimizer, grads), norm)

    setattr(owner, name, clip)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _base(name: str) -> tuple[type, str]:
    """The class of Keras's optimizers that has a method."""
    import keras

    kinds = keras.optimizers.Optimizer.__mro__
    return next(kind for kind in kinds if name in vars(kind)), name
