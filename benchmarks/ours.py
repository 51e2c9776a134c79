"""loopscope: each gear, `auto`, and what lies around the bare loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peer import PausedFit, Peer
from workloads import Training, Workload, mnist_validation


def loop_of(training: Training, gear: str) -> Any:
    """A loop around what is to be trained, as every measurement makes it."""
    from loopscope import Loop

    return Loop(
        training.model,
        training.optimizer,
        training.loss,
        [training.metric],
        gear=gear,
        seed=0,
        cache=False,
    )


class Ours:
    """`Loop.epochs` with the training part of an epoch, as a user writes it.

    With `gear="auto"` the choice is made when the peer is made, for a training of
    some minutes and without the cache.
    """

    def __init__(self, workload: Workload, gear: str) -> None:
        self._workload = workload
        self._training = training = Training(workload)
        self.loop = loop_of(training, gear)
        self._reasons: list[str] = []
        self.loop.subscribe(self._hear)
        eager = gear == "eager"
        self.steps = workload.eager_steps if eager else workload.steps
        x, y = workload.data
        size = workload.batch_size
        self.source = self.loop.source(x, y, batch_size=size)
        self._in_order = self.loop.source(x, y, batch_size=size, shuffle=False)
        epochs = max(1, workload.horizon // workload.steps)
        self.loop.prepare("train", self.source, epochs_left=epochs)
        self._epochs = self.loop.epochs(10**9)

    def _hear(self, event: Any) -> None:
        if type(event).__name__ == "GearChosen":
            self._reasons.append(f"{event.reason}; chosen in {event.wall_s:.1f} s")

    def first_loss(self) -> float:
        self.restore()
        epoch = next(self._epochs)
        for step in epoch.train(self._in_order, every=1, steps=1):
            loss = step.loss
        return loss

    def epoch(self) -> float:
        epoch = next(self._epochs)
        for _ in epoch.train(self.source, every=None, steps=self.steps):
            pass
        return float(epoch.metrics["loss"])

    def restore(self) -> None:
        self._training.restore()

    def about(self) -> str:
        gear = self.loop.gear
        assert gear is not None
        return "; ".join([gear.name, *self._reasons])

    def close(self) -> None:
        self._epochs.close()


def _shared(workload: Workload) -> Ours:
    """One loop for all that lie around it: the same programs in the same memory."""
    if workload.name not in _SHARED:
        _SHARED[workload.name] = Ours(workload, FUSED)
    return _SHARED[workload.name]


_SHARED: dict[str, Ours] = {}


class Bare:
    """The bare fused loop: chunks of steps, and nothing around them.

    No metric is reset or read, no event is sent.

    Args:
        workload: What to train.
        validation: Whether the chunks of the validation data follow.
    """

    def __init__(self, workload: Workload, *, validation: bool) -> None:
        self._ours = _shared(workload)
        self.steps = workload.steps
        self._loop = loop = self._ours.loop
        self._sources = [("train", self._ours.source)]
        if validation:
            x, y = mnist_validation()
            source = loop.source(x, y, batch_size=workload.batch_size, shuffle=False)
            loop.prepare("test", source)
            self._sources.append(("test", source))
        self._count = 0

    def first_loss(self) -> float:
        return self._ours.first_loss()

    def epoch(self) -> float:
        runner, gear = self._loop._runner, self._loop.gear
        total = 0.0
        for phase, source in self._sources:
            data = source.open(self._count)
            while segment := data.take(runner.capacity(phase, source.specs)):
                losses = runner.run(phase, gear, segment).outputs["loss"]
                total += float(losses.sum()) if phase == "train" else 0.0
        self._count += 1
        return total / self.steps

    def restore(self) -> None:
        self._ours.restore()

    def about(self) -> str:
        return FUSED

    def close(self) -> None:
        self._ours.close()


class WholeFit:
    """`Loop.fit` with validation, metrics, events and a callback.

    Timed as Keras's `fit` is: an epoch in the middle of a long training.

    Args:
        workload: What to train.
        validation_batch_size: As in `fit`; that of the training where not given.
    """

    def __init__(
        self, workload: Workload, validation_batch_size: int | None = None
    ) -> None:
        self._validation_batch_size = validation_batch_size or workload.batch_size
        # Two held fits would hear of each other's steps on one loop.
        alone = validation_batch_size is not None
        self._ours = Ours(workload, FUSED) if alone else _shared(workload)
        self.steps = workload.steps
        self._fit: PausedFit | None = None

    def _endless(self) -> PausedFit:
        return PausedFit(
            lambda pause: self._ours.loop.fit(
                self._ours.source,
                epochs=10**9,
                validation_data=mnist_validation(),
                validation_batch_size=self._validation_batch_size,
                verbose=0,
                callbacks=[pause],
            )
        )

    def first_loss(self) -> float:
        # A held `fit` listens to everything that the loop does.
        assert self._fit is None, "first_loss comes before the first epoch"
        return self._ours.first_loss()

    def epoch(self) -> float:
        if self._fit is None:
            self._fit = self._endless()
        return float(self._fit.epoch()["loss"])

    def restore(self) -> None:
        self._ours.restore()

    def about(self) -> str:
        return FUSED

    def close(self) -> None:
        if self._fit is not None:
            self._fit.close()


FUSED = "fused-xla"
"""The gear in which the cost of `fit` around the bare loop is measured."""


def _gear(gear: str) -> Callable[[Workload], Peer]:
    return lambda workload: Ours(workload, gear)


PEERS: dict[str, Callable[[Workload], Peer]] = {
    f"loopscope {gear}": _gear(gear)
    for gear in ("auto", "graph", "fused-graph", "xla", "fused-xla", "eager")
}
"""For every workload, as far as the backend has the gear."""

MLP_PEERS: dict[str, Callable[[Workload], Peer]] = {
    "bare fused loop": lambda w: Bare(w, validation=False),
    "bare fused loop and validation": lambda w: Bare(w, validation=True),
    "loopscope fit with validation": WholeFit,
    "loopscope fit with validation, 1,000 a batch": lambda w: WholeFit(w, 1000),
}
"""For the MLP only."""
