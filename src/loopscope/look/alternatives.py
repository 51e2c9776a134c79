"""What a loss would have been, had the step before it been another one: measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from loopscope.data.feed import Segment
from loopscope.gear import Gear
from loopscope.look.opening import executed
from loopscope.look.probe import Probe
from loopscope.look.seen import scalars
from loopscope.runner import Runner
from loopscope.step import loss_of


@dataclass(frozen=True)
class Alternative:
    """A step, had it been run otherwise.

    Attributes:
        kind: What was changed: nothing, the learning rate, or the gradients.
        loss: Of the step that came after it, on that step's own batch.
        norm: To which global norm gradients were clipped; `None` if they were not.
    """

    kind: Literal["same", "half_rate", "clipped"]
    loss: float | None
    norm: float | None = None

    @property
    def change(self) -> str:
        """What was changed, in words."""
        if self.kind == "clipped":
            return f"with gradients clipped to a global norm of {self.norm:.3g}"
        return "as it was" if self.kind == "same" else "at half the learning rate"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "change": self.change}


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
    tried: list[tuple[Alternative, Callable[[], Any]]] = [
        (Alternative("same", None), nullcontext),
        (Alternative("half_rate", None), lambda: _learning_rate(0.5)),
    ]
    if clipnorm is not None:
        clipped = Alternative("clipped", None, clipnorm)
        tried.append((clipped, lambda: _clipped(clipnorm)))
    state = runner.state
    found = []
    with state.kept():
        for made, change in tried:
            state.restore(list(before))
            with change():
                _run(runner, segments[0], gear)
            outputs = _run(runner, segments[1], gear)
            found.append(replace(made, loss=loss_of(outputs)))
    return found


def _run(runner: Runner, segment: Segment, gear: Gear | None) -> dict[str, float]:
    probe = Probe(runner.backend, [], list)
    return scalars(executed(runner, segment, gear, probe)[0])


def _learning_rate(factor: float) -> AbstractContextManager[None]:
    """Every optimizer takes a part of its learning rate."""
    return _with_result("_get_current_learning_rate", lambda rate: rate * factor)


def _clipped(norm: float) -> AbstractContextManager[None]:
    """Every optimizer gets its gradients clipped, all together."""
    from keras.src.optimizers.base_optimizer import clip_by_global_norm

    return _with_result(
        "_clip_gradients", lambda grads: clip_by_global_norm(grads, norm)
    )


@contextmanager
def _with_result(name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """A block in which a method of every optimizer returns something else."""
    import keras

    kinds = keras.optimizers.Optimizer.__mro__
    owner = next(kind for kind in kinds if name in vars(kind))
    real = vars(owner)[name]
    setattr(owner, name, lambda *arguments: change(real(*arguments)))
    try:
        yield
    finally:
        setattr(owner, name, real)
