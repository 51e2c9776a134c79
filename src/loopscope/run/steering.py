"""Between a recorded training and whoever watches it: what it says, and what it obeys.

Heard through the recorder, on the chief alone. The time of an epoch is divided among
what the loop does between its events; what was asked for is looked at after each chunk.
Waiting there changes no bit of the run: a chunk may end anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loopscope.events import (
    ChunkBegin,
    ChunkEnd,
    Compiled,
    EpochBegin,
    EpochEnd,
    Event,
    PhaseBegin,
    PhaseEnd,
    TrainBegin,
    TrainEnd,
)
from loopscope.run.control import Control
from loopscope.run.folder import Folder
from loopscope.run.live import Clock, Pace
from loopscope.run.plain import readable

if TYPE_CHECKING:
    from loopscope.loop import Loop

WAIT_S = 0.02
"""How long a training that waits sleeps at a time."""


class Recorded(Protocol):
    """What steering needs of the recorder."""

    @property
    def told_to_leave(self) -> bool:
        """Whether a signal has come."""
        ...

    def save_now(self, event: ChunkEnd) -> None:
        """Save where training stands after a chunk, or as soon as that can be done."""
        ...

    def note(self, kind: str, **data: Any) -> None:
        """Put an event into the journal."""
        ...


class Steering:
    """Says what a training does, and lets it wait, step, save and stop.

    Args:
        loop: The loop that trains.
        folder: Its run.
    """

    def __init__(self, loop: Loop, folder: Folder) -> None:
        self._loop = loop
        self._control = Control(folder, loop.together.size)
        self.clock = Clock()
        self.stopped = False
        """Whether training ends since that was asked for here."""
        self._pace = Pace()
        self._phase: str | None = None
        self._epochs: int | None = None
        self._steps: int | None = None
        self._validation_s = 0.0
        """What validation took in the epoch before."""
        self._outputs: Mapping[str, np.ndarray] = {}
        """Of the last chunk of training."""
        self._turned_s = 0.0
        """When the last chunk of training was over with."""

    def begin(self) -> None:
        """Training begins: what was asked of an earlier one is not for it."""
        self._control.begin()

    def end(self) -> None:
        """Nothing is obeyed any more."""
        self._control.end()

    def chunk_steps(self, most: int) -> int:
        """How many steps the next chunk may have."""
        return self._control.chunk_steps(most)

    # Where the time goes.

    def hear_first(self, event: Event) -> None:
        """Before everybody else: what was done until now is over."""
        clock = self.clock
        match event:
            case TrainBegin() | EpochBegin():
                clock.reset()
                clock.turn("callbacks")
            case PhaseBegin(phase=phase, steps=steps):
                self._phase = phase
                if phase == "train":
                    self._steps = steps
                    self._turned_s = time.perf_counter()
                clock.turn("data" if phase == "train" else "validation")
            case ChunkBegin(phase="train"):
                between_s = time.perf_counter() - self._turned_s
                clock.turn("callbacks")
                # What is not the source's is the body of an own loop.
                own_s = max(0.0, between_s - event.fetch_s)
                clock.move(own_s, "data", "callbacks")
            case ChunkEnd(phase="train") | PhaseEnd():
                clock.turn("callbacks")
            case Compiled(phase="train"):
                clock.move(event.wall_s, "step", "compiling")
            case EpochEnd():
                if self._control.stopping and not self._loop.is_last(event.epoch):
                    self.stopped = True
                    self._loop.stop()

    def hear_last(self, event: Event, recorded: Recorded) -> None:
        """After everybody else: what comes next begins; and what was asked is done.

        Args:
            event: What has happened.
            recorded: The recorder, to save and to note.
        """
        clock = self.clock
        match event:
            case EpochBegin(epochs=epochs):
                self._epochs = epochs
            case ChunkBegin(phase="train"):
                clock.turn("step")
            case ChunkEnd():
                if event.phase == "train":
                    self._outputs = event.outputs
                    self._control.after_step()
                self._obey(event, recorded)
                if event.phase == "train":
                    clock.turn("data")
                    self._turned_s = time.perf_counter()
            case PhaseEnd():
                self._phase = None
            case EpochEnd():
                self._validation_s = clock.seconds()["validation"]
            case TrainEnd():
                clock.turn(None)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A block in which training is saved, and waits for that."""
        role = self.clock.role
        self.clock.turn("saving")
        try:
            yield
        finally:
            self.clock.turn(role)

    def live(self) -> Mapping[str, Any]:
        """What a training does now. Asked for by another thread."""
        loop, control = self._loop, self._control
        gear, cursor, phase = loop.gear, loop.cursor, self._phase
        speed = self._pace(loop.step, runs=phase == "train" and not control.paused)
        return {
            "phase": phase,
            "role": self.clock.role,
            "paused": control.paused,
            "asked": control.asked,
            "step": loop.step,
            "epoch": cursor.epoch,
            "epochs": self._epochs,
            "index": cursor.index,
            "steps_per_epoch": self._steps,
            "gear": gear.name if gear is not None else None,
            "loss": _latest(self._outputs),
            "steps_per_s": speed,
            "eta_s": self._eta_s(speed, cursor.epoch, cursor.index),
            "seconds": self.clock.seconds(),
            "workers": loop.together.size,
            "obeyed_bytes": control.obeyed_bytes,
        }

    def _eta_s(self, speed: float | None, epoch: int, index: int) -> float | None:
        if not speed or not self._steps or self._epochs is None:
            return None
        last = epoch + 1 if self._control.stopping else self._epochs
        left = last - epoch
        return max(
            0.0, (left * self._steps - index) / speed + left * self._validation_s
        )

    # What is obeyed.

    def _obey(self, event: ChunkEnd, recorded: Recorded) -> None:
        self._look(event, recorded)
        if not self._control.paused:
            return
        role = self.clock.role
        self.clock.turn(None)
        while self._control.paused and not recorded.told_to_leave:
            time.sleep(WAIT_S)
            self._look(event, recorded)
        self.clock.turn(role)

    def _look(self, event: ChunkEnd, recorded: Recorded) -> None:
        for taken in self._control.look():
            recorded.note("control", **taken)
        if self._control.saving:
            self._control.saving = False
            recorded.save_now(event)


def _latest(outputs: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The loss of the last step, and what it is called; `None` where there is none."""
    name = "loss" if "loss" in outputs else next(iter(outputs), None)
    if name is None or outputs[name].ndim != 1 or not len(outputs[name]):
        return None
    return {"name": name, "value": readable(float(outputs[name][-1]))}
