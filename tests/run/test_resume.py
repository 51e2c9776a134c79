"""A training that was ended anywhere and goes on ends in the bits it was coming to."""

import gc
import json
import os
import re

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopscope import Recording
from loopscope.errors import RunError, UsageError
from loopscope.events import ChunkEnd, EpochEnd, Resumed
from loopscope.run import reading
from loopscope.run.checkpoint import Checkpoint
from loopscope.run.folder import Folder
from loopscope.run.lock import Lock, writer
from loopscope.standing import Standing
from loopscope.state import State
from models import (
    ALL,
    FUSED,
    ONE_GEAR,
    STEP,
    blobs,
    fresh,
    gan,
    mixed_loop,
    quick_on_jax,
    small_loop,
    small_model,
    some_of,
    warned,
)


class Ended(Exception):
    """Stands for whatever ends a process."""


class EndAt:
    """Ends training once so many steps were trained, between two chunks."""

    def __init__(self, loop, step):
        self.loop, self.step = loop, step

    def __call__(self, event):
        trained = isinstance(event, ChunkEnd) and event.phase == "train"
        if trained and self.loop.step >= self.step:
            raise Ended


def train(make, gear, fit, *, at=None, **run):
    """Train a new loop, with `fit` calling its method; end it after `at` steps."""
    loop = fresh(make, gear)
    if at is not None:
        limits = {"train": lambda index: max(1, at - loop.step)}
        loop.subscribe(EndAt(loop, at), chunk_steps=limits)
        with pytest.raises(Ended):
            fit(loop, **run)
        return loop, None
    return loop, fit(loop, **run)


def losses(path):
    """Every recorded step's outputs as bytes, and the epochs without their seconds."""
    steps = {n: v.tobytes() for n, v in reading.steps(Folder(path)).items()}
    rows = reading.epochs(Folder(path))
    return steps, [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def check(make, gear, fit, folder, *, at, every=3):
    """Train undisturbed; train, end after `at` steps, go on; compare the two."""
    whole, expected = train(make, gear, fit, run=Recording(folder / "whole", every))
    path = folder / "ended"
    train(make, gear, fit, at=at, run=Recording(path, replay_steps=every))
    loop, history = train(make, gear, fit, run=path, resume=True)
    assert loop.state.sha256() == whole.state.sha256()
    assert loop.step == whole.step
    assert losses(path) == losses(folder / "whole")
    if expected is not None:
        assert history.history == expected.history
        assert history.epoch == expected.epoch
    return loop, history


def fit_arrays(*data, batch_size=8, epochs=3, **arguments):
    def fit(loop, **run):
        return loop.fit(
            *data, batch_size=batch_size, epochs=epochs, verbose=0, **arguments, **run
        )

    return fit


@pytest.mark.parametrize("build", some_of(ALL, 2, 1))
def test_every_kind_of_model_and_step_goes_on_in_the_middle_of_an_epoch(
    build, tmp_path
):
    make, (x, y) = build()
    rows = len(keras.tree.flatten(x)[0])
    more = keras.tree.map_structure(lambda a: np.concatenate([a] * 4), (x, y))
    fit = fit_arrays(*more, batch_size=rows, epochs=2)
    check(make, FUSED, fit, tmp_path, at=7)


@pytest.mark.parametrize("at", [2, 7])
def test_an_eager_step_goes_on_with_optimizers_that_its_first_run_builds(at, tmp_path):
    make, (x, noise) = gan()
    more = [np.concatenate([part] * 4) for part in (x, noise)]
    fit = fit_arrays(*more, batch_size=len(x), epochs=2)
    check(make, "eager", fit, tmp_path, at=at)


@pytest.mark.parametrize("gear", ONE_GEAR)
def test_every_gear_goes_on_with_dropout_and_batchnorm(gear, tmp_path):
    x, y = blobs(44)
    validation = blobs(20, seed=5)
    fit = fit_arrays(x, y, epochs=2, validation_data=validation)
    check(mixed_loop, gear, fit, tmp_path, at=8)


X, Y = blobs(60)
VALIDATION = blobs(20, seed=9)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the small loop comes to in three epochs of eight steps."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    fit = fit_arrays(X, Y, validation_data=VALIDATION)
    loop, history = train(small_loop, STEP, fit, run=path)
    return loop.state.sha256(), history.history, losses(path)


@quick_on_jax
@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(at=st.lists(st.integers(1, 24), min_size=1, max_size=3), every=st.integers(1, 9))
def test_training_may_be_ended_after_any_step_and_more_than_once(
    at, every, undisturbed, tmp_path_factory
):
    path = tmp_path_factory.mktemp("ended") / "run"
    fit = fit_arrays(X, Y, validation_data=VALIDATION)
    for step in sorted(at):
        train(small_loop, STEP, fit, at=step, run=Recording(path, every), resume=True)
    loop, history = train(small_loop, STEP, fit, run=path, resume=True)
    state, logs, recorded = undisturbed
    assert loop.state.sha256() == state
    assert history.history == logs
    assert losses(path) == recorded


class Counting(keras.callbacks.Callback):
    """A callback of a user's own that remembers things, and acts on them."""

    def __init__(self):
        super().__init__()
        self.seen, self.places = 0, {("a", 1): np.zeros(2)}

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        self.places["a", 1] += logs["loss"]
        if self.seen % 5 == 0:
            rate = self.model.optimizer.learning_rate
            rate.assign(rate * 0.9)


def callbacks_of_all_kinds(folder):
    known = keras.callbacks
    return [
        known.EarlyStopping("val_loss", patience=4, restore_best_weights=True),
        known.ReduceLROnPlateau("loss", patience=0, factor=0.5, min_delta=0.3),
        known.CSVLogger(folder / "log.csv"),
        known.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        known.ModelCheckpoint(
            folder / "best.weights.h5", save_best_only=True, save_weights_only=True
        ),
        known.TerminateOnNaN(),
    ]


def with_callbacks(folder, *more, name, **arguments):
    def fit(loop, **run):
        place = folder / name(run)
        place.mkdir(exist_ok=True)
        return loop.fit(
            X,
            Y,
            batch_size=8,
            validation_data=VALIDATION,
            callbacks=[*callbacks_of_all_kinds(place), *(m() for m in more)],
            verbose=0,
            **{"epochs": 6, **arguments},
            **run,
        )

    return fit


def folder_name(run):
    path = run["run"].path if isinstance(run["run"], Recording) else run["run"]
    return f"files-{path.name}"


# Whoever is killed closes no file either.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("more", [(), (Counting,)], ids=["keras", "own"])
@pytest.mark.parametrize("at", [5, 24])
def test_callbacks_go_on_with_what_they_remember(more, at, tmp_path):
    def make(gear):
        return small_loop(gear, optimizer=keras.optimizers.SGD(0.1))

    fit = with_callbacks(tmp_path, *more, name=folder_name)
    check(make, STEP, fit, tmp_path, at=at)
    whole, ended = tmp_path / "files-whole", tmp_path / "files-ended"
    assert (ended / "log.csv").read_text() == (whole / "log.csv").read_text()


def test_early_stopping_ends_and_restores_the_best_weights_all_the_same(tmp_path):
    def make(gear):
        return small_loop(gear, optimizer=keras.optimizers.SGD(3.0))

    def fit(loop, **run):
        stopping = keras.callbacks.EarlyStopping(
            "val_loss", patience=1, restore_best_weights=True
        )
        return loop.fit(
            X,
            Y,
            batch_size=8,
            epochs=40,
            validation_data=VALIDATION,
            callbacks=[stopping],
            verbose=0,
            **run,
        )

    _, history = check(make, STEP, fit, tmp_path, at=13)
    assert len(history.epoch) < 40


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_overwrite_frequency": 5},
        {"gradient_accumulation_steps": 3},
        {"loss_scale_factor": 16.0},
        {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)},
    ],
    ids=["ema", "accumulation", "loss scale", "schedule"],
)
def test_what_an_optimizer_keeps_is_in_the_checkpoint(options, tmp_path):
    def make(gear):
        return small_loop(gear, optimizer=keras.optimizers.Adam(**options))

    check(make, STEP, fit_arrays(X, Y), tmp_path, at=10)


def test_swapped_ema_weights_go_on(tmp_path):
    def make(gear):
        optimizer = keras.optimizers.Adam(0.05, use_ema=True)
        return small_loop(gear, optimizer=optimizer)

    def fit(loop, **run):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        return loop.fit(
            X, Y, batch_size=8, epochs=3, callbacks=[swap], verbose=0, **run
        )

    check(make, STEP, fit, tmp_path, at=13)


def test_a_dynamic_loss_scale_is_in_the_checkpoint(tmp_path):
    def make(gear):
        inner = keras.optimizers.SGD(0.1)
        scaled = keras.optimizers.LossScaleOptimizer(inner, dynamic_growth_steps=4)
        return small_loop(gear, optimizer=scaled)

    check(make, STEP, fit_arrays(X, Y), tmp_path, at=10)


def test_an_outer_loop_of_ones_own_goes_on_in_the_middle_of_an_epoch(tmp_path):
    lines = []

    def run_it(loop, **run):
        source = loop.source(X, Y, batch_size=8)
        for epoch in loop.epochs(3, **run):
            for step in epoch.train(source, every=2):
                lines.append((epoch.index, step.index, step.loss))
            epoch.validate(VALIDATION)

    check(small_loop, STEP, run_it, tmp_path, at=13)
    whole = lines[: 3 * 4]
    assert [epoch for epoch, *_ in whole] == [0] * 4 + [1] * 4 + [2] * 4
    assert lines[-6:] == whole[-6:]


def test_a_model_that_is_compiled_goes_on_through_the_drop_in(tmp_path):
    import loopscope

    def once(**run):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        model = small_model()
        model.compile("adam", "sparse_categorical_crossentropy")
        history = loopscope.fit(model, X, Y, epochs=2, verbose=0, **run)
        return model, history

    model, history = once(run=tmp_path / "run")
    again, same = once(run=tmp_path / "run", resume=True)
    assert same.history == history.history
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Ends that have nothing to go on with, and some that are no ends.


def test_a_finished_run_gives_its_end_again_and_trains_nothing(tmp_path):
    fit = fit_arrays(X, Y)
    whole, expected = train(small_loop, STEP, fit, run=tmp_path / "run")
    before = contents(tmp_path / "run")
    loop = fresh(small_loop, STEP)
    trained = []
    loop.subscribe(lambda event: trained.append(type(event)))
    history = fit(loop, run=tmp_path / "run", resume=True)
    assert ChunkEnd not in trained
    assert history.history == expected.history
    assert loop.state.sha256() == whole.state.sha256()
    assert contents(tmp_path / "run") == before


def contents(path):
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


def test_a_finished_run_can_be_given_more_epochs(tmp_path):
    whole, expected = train(
        small_loop, STEP, fit_arrays(X, Y, epochs=5), run=tmp_path / "whole"
    )
    train(small_loop, STEP, fit_arrays(X, Y, epochs=2), run=tmp_path / "run")
    loop, history = train(
        small_loop, STEP, fit_arrays(X, Y, epochs=5), run=tmp_path / "run", resume=True
    )
    assert loop.state.sha256() == whole.state.sha256()
    assert history.history == expected.history
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_resume_begins_a_run_where_there_is_none(tmp_path):
    loop, _ = train(
        small_loop, STEP, fit_arrays(X, Y), run=tmp_path / "a" / "b", resume=True
    )
    assert reading.summary(Folder(tmp_path / "a" / "b")).status == "finished"
    assert loop.step == 24


def test_a_training_ended_within_its_validation_goes_on(tmp_path):
    fit = fit_arrays(X, Y, validation_data=VALIDATION)
    whole, expected = train(small_loop, STEP, fit, run=tmp_path / "whole")
    loop = fresh(small_loop, STEP)

    def end(event):
        if isinstance(event, ChunkEnd) and event.phase == "test" and loop.step == 16:
            raise Ended

    loop.subscribe(end)
    with pytest.raises(Ended):
        fit(loop, run=Recording(tmp_path / "run", replay_steps=5))
    loop, history = train(small_loop, STEP, fit, run=tmp_path / "run", resume=True)
    assert loop.state.sha256() == whole.state.sha256()
    assert history.history == expected.history
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_save_that_is_asked_for_comes_at_the_end_of_the_chunk(tmp_path):
    loop = fresh(small_loop, STEP)
    saved = []

    def ask(event):
        if isinstance(event, ChunkEnd) and loop.step == 5:
            loop.save()
        elif isinstance(event, EpochEnd):
            saved.extend(
                p.name for p in (tmp_path / "run/checkpoints").glob("*5-0.json")
            )

    loop.subscribe(ask, chunk_steps={"train": 1})
    fit_arrays(X, Y)(loop, run=tmp_path / "run")
    assert "000000000005-0.json" in saved
    with pytest.raises(UsageError, match="no run is being recorded"):
        loop.save()


@pytest.mark.parametrize("at", [8, 11])
def test_a_checkpoint_is_in_memory_no_more_when_the_state_is_read(
    at, tmp_path, monkeypatch
):
    # Where variables are changed in place, to read them is to copy them.
    path = ended(tmp_path, fit_arrays(X, Y), at=at)
    loop = fresh(small_loop, STEP)
    heard, held = [], []
    loop.subscribe(heard.append)
    real = State.values

    def values(state):
        if heard and isinstance(heard[-1], Resumed):
            kinds = Standing, Checkpoint
            found = [o for o in gc.get_objects() if type(o) in kinds]
            held.append([o.step for o in found if o.state])
        return real(state)

    monkeypatch.setattr(State, "values", values)
    fit_arrays(X, Y)(loop, run=path, resume=True)
    assert held[0] == []


# What is refused, with everything left as it was.


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    train(small_loop, STEP, fit_arrays(X, Y), run=tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a run already.*resume=True"):
        train(small_loop, STEP, fit_arrays(X, Y), run=tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(RunError, match=re.escape("it holds 'thesis.tex'")):
        train(small_loop, STEP, fit_arrays(X, Y), run=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_wrong_data_leave_no_folder_behind(tmp_path):
    with pytest.raises(UsageError, match="same number of examples"):
        train(small_loop, STEP, fit_arrays(X, Y[:-1]), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("", "must be the path of a folder"),
        (3, "must be the path of a folder"),
    ],
)
def test_what_is_no_folder_is_refused(run, message):
    with pytest.raises(UsageError, match=message):
        train(small_loop, STEP, fit_arrays(X, Y), run=run)


def test_a_recording_of_no_steps_is_refused(tmp_path):
    with pytest.raises(UsageError, match="`replay_steps` must be a number above 0"):
        Recording(tmp_path, replay_steps=0)
    with pytest.raises(UsageError, match="`resume` must be True, False or 'anyway'"):
        train(small_loop, STEP, fit_arrays(X, Y), run=tmp_path / "run", resume="yes")


def ended(tmp_path, fit, at=10):
    path = tmp_path / "run"
    train(small_loop, STEP, fit, at=at, run=Recording(path, replay_steps=4))
    return path


def wider(gear):
    return small_loop(
        gear,
        model=keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(7), keras.layers.Dense(3)]
        ),
    )


def slower(gear):
    return small_loop(gear, optimizer=keras.optimizers.Adam(0.5))


@pytest.mark.parametrize(
    ("make", "gear", "data", "callbacks", "named"),
    [
        (wider, STEP, (X, Y), [], "model: was"),
        (slower, STEP, (X, Y), [], "training/optimizer: was"),
        (small_loop, "eager", (X, Y), [], f"gear: was '{STEP}', is 'eager'"),
        (small_loop, STEP, (X + 1e-3, Y), [], "data: was"),
        (
            small_loop,
            STEP,
            (X, Y),
            [keras.callbacks.TerminateOnNaN()],
            "callbacks: was",
        ),
    ],
    ids=["model", "optimizer", "gear", "data", "callbacks"],
)
def test_what_can_change_bits_is_named_and_refused(
    make, gear, data, callbacks, named, tmp_path
):
    path = ended(tmp_path, fit_arrays(X, Y))
    before = contents(path)
    fit = fit_arrays(*data, callbacks=callbacks)
    with pytest.raises(RunError, match=re.escape(named)) as raised:
        train(make, gear, fit, run=path, resume=True)
    assert "--anyway" in str(raised.value)
    assert contents(path) == before


def test_other_threads_flags_and_versions_are_named(tmp_path, monkeypatch):
    path = ended(tmp_path, fit_arrays(X, Y))
    manifest = json.loads((path / "run.json").read_text())["content"]
    manifest["identity"]["threads"]["cores"] = 512
    manifest["identity"]["versions"]["keras"] = "3.0.0"
    Folder(path).write_manifest({k: v for k, v in manifest.items() if k != "format"})
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    with pytest.raises(RunError) as raised:
        train(small_loop, STEP, fit_arrays(X, Y), run=path, resume=True)
    for named in (
        "threads/cores: was 512, is",
        "versions/keras: was '3.0.0', is",
        "flags/XLA_FLAGS: was None, is",
    ):
        assert named in str(raised.value)


def test_anyway_goes_on_whatever_has_changed(tmp_path):
    path = ended(tmp_path, fit_arrays(X, Y))
    fit = fit_arrays(X + 1e-3, Y)
    loop, history = train(small_loop, STEP, fit, run=path, resume="anyway")
    assert loop.step == 24
    assert len(history.epoch) == 3


def test_auto_takes_the_gear_of_the_run(tmp_path):
    path = ended(tmp_path, fit_arrays(X, Y))
    loop, _ = train(small_loop, "auto", fit_arrays(X, Y), run=path, resume=True)
    assert loop.gear.name == STEP


def test_the_seed_of_the_run_counts(tmp_path):
    path = ended(tmp_path, fit_arrays(X, Y))
    whole, _ = train(small_loop, STEP, fit_arrays(X, Y))

    def make(gear):
        loop = small_loop(gear)
        loop.seed = 77
        return loop

    loop, _ = train(make, STEP, fit_arrays(X, Y), run=path, resume=True)
    assert loop.state.sha256() == whole.state.sha256()


# What a run holds.


def test_the_manifest_says_what_runs(tmp_path):
    fit_arrays(X, Y)(fresh(small_loop, STEP), run=tmp_path / "run")
    manifest = Folder(tmp_path / "run").manifest
    assert manifest["format"] == 1
    assert manifest["seed"] == 0
    assert manifest["arguments"]["batch_size"] == 8
    assert manifest["identity"]["gear"] == STEP
    assert manifest["identity"]["backend"] == keras.backend.backend()
    assert "keras" in manifest["identity"]["versions"]
    assert manifest["configuration"]["model"]["class_name"] in (
        "Sequential",
        "Functional",
    )
    assert manifest["configuration"]["optimizer"]["class_name"]
    assert manifest["source"]["kind"] == "ArraySource"
    with reading.journal(Folder(tmp_path / "run")) as journal:
        assert len(journal.fact("data")) == 64


def test_warnings_and_problems_are_in_the_journal(tmp_path):
    import warnings

    class Warns(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            warnings.warn("the loss looks odd", stacklevel=1)

    with warned("looks odd"):
        fit_arrays(X, Y, epochs=1, callbacks=[Warns()])(
            fresh(small_loop, STEP), run=tmp_path / "run"
        )
    with reading.journal(Folder(tmp_path / "run")) as journal:
        (found,) = (e for e in journal.events("warning") if "odd" in e["message"])
    assert found["category"] == "UserWarning"
    assert found["step"] == 8


def test_the_journal_says_what_a_crash_has_lost(tmp_path):
    path = tmp_path / "run"
    train(small_loop, STEP, fit_arrays(X, Y), at=10, run=Recording(path, 4))
    with reading.journal(Folder(path)) as journal:
        recorded = journal.recorded()
    train(small_loop, STEP, fit_arrays(X, Y), run=path, resume=True)
    with reading.journal(Folder(path)) as journal:
        (found,) = journal.events("resume")
    assert found["step"] == 8
    assert found["recorded"] == recorded
    assert found["lost"] == recorded - 8


class Calls(keras.callbacks.Callback):
    """Writes down which batches it was told of."""

    def __init__(self):
        super().__init__()
        self.told = []

    def on_train_batch_begin(self, batch, logs=None):
        self.told.append(("begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.told.append(("end", batch))


def test_hooks_are_called_as_undisturbed_where_keras_calls_them_for_several_steps(
    tmp_path,
):
    told = {}

    def fit(loop, **run):
        calls = Calls()
        told[folder_name(run)] = calls
        return fit_arrays(X, Y, callbacks=[calls])(loop, **run)

    def make(gear):
        loop = small_loop(gear)
        loop.model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=3,
        )
        return loop

    check(make, FUSED, fit, tmp_path, at=11, every=2)
    assert told["files-ended"].told == told["files-whole"].told


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_worker_does_not_hold_the_run_of_a_dead_parent(tmp_path):
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    assert writer(tmp_path / "lock")["pid"] == os.getpid()
    (up, say_up), (end, say_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say_up, b"x")
        os.read(end, 1)
        os._exit(0)
    os.read(up, 1)
    lock.release()  # As the kernel does for a process that dies.
    try:
        assert writer(tmp_path / "lock") is None
    finally:
        os.write(say_end, b"x")
        os.waitpid(child, 0)
        for descriptor in (up, say_up, end, say_end):
            os.close(descriptor)
