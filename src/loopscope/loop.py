"""The training loop. There is only this one.

`fit`, `evaluate`, `predict` and a `for` of the user's own all come down to
`Loop._pass`: take a segment of steps from a source, run it, tell what happened.
How a segment is executed is the runner's part; where data come from, the
source's; what is done with the news, the listeners'.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from loopscope import backend as backends
from loopscope import checks, keras_methods, questions, step
from loopscope.choose import choose
from loopscope.data.feed import Segment
from loopscope.data.source import Pass, Source
from loopscope.epoch import Epoch
from loopscope.errors import DataError, TraceError, UsageError
from loopscope.events import (
    PHASES,
    ChunkBegin,
    ChunkEnd,
    EpochBegin,
    EpochEnd,
    Event,
    GearChosen,
    Phase,
    PhaseBegin,
    PhaseEnd,
    Resumed,
    Signals,
    TrainBegin,
    TrainEnd,
)
from loopscope.gear import AUTO, EAGER, GEARS, Gear, resolve, words_of
from loopscope.look.incidents import Chunk, Incidents
from loopscope.meters import Initial, Meters
from loopscope.questions import Ahead
from loopscope.run.resume import recording
from loopscope.runner import Done, Runner
from loopscope.sharded import as_source
from loopscope.sharing import Sharing
from loopscope.standing import Cursor, Standing
from loopscope.state import Snapshot, State
from loopscope.together import Together

CHUNK_S = 0.25
"""What a chunk aims to last: often enough for progress and Ctrl-C."""

AGREED_CHUNK_S = 0.5
"""The same where several processes agree on each: it takes them some milliseconds."""

Listener = Callable[[Event], None]
ChunkLimit = int | Callable[[int], int]
"""The most steps of a chunk, or a function of the position that a chunk starts at."""


class Loop:
    """A training loop for a Keras model, open to whoever wants to look inside.

    Example:
        ```python
        loop = Loop(
            model,
            optimizer="rmsprop",
            metrics=["accuracy"],
            loss="sparse_categorical_crossentropy",
            seed=0,
        )
        history = loop.fit(x_train, y_train, batch_size=64, epochs=5)
        ```

    Args:
        model: A `keras.Model`. Compiled already, or to be compiled from the
            parts that follow. With a step of your own it may stay uncompiled.
        optimizer: As in `keras.Model.compile`: an object or a name.
        loss: As in `keras.Model.compile`.
        metrics: As in `keras.Model.compile`.
        loss_weights: As in `keras.Model.compile`.
        weighted_metrics: As in `keras.Model.compile`.
        gear: How steps are executed: `"eager"`, `"graph"`, `"xla"`,
            `"fused-graph"`, `"fused-xla"` (the last four as far as the backend
            has them), or `"auto"`: measure a few and take the one that pays.
        seed: Keys the order of examples, with the epoch. `None` draws one from
            Python's `random`, which `keras.utils.set_random_seed` seeds.
        run_eagerly: Keras's word for `gear="eager"`.
        jit_compile: Keras's word for a gear with XLA.
        steps_per_execution: Keras's word for a fused gear; also bounds a chunk.
        cache: Whether `"auto"` may use what it measured before.
        strategy: The devices to train on, where the model was made for one: a
            `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`, or a
            `keras.distribution.DataParallel` or `ModelParallel` on JAX. The model's
            variables are moved there, and those of its optimizer and metrics. What an
            own step uses besides is to be made in the strategy's scope.
        watch: Measure the signals of every `watch`-th step inside of the compiled
            step: norms of gradients and weights, update ratios, statistics of
            activations. They are in `ChunkEnd.signals`; the first value that is not
            finite and spikes are looked into. docs/look.md says what it costs.

    Raises:
        GearError: No such gear on this backend. The model is left as it was.
        UsageError: No model, no such `watch`, or no such strategy.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        loss: Any = None,
        metrics: Any = None,
        *,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        gear: str | Gear = AUTO,
        seed: int | None = None,
        run_eagerly: bool | None = None,
        jit_compile: bool | str | None = None,
        steps_per_execution: int | None = None,
        cache: bool = True,
        watch: int | None = None,
        strategy: Any = None,
    ) -> None:
        self.backend = backends.current()
        checks.model(model)
        if strategy is not None:
            self.backend.adopt(model, strategy)
        unsaid = (run_eagerly, jit_compile, steps_per_execution) == (None, None, None)
        words = words_of(model) if gear == AUTO and unsaid else {}
        run_eagerly = words.get("run_eagerly", run_eagerly)
        jit_compile = words.get("jit_compile", jit_compile)
        self._gear = resolve(
            gear,
            self.backend.gears,
            backend=self.backend.name,
            lacking=self.backend.lacking,
            run_eagerly=run_eagerly,
            jit_compile=jit_compile,
            steps_per_execution=steps_per_execution,
        )
        self._auto = self._gear is None
        self._cache = cache
        self._test_gear = self._gear
        self.model = model
        self.together = Together(self.backend.team(model))
        """The processes that train this model, where there are several."""
        drawn = random.randrange(2**31) if seed is None else int(seed)
        self.seed = self.together.agreed(drawn)
        self.step = 0
        """How many steps this loop has trained."""
        self._own: dict[Phase, Callable[..., Any]] = {}
        self._runner = Runner(model, self.backend, self.together)
        self._sharing = Sharing(self.together, self.backend)
        self._incidents: Incidents | None = None
        """Of the training that is under way, if it is watched."""
        self._watch: int | None = None
        self.watch = watch
        self._listeners: list[Listener] = []
        self._chunk_limits: list[Mapping[Phase, ChunkLimit]] = []
        if steps_per_execution is not None:
            self._chunk_limits.append(dict.fromkeys(PHASES, steps_per_execution))
        self._stopped: set[Phase] = set()
        self._failed = False
        self._cursor = Cursor()
        self._passes: list[tuple[int, int]] = []
        """Steps of each epoch that this training has been through, by number."""
        self.left = False
        """Whether an outer loop of the user's own was left before its end."""
        self.choice: GearChosen | None = None
        """How `auto` has chosen, if it has."""
        self._epochs = 0
        """The number at which training ends."""
        self._tests = 0
        """Passes over validation data that this training has been through."""
        self._unread: set[Phase] = set()
        """Phases whose source has yet to be brought to where training goes on."""
        self.data: Source | None = None
        """The source of the pass over training data that is, or was, under way."""
        self.origin: Mapping[str, Any] = {}
        """How a command can make this loop again, if one made it."""
        self.function: Callable[..., Any] | None = None
        """The function of the experiment that made it."""
        self.hearing: list[Any] = []
        """Calls with callbacks that are under way; those of the last one hear."""
        self._save: Callable[[], None] | None = None
        self._ahead: Ahead | None = None
        """The steps of the train step that are about to run."""
        self._specs: dict[Phase, tuple[Any, ...]] = {}
        """Of the batches that each phase was last prepared for."""
        self._meters: Meters | None = None
        """Of the epoch that is open."""
        self._logs: Mapping[str, Any] = {}
        self._from: Standing | None = None
        """Where the next call of `run_epochs` goes on, if it does."""
        self._start: Cursor | None = None
        """Where the next pass over training data goes on, if it does."""
        self._definition: tuple[Any, ...] = ()
        self._step_s: dict[Phase, float] = {}
        self._initial: Initial = {}
        self._compile(optimizer, loss, metrics, loss_weights, weighted_metrics)
        if strategy is not None:  # The optimizer, and what metrics have, as well.
            self.backend.adopt(model, strategy)

    def _compile(
        self, optimizer: Any, loss: Any, metrics: Any, weights: Any, weighted: Any
    ) -> None:
        if all(p is None for p in (optimizer, loss, metrics, weights, weighted)):
            return
        if optimizer is None:
            optimizer = getattr(self.model, "optimizer", None) or "rmsprop"
        # What Keras makes of names has a copy for each replica, as the model has.
        scope = self.backend.distribution(self.model)
        with scope or contextlib.nullcontext():
            self.model.compile(
                optimizer=optimizer,
                loss=loss,
                metrics=metrics,
                loss_weights=weights,
                weighted_metrics=weighted,
            )

    # The steps.

    def train_step(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """One optimizer update. Override it, or decorate a function with it.

        As a decorator it takes a function of the parts of a batch, which returns
        a scalar loss or a dict of scalars; it is traced into every gear:

            @loop.train_step
            def train_step(x, y): ...

        Returns:
            The loss, a scalar tensor (or, as a decorator, the function).
        """
        if _is_step(x, y, self.backend):
            return self._adopt("train", x)
        return step.train_step(self.model, x, y, sample_weight)

    def test_step(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Loss and metrics of a batch. Override it, or decorate with it."""
        if _is_step(x, y, self.backend):
            return self._adopt("test", x)
        return step.test_step(self.model, x, y, sample_weight)

    def predict_step(self, x: Any) -> Any:
        """The model's output for a batch. Override it, or decorate with it."""
        if _is_step(x, None, self.backend):
            return self._adopt("predict", x)
        return step.predict_step(self.model, x)

    def _adopt(self, phase: Phase, function: Callable[..., Any]) -> Any:
        self._own[phase] = function
        self._runner.forget()
        return function

    def given(self, phase: Phase) -> tuple[Callable[..., Any], bool]:
        """The phase's step, and whether it is the user's."""
        made = self._own.get(phase) or getattr(self, f"{phase}_step")
        base = getattr(Loop, f"{phase}_step")
        return made, getattr(made, "__func__", made) is not base

    def _stage(self, phase: Phase) -> None:
        """Make the runner know the phase's step; forget what has gone stale."""
        definition = checks.definition(self.model)
        if definition != self._definition:
            self._runner.forget()
        given, own = self.given(phase)
        if not own:
            checks.compiled(self.model, phase)
            own = checks.overrides(self.model, f"{phase}_step")
            # What a step reports may be for the model's own method to say.
            reports = checks.overrides(self.model, "compute_metrics")
            if own or (reports and phase != "predict"):
                given = step.ModelStep(self.model, phase, overridden=own)
        self._runner.stage(phase, given, own=own)
        self._definition = checks.definition(self.model)

    # What can be asked.

    @property
    def gear(self) -> Gear | None:
        """The gear that training runs in; `None` until `auto` has chosen."""
        return self._gear

    @gear.setter
    def gear(self, gear: str | Gear) -> None:
        self._gear = self._test_gear = resolve(
            gear,
            self.backend.gears,
            backend=self.backend.name,
            lacking=self.backend.lacking,
        )

    @property
    def watch(self) -> int | None:
        """How often a step's signals are measured: every so many; `None`: never.

        To turn it on or off compiles the step anew; not while the loop trains.
        """
        return self._watch

    @watch.setter
    def watch(self, every: int | None) -> None:
        if every is not None:
            checks.count("watch", every, least=1)
        if self._incidents is not None:
            raise UsageError(
                "The loop is training: a step is watched, or not, from the beginning "
                f"of a training to its end. Received: watch={every!r}"
            )
        if (every is None) != (self._watch is None):
            self._runner.forget()
        self._watch = every
        self._runner.watched = every is not None

    @property
    def state(self) -> State:
        """Every variable that a step reads or writes, in a stable order."""
        return self._runner.state

    def subscribe(
        self,
        listener: Listener,
        *,
        chunk_steps: Mapping[Phase, ChunkLimit] | None = None,
        first: bool = False,
    ) -> None:
        """Send every event to `listener`.

        Args:
            listener: Called with each `loopscope.events.Event`, in order.
            chunk_steps: The most steps, by phase, that may lie between two events: a
                number, or a function of the position in the pass that gives one.
            first: Whether it hears of everything before those that listen already.
        """
        self._listeners.insert(0 if first else len(self._listeners), listener)
        self._chunk_limits.append(chunk_steps or {})

    def unsubscribe(
        self,
        listener: Listener,
        *,
        chunk_steps: Mapping[Phase, ChunkLimit] | None = None,
    ) -> None:
        """Undo `subscribe` with the same arguments."""
        self._listeners.remove(listener)
        self._chunk_limits.remove(chunk_steps or {})

    def stop(self, phase: Phase = "train") -> None:
        """End training, or a pass of another phase, after the chunk that is running."""
        self._stopped.add(phase)

    def _emit(self, event: Event) -> None:
        with self.together.alone():
            for listener in tuple(self._listeners):
                listener(event)

    def _note(self, error: BaseException, where: str) -> None:
        """Tell an error the step it was raised at; the first note counts."""
        if not any(n.startswith("loopscope:") for n in getattr(error, "__notes__", ())):
            error.add_note(
                f"loopscope: raised {where} (global step {self.step}); the variables "
                "are as the last finished step left them."
            )

    # Keras's three words.

    fit = keras_methods.fit
    evaluate = keras_methods.evaluate
    predict = keras_methods.predict

    # The loop.

    def source(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        steps_per_epoch: int | None = None,
    ) -> Source:
        """A source of batches in this loop's order, to train on more than once.

        Args:
            x: Arrays, or a dict or tuple of them, or an iterable of batches.
            y: Arrays of the same length, or `None`.
            sample_weight: Arrays of the same length, or `None`.
            batch_size: Examples of a step; 32 if not given. Arrays only.
            shuffle: Whether each epoch has an order of its own. Arrays only.
            steps_per_epoch: The steps of an epoch, where not all.

        Raises:
            DataError: Data that no step could be run on.
        """
        return as_source(
            x,
            y,
            sample_weight,
            backend=self.backend,
            together=self.together,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            steps_per_epoch=steps_per_epoch,
        )

    def epochs(
        self,
        epochs: int,
        *,
        initial_epoch: int = 0,
        run: Any = None,
        resume: bool | str = False,
    ) -> Iterator[Epoch]:
        """The outer loop: one `Epoch` after the other, metrics reset before each.

        Example:
            ```python
            for epoch in loop.epochs(5):
                for step in epoch.train(train, every=200):
                    print(step.index, step.loss)
                epoch.validate(val)
                print(epoch.metrics, epoch.seconds)
            ```

        Args:
            epochs: The number at which to stop.
            initial_epoch: The number to start with.
            run: Record into this folder: a path or a `loopscope.Recording`.
            resume: As in `fit`. The first epoch may then be one that had begun: its
                `train` goes on at the next batch.

        Yields:
            An `Epoch`, open until the next one is asked for.
        """
        checks.count("epochs", epochs, least=0)
        checks.count("initial_epoch", initial_epoch, least=0)
        if run is None:
            return self.run_epochs(lambda: initial_epoch, epochs)
        return self._recorded_epochs(epochs, initial_epoch, run, resume)

    def _recorded_epochs(
        self, epochs: int, initial_epoch: int, run: Any, resume: bool | str
    ) -> Iterator[Epoch]:
        arguments = {"epochs": epochs, "initial_epoch": initial_epoch}
        with (
            recording(self, run, resume, epochs) as recorder,
            recorder.listening(None, None, arguments),
        ):
            yield from self.run_epochs(lambda: initial_epoch, epochs)

    def run_epochs(self, first: Callable[[], int], epochs: int) -> Iterator[Epoch]:
        """`epochs`, where what hears of the beginning may move the first epoch."""
        self._stopped.discard("train")
        self._failed = False
        self._logs, self._passes, self._tests, self.left = {}, [], 0, False
        if self._watch is not None:
            self._incidents = Incidents(self._runner, self._watch)
        start, self._from, self._epochs = self._from, None, epochs
        try:
            self._sharing.begin(self.state)
            self._emit(TrainBegin(epochs))
            at = self.together.agreed(first())
            self._cursor = Cursor(at) if start is None else start.cursor
            if start is not None and not start.cursor.begun:
                if start.stopped:
                    epochs = start.cursor.epoch
                resumed, start = self._go_on(start), None
                self._emit(resumed)
            while self._cursor.epoch < epochs:
                number = self._cursor.epoch
                epoch = Epoch(self, number, epochs)
                self._meters = epoch.meters
                self._emit(EpochBegin(number, epochs))
                self._cursor = Cursor(number, begun=True)
                if start is not None:
                    resumed, start = self._go_on(start), None
                    self._emit(resumed)
                try:
                    yield epoch
                except GeneratorExit:
                    self.left = True
                    raise
                finally:
                    self._logs = epoch.close()
                    if not self._failed:
                        self._passes.append((number, self._cursor.index))
                        self._cursor = Cursor(number + 1)
                        self._emit(EpochEnd(number, self._logs, epoch.seconds))
                if self._is_stopped("train"):
                    break
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            self._failed = True
            self._note(error, "between steps")
            raise
        finally:
            self._incidents = None
            if not self._failed:
                if epochs:
                    self._finish_weights()
                self._emit(TrainEnd(self._logs))
                self._sharing.share(self.state)

    def _is_stopped(self, phase: Phase) -> bool:
        """Whether the chief has been told to end a phase."""
        if self.together.agreed(phase in self._stopped):
            self._stopped.add(phase)
        return phase in self._stopped

    @property
    def cursor(self) -> Cursor:
        """The position in the training data."""
        return self._cursor

    def is_last(self, epoch: int) -> bool:
        """Whether no epoch comes after this one."""
        return epoch + 1 >= self._epochs or "train" in self._stopped

    def code(self) -> list[Any]:
        """The user's functions and classes that make its steps."""
        made = [self.function, *self._own.values(), type(self), type(self.model)]
        return [c for c in made if c is not None and c is not Loop]

    def save(self) -> None:
        """Ask for a checkpoint at the end of the chunk that runs, or of the next one.

        Raises:
            UsageError: No run is being recorded.
        """
        if self._save is None:
            raise UsageError(
                "There is nothing to save to: no run is being recorded. Give `fit` or "
                "`epochs` a folder: `run='runs/name'`."
            )
        self._save()

    def saves(self, ask: Callable[[], None] | None) -> None:
        """Say what `save` calls. Called by whoever records."""
        self._save = ask

    def standing(self, *, state: Mapping[str, Any] | None = None) -> Standing:
        """All that the next step reads: where a training can go on, or start over.

        Costs some microseconds a variable; nothing is copied until it is written to.

        Args:
            state: `state.values()`, where they were read just now.
        """
        gears = [
            g.name if g is not None else None for g in (self._gear, self._test_gear)
        ]
        return Standing(
            step=self.step,
            cursor=self._cursor,
            seed=self.seed,
            gear=gears[0],
            test_gear=gears[1],
            stopped="train" in self._stopped,
            state=self.state.values() if state is None else state,
            meters=self._meters.memory() if self._meters is not None else {},
            logs=self._logs,
            passes=tuple(self._passes),
            specs={str(phase): specs for phase, specs in self._specs.items()},
            tests=self._tests,
        )

    def stand(self, standing: Standing) -> None:
        """Set variables, gear and count of steps to where another loop stood.

        Raises:
            UsageError: The variables are not the same ones; nothing was changed.
        """
        self.state.set(standing.state)
        self.step = standing.step
        for name, value in (
            ("_gear", standing.gear),
            ("_test_gear", standing.test_gear),
        ):
            if value is not None or self._auto:
                setattr(self, name, GEARS.get(value or ""))

    def adopt(self, standing: Standing) -> None:
        """Take the seed of another training, and its gear if none was asked for."""
        self.seed = standing.seed
        if self._auto and standing.gear is not None:
            self._gear = GEARS[standing.gear]
            self._test_gear = GEARS[standing.test_gear or standing.gear]

    def go_on_from(self, standing: Standing | None) -> None:
        """Let the next training go on from `standing`: at its next step."""
        self._from = standing

    def begin_at(self, standing: Standing) -> None:
        """Let the next pass over training data go on from `standing`; say nothing."""
        self.stand(standing)
        self._passes, self._tests = list(standing.passes), standing.tests
        self._unread = {"train"}
        self._stopped.discard("train")
        self._failed = False
        self._start = standing.cursor if standing.cursor.begun else None

    def settle(self, phase: Phase, specs: tuple[Any, ...]) -> None:
        """Make every variable of a phase's step, as far as that can be done unrun.

        A step of the user's own in gear eager is not traced: what it builds in its
        first execution would be missing before.
        """
        with contextlib.suppress(Exception):
            self._runner.trace(phase, specs)

    def _settle_alone(self, phase: Phase, specs: tuple[Any, ...]) -> None:
        """`settle`, where one process trains: of several, all must do the same."""
        if not self.together.several:
            self.settle(phase, specs)

    def _build(self, phase: Phase, specs: tuple[Any, ...]) -> None:
        """Make the variables of a phase's step before there are data for it."""
        self._stage(phase)
        if not self._runner.stages[phase].own:
            checks.build(self.model, specs, phase)
        self.settle(phase, specs)

    def _go_on(self, start: Standing) -> Resumed:
        """Stand where another training stood.

        What it returns is told to those who listen, who may set theirs, when nobody
        holds the arrays of that training any more.
        """
        for phase in PHASES:
            if phase in start.specs and phase not in self._specs:
                self._build(phase, start.specs[phase])
            elif phase in self._specs:
                self._settle_alone(phase, self._specs[phase])
        self.stand(start)
        self._cursor, self._logs = start.cursor, start.logs
        self._passes, self._tests = list(start.passes), start.tests
        self._unread = {"train", "test"}
        if start.cursor.begun:
            self._start = start.cursor
            if self._meters is not None and start.meters:
                self._meters.remember(start.meters)
        if start.stopped:
            self._stopped.add("train")
        return Resumed(start.step, start.cursor.epoch, start.cursor.index)

    def _finish_weights(self) -> None:
        """What Keras's optimizers do at the end: averages become the weights (EMA)."""
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is not None and optimizer.built:
            optimizer.finalize_variable_values(self.model.trainable_weights)

    def run_pass(
        self,
        phase: Phase,
        source: Source,
        meters: Meters | None,
        *,
        epoch: int = 0,
        epochs_left: int = 1,
        limit: int | None = None,
        every: int | None = None,
    ) -> Iterator[ChunkEnd]:
        """Run a source once, chunk by chunk: the loop that everything is.

        A chunk ends at the latest after each step whose index is a multiple of
        `every`, after `limit` steps, and where a listener wants to be told. Where
        chunks end changes no bit of the result.
        """
        limit = source.steps if limit is None else limit
        index = samples = 0
        if phase == "train" and self._start is not None:
            # Training goes on in the middle of an epoch.
            index, samples = self._start.index, self._start.samples
            limit = index if phase in self._stopped else limit
            self._start = None
        try:
            gear = self.prepare(phase, source, epochs_left=epochs_left)
            if phase in self._unread:
                self._unread.discard(phase)
                tests = [(0, sys.maxsize)] * self._tests
                source.replay(self._passes if phase == "train" else tests)
            if phase == "train":
                self.data = source
                if self._save is not None:
                    # So that the first checkpoint holds what an eager step builds.
                    self._settle_alone(phase, source.specs)
            data = source.open(epoch, index)
            self._emit(PhaseBegin(phase, limit))
            try:
                begun = False
                while limit is None or index < limit:
                    most, over = self.together.agreed(
                        (
                            self._chunk_steps(phase, source, index, limit, every),
                            begun and phase in self._stopped,
                        )
                    )
                    if over:
                        self._stopped.add(phase)
                        break
                    begun = True
                    began = time.perf_counter()
                    segment = data.take(most)
                    if segment is None:
                        self._share(0, data)
                        break
                    fetch_s = time.perf_counter() - began
                    if phase == "train":
                        self._ahead = Ahead(segment, source, epoch, index, fetch_s)
                    self._emit(ChunkBegin(phase, index, fetch_s))
                    self._ahead = None
                    self._share(segment.steps, data)
                    # Whoever listens may change the gear; `None` is not chosen yet.
                    chosen = self._gear if phase == "train" else self._test_gear
                    before = self._before(phase)
                    done = self._run(phase, chosen or gear, segment)
                    self._sharing.look(self.state)
                    samples += segment.steps * segment.feed.batch_size
                    if meters is not None:
                        meters.add(done.outputs, segment.steps, done.logs)
                    chunk = ChunkEnd(
                        phase,
                        index,
                        segment.steps,
                        self.step - segment.steps,
                        samples,
                        done.outputs,
                        done.wall_s,
                        meters.results if meters is not None else dict,
                        self._signals(done),
                    )
                    index += segment.steps
                    if phase == "train":
                        self._cursor = Cursor(epoch, index, samples, begun=True)
                    self._emit(chunk)
                    if before is not None:
                        rows = partial(_rows, source, epoch, chunk.index)
                        self._judge(
                            Chunk(segment, chosen or gear, before, chunk.step, rows),
                            done,
                        )
                    yield chunk
            finally:
                self._ahead = None
                data.close()
            self._emit(PhaseEnd(phase, index, meters.results() if meters else {}))
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            self._failed = True
            if phase == "train":
                self.step += self._runner.finished
            at = index + self._runner.finished
            self._runner.finished = 0
            self._note(error, f"at {phase} step {at} of epoch {epoch}")
            raise

    def _run(self, phase: Phase, gear: Gear, segment: Segment) -> Done:
        due = None
        if phase == "train" and self._watch is not None:
            # The last one as well: nothing that is not finite hides in a chunk.
            due = (self.step + np.arange(segment.steps)) % self._watch == 0
            due[-1] = True
        done = self._runner.run(phase, gear, segment, due)
        if phase == "train":
            self.step += self._runner.finished
        self._runner.finished = 0
        for compiled in done.compiled:
            self._emit(compiled)
        steps = segment.steps - len(done.compiled)
        if steps:
            self._pace(phase, done.wall_s / steps, alone=segment.steps == 1)
        return done

    def _share(self, steps: int, data: Pass) -> None:
        """Let the other workers have what listeners of the chief have set.

        Raises:
            DataError: This worker has data for another number of `steps`; or what the
                data have raised.
        """
        gears = self._gear, self._test_gear
        names = [None if gear is None else gear.name for gear in gears]
        told, expected = self._sharing.share(self.state, (names, steps))
        if steps != expected:
            if steps < expected:
                data.take(1)  # What has cut them short is raised here.
            raise DataError(
                f"The data of worker {self.together.rank} go on for {steps} steps, "
                f"those of the chief for {expected}. Give every worker the same data "
                "in the same order: each takes its own rows of a batch."
            )
        if not self.together.chief:
            self._gear, self._test_gear = (GEARS.get(name or "") for name in told)

    def _before(self, phase: Phase) -> Snapshot | None:
        """The state before some steps, where they may have to be run once more."""
        judged = phase == "train" and self._incidents is not None
        return self.state.snapshot() if judged else None

    def _judge(self, chunk: Chunk, done: Done) -> None:
        assert self._incidents is not None
        incident = self._incidents.after(chunk, done)
        if incident is not None:
            self._emit(incident)
            warnings.warn(incident.text, stacklevel=4)

    def _signals(self, done: Done) -> Signals | None:
        """The signals of those steps whose number asks for them."""
        if done.signals is None:
            return None
        steps = np.arange(self.step - len(done.signals.due), self.step)
        asked = steps % (self._watch or 1) == 0
        return Signals(steps[asked], done.signals.by_name(asked))

    def _pace(self, phase: Phase, step_s: float, *, alone: bool) -> None:
        # A step alone (a ragged last batch) costs a whole call: it says too much.
        known = self._step_s.get(phase, float("inf"))
        self._step_s[phase] = min(known, step_s) if alone else step_s

    def _chunk_steps(
        self,
        phase: Phase,
        source: Source,
        index: int,
        limit: int | None,
        every: int | None,
    ) -> int:
        if phase in self._stopped:
            return 1  # As Keras does: who stops before a step sees one more.
        most = self._runner.capacity(phase, source.specs)
        limits = (c[phase] for c in self._chunk_limits if phase in c)
        most = min([most, *(n(index) if callable(n) else n for n in limits)])
        if limit is not None:
            most = min(most, limit - index)
        if every is not None:
            most = min(most, -index % every + 1)
        pace = self._step_s.get(phase)
        aim_s = AGREED_CHUNK_S if self.together.several else CHUNK_S
        return max(1, min(most, 8 if pace is None else int(aim_s / pace)))

    def test(self, source: Source, limit: int | None = None) -> dict[str, Any]:
        """Run the test step over a source, or so many steps; metrics by name."""
        self._failed = False
        self._stopped.discard("test")
        meters = self.meters("test")
        suspended = meters.suspend()
        meters.reset()
        try:
            for _ in self.run_pass("test", source, meters, limit=limit):
                pass
            self._tests += 1
            return meters.results()
        finally:
            meters.resume(suspended)

    def prepare(self, phase: Phase, source: Source, *, epochs_left: int = 1) -> Gear:
        """Refuse what can be refused before a step runs; choose the gear.

        Raises:
            UsageError: Naming what was expected and received. Variables, optimizer
                and metrics are as they were.
        """
        self.together.refuse_alone()
        try:
            return self._prepare(phase, source, epochs_left)
        except Exception:
            source.close()
            raise

    def _prepare(self, phase: Phase, source: Source, epochs_left: int) -> Gear:
        self._stage(phase)
        stage = self._runner.stages[phase]
        if self._watch is not None and self.backend.distribution(self.model):
            raise UsageError(
                "Signals of a step that is divided among replicas are not measured. "
                f"Leave `watch` out, or use one device. Received: watch={self._watch}"
            )
        gear = self._gear if phase == "train" else self._test_gear
        source.patient = self.together.several
        if isinstance(stage.step, step.ModelStep):
            checks.build_quietly(self.model, source.specs, phase)
        if not stage.own and source not in stage.checked:
            checks.build(self.model, source.specs, phase)
            checks.labels(self.model, source)
            if not stage.checked:
                checks.logits(self.model)
            stage.checked.append(source)
        if not (stage.own and gear is not None and gear.run_eagerly):
            gear = self._trace(phase, source, gear)
        if gear is None and phase == "train":
            gear = self._choose(source, epochs_left)
        self._specs[phase] = source.specs
        return gear or self.backend.gears[0]

    def _trace(self, phase: Phase, source: Source, gear: Gear | None) -> Gear | None:
        """Trace the phase's step; where only `auto` asked for it, eager will do."""
        stage = self._runner.stages[phase]
        try:
            self._runner.trace(phase, source.specs)
        except UsageError:
            raise
        except Exception as error:
            received = checks.words(source.specs)
            anew = gear is None and self._gear is None and phase == "train"
            if isinstance(error, TraceError) and gear in (None, EAGER) and not anew:
                return EAGER
            if not (stage.own or isinstance(error, TraceError)):
                raise DataError(
                    f"The {phase} step cannot run on these data. Received: {received}. "
                    f"Keras says: {error}"
                ) from error
            if not anew:
                error.add_note(
                    f"loopscope: raised while tracing the {phase} step on {received}; "
                    "no step was run. Gear 'eager' runs steps without tracing them."
                )
                raise
            cause = (str(error).strip().splitlines() or [""])[-1].strip()
            reason = f"eager, since the step cannot be traced ({cause})"
            warnings.warn(reason, stacklevel=5)
            self.gear = EAGER
            because = {"why": "untraceable", "gear": EAGER.name, "cause": cause}
            self._emit(GearChosen(EAGER.name, reason, 0.0, because=because))
            return EAGER
        return gear

    def _choose(self, source: Source, epochs_left: int) -> Gear:
        steps = None if source.steps is None else source.steps * epochs_left
        choice = choose(self._runner, source, steps=steps, cache=self._cache)
        self._gear, self._test_gear = choice.train, choice.test
        self.choice = GearChosen(
            choice.train.name,
            choice.reason,
            choice.wall_s,
            choice.step_s,
            choice.because,
        )
        self._emit(self.choice)
        return choice.train

    # What can be asked of it.

    compare = questions.compare
    estimate = questions.estimate
    forecast = questions.forecast
    look = questions.look
    doctor = questions.doctor
    examine = questions.examine
    show = questions.show
    lines = questions.lines
    find_lr = questions.find_lr
    overfit = questions.overfit
    otherwise = questions.otherwise
    moment = questions.moment
    first_step_difference = questions.first_step_difference

    @contextlib.contextmanager
    def _ready(self, source: Source) -> Iterator[Gear]:
        """The train step, ready to run single steps of a source; its gear."""
        try:
            with self._settled(source) as gear:
                yield gear
        finally:
            source.close()

    @contextlib.contextmanager
    def _settled(self, source: Source) -> Iterator[Gear]:
        """As `_ready`, for a source that is trained on afterwards."""
        held = self._gear, self._test_gear
        try:
            if self._gear is None:  # To measure gears is not what was asked for.
                self._gear = self._test_gear = self.backend.gears[0]
            gear = self.prepare("train", source)
            self.settle("train", source.specs)
            yield gear
        finally:
            self._gear, self._test_gear = held

    def ahead(self) -> Segment | None:
        """The steps that are about to run, where some are: in a chunk's beginning."""
        return None if self._ahead is None else self._ahead.segment

    def meters(self, phase: Phase) -> Meters:
        """The metrics that belong to a phase's step."""
        self._stage(phase)
        stage = self._runner.stages[phase]
        keras = not stage.own or isinstance(stage.step, step.ModelStep)
        if keras:
            return Meters(
                self.model, [], self.backend, keras=True, initial=self._initial
            )
        # An own step updates the model's metrics by name, or through the built-in one.
        called = {"compute_metrics", f"{phase}_step"} & stage.found.names
        model = self.model if called else None
        found = stage.found.metrics
        return Meters(model, found, self.backend, initial=self._initial)


def _rows(source: Source, epoch: int, index: int, position: int) -> Any:
    """The rows of a step's examples, by its position in a chunk."""
    return source.examples(epoch, index + position)


def _is_step(x: Any, y: Any, backend: Any) -> bool:
    """Whether a step method was called as a decorator."""
    return y is None and callable(x) and not backend.is_tensor(x)
