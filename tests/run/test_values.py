"""What steps and metrics give is in the journal as it was: values, dtypes and names."""

import json
import warnings

import keras
import numpy as np
import pytest
from trainings import STEPS, At, train

import loopscope
from loopscope import Loop, Recording
from loopscope.events import ChunkEnd
from loopscope.run import checkpoint, reading
from loopscope.run.folder import Folder
from models import FUSED, STEP, blobs, fresh, small_loop, small_model

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

NAMES = [
    "it's",
    'say "hi"',
    "two words",
    "zwölf 十二 🙂",
    "a/b\\c",
    "%s; DROP TABLE steps; --",
    "$float",
    "step",
    "",
]

DTYPES = ["bfloat16", "float16", "float32", "int8", "int32", "uint8", "bool"]


class Heard:
    """Keeps what steps returned, as listeners were told."""

    def __init__(self):
        self.parts = {}

    def __call__(self, event):
        if isinstance(event, ChunkEnd) and event.phase == "train":
            for name, values in event.outputs.items():
                self.parts.setdefault(name, []).append(np.array(values))

    def whole(self):
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}


def returning(outputs):
    """A loop whose step counts, and returns what `outputs` makes of the count."""

    def make(gear):
        model = small_model()
        count = keras.Variable(np.zeros((), "float32"), name="count")
        loop = Loop(model, optimizer="sgd", gear=gear, seed=0)

        @loop.train_step
        def train_step(x, y):
            count.assign_add(1.0)
            return outputs(count + 0.0 * keras.ops.sum(model(x)))

        return loop

    return make


def recorded(make, path, gear=FUSED):
    loop, heard = fresh(make, gear), Heard()
    loop.subscribe(heard)
    x, y = blobs(64)
    with warnings.catch_warnings():
        # Keras has an opinion on some names.
        warnings.simplefilter("ignore", UserWarning)
        loop.fit(x, y, batch_size=8, epochs=2, verbose=0, run=path)
    return heard.whole()


def assert_recorded(path, heard):
    """Every output of every step is there, bit for bit, bfloat16 as float32."""
    columns = loopscope.open_run(path).steps
    assert list(columns.pop("step")) == list(range(2 * STEPS))
    assert set(columns) == set(heard)
    for name, values in heard.items():
        wide = values.astype("float32") if values.dtype.kind == "V" else values
        assert columns[name].dtype == wide.dtype, name
        assert columns[name].tobytes() == wide.tobytes(), name


@pytest.mark.parametrize("gear", [FUSED, STEP])
def test_outputs_of_every_dtype_are_recorded_as_they_are(gear, tmp_path):
    def outputs(count):
        return {name: keras.ops.cast(count % 3, name) for name in DTYPES}

    heard = recorded(returning(outputs), tmp_path / "run", gear)
    assert [heard[name].dtype.name for name in DTYPES] == DTYPES
    assert_recorded(tmp_path / "run", heard)
    for name in DTYPES:
        step, mean, low, high = loopscope.open_run(tmp_path / "run").curve(name, 4)
        assert list(step) == [0, 4, 8, 12]
        assert all((low <= mean) & (mean <= high))


def test_names_of_any_characters_are_recorded(tmp_path):
    names = [name for name in NAMES if name != "step"]

    def outputs(count):
        return {name: count * i for i, name in enumerate(names)}

    heard = recorded(returning(outputs), tmp_path / "run")
    assert set(heard) == set(names)
    assert_recorded(tmp_path / "run", heard)
    run = loopscope.open_run(tmp_path / "run")
    for i, name in enumerate(names):
        assert list(run.curve(name, 1)[3]) == [2 * STEPS * i]


def test_an_output_that_is_called_step_does_not_hide_which_step_it_is(tmp_path):
    recorded(returning(lambda count: {"step": -count, "loss": count}), tmp_path / "run")
    run = loopscope.open_run(tmp_path / "run")
    assert list(run.steps["step"]) == list(range(2 * STEPS))
    assert list(run.steps["loss"]) == list(range(1, 2 * STEPS + 1))
    assert list(run.curve("step", 2 * STEPS)[1]) == list(range(-1, -2 * STEPS - 1, -1))


def test_numbers_that_are_none_are_recorded_and_read_back(tmp_path):
    def outputs(count):
        zero = count - count
        return {
            "inf": count / zero,
            "-inf": -count / zero,
            "nan": zero / zero,
            "-0": -zero,
            "some": keras.ops.where(count % 2 == 0, count / zero, count),
        }

    heard = recorded(returning(outputs), tmp_path / "run")
    assert np.isnan(heard["nan"]).all()
    assert np.isposinf(heard["inf"]).all()
    assert np.isneginf(heard["-inf"]).all()
    assert np.signbit(heard["-0"]).all()
    assert_recorded(tmp_path / "run", heard)
    run = loopscope.open_run(tmp_path / "run")
    _, mean, low, high = run.curve("some", 4)
    assert list(mean) == [2, 6, 10, 14]
    assert (list(low), list(high)) == ([1, 5, 9, 13], [3, 7, 11, 15])
    assert np.isnan(run.curve("nan", 2)[1]).all()


def exploding(gear):
    return small_loop(gear, optimizer=lambda: keras.optimizers.SGD(1e30))


@pytest.mark.parametrize("gear", [FUSED, STEP])
def test_a_training_whose_loss_is_no_number_is_recorded_and_gone_on_with(
    gear, tmp_path
):
    path = tmp_path / "run"
    loop, history = train(make=exploding, gear=gear, epochs=4, validation=True)
    assert not np.isfinite(history.history["loss"]).any()
    options = {"make": exploding, "gear": gear, "validation": True}
    with pytest.raises(ZeroDivisionError):
        train(path, epochs=4, acts={1: lambda: 1 / 0}, **options)
    resumed, again = train(path, epochs=4, resume=True, **options)
    assert resumed.state.sha256() == loop.state.sha256()
    assert repr(again.history) == repr(history.history)
    run = loopscope.open_run(path)
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2, 3]
    for name, values in history.history.items():
        assert repr([row[name] for row in run.epochs]) == repr(values)
    assert not np.isfinite(run.summary.loss)
    assert run.summary.problem == ""


def test_the_best_checkpoint_is_none_whose_metric_is_no_number(tmp_path):
    path = tmp_path / "run"
    train(path, make=exploding, validation=True)
    last = sorted((path / "checkpoints").glob("*-end.json"))[-1]
    content = json.loads(last.read_text())["content"]["content"]
    assert content["best"] == {"name": None, "value": None}


class Worse(At):
    """Asks for checkpoints, and spoils the weights for good before epoch 3."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            self.model.optimizer.learning_rate = 0.0
            for weight in self.model.trainable_variables:
                weight.assign(-10.0 * weight)


@pytest.mark.parametrize("every", [1, 99], ids=["at_once", "later"])
def test_the_best_checkpoint_stays_that_was_there_before_it_was_the_best(
    every, tmp_path
):
    path, loop = tmp_path / "run", fresh(small_loop, FUSED)
    # Every epoch ends at a checkpoint that is due, and only three may stay.
    how = Recording(path, replay_steps=STEPS, disk_bytes=1, monitor="loss")
    more = [Worse(loop, every)]
    history = loop.fit(
        *blobs(64), batch_size=8, epochs=8, verbose=0, run=how, callbacks=more
    )
    assert np.argmin(history.history["loss"]) == 2
    found, problems = checkpoint.entries(path / "checkpoints")
    assert not problems
    best = found[-1].content["best"]
    assert best["value"] == history.history["loss"][2]
    assert {e.name: e.step for e in found}[best["name"]] == 3 * STEPS


class Twice(keras.metrics.Metric):
    """A metric whose result is a dict."""

    def __init__(self, name="twice"):
        super().__init__(name=name)
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(1.0)

    def reset_state(self):
        self.count.assign(0.0)

    def result(self):
        return {"it's one": self.count + 0.0, 'a "second"': 2 * self.count}


def test_metrics_of_any_name_and_with_dicts_are_recorded(tmp_path):
    path = tmp_path / "run"

    def make(gear):
        metrics = [
            keras.metrics.SparseCategoricalAccuracy(name="it's"),
            keras.metrics.SparseCategoricalAccuracy(name='zwölf "十二" $x'),
            Twice(),
        ]
        return small_loop(gear, metrics=metrics)

    with pytest.raises(ZeroDivisionError):
        train(path, make=make, epochs=3, acts={1: lambda: 1 / 0}, validation=True)
    loop, history = train(path, make=make, epochs=3, resume=True, validation=True)
    undisturbed, whole = train(make=make, epochs=3, validation=True)
    assert history.history == whole.history
    assert 'val_zwölf "十二" $x' in history.history
    assert history.history['a "second"'] == [2 * STEPS] * 3
    assert history.history['val_a "second"'] == [4.0] * 3
    assert loop.state.sha256() == undisturbed.state.sha256()
    rows = reading.epochs(Folder(path))
    for name, values in history.history.items():
        assert [row[name] for row in rows] == values


def test_a_metric_that_is_called_like_a_column_does_not_hide_it(tmp_path):
    path = tmp_path / "run"

    def make(gear):
        names = ["epoch", "steps", "seconds"]
        metrics = [keras.metrics.SparseCategoricalAccuracy(name=n) for n in names]
        return small_loop(gear, metrics=metrics)

    train(path, make=make, epochs=2)
    rows = reading.epochs(Folder(path))
    assert [(row["epoch"], row["steps"]) for row in rows] == [(0, STEPS), (1, STEPS)]


@pytest.mark.once
def test_warnings_of_any_text_are_in_the_journal(tmp_path):
    path = tmp_path / "run"
    text = 'it\'s "10%" of \x00 zwölf 十二 🙂 \ud800\nand more'
    with pytest.warns(UserWarning, match="it's"):
        train(path, epochs=1, acts={0: lambda: warnings.warn(text, stacklevel=1)})
    warned = [e for e in loopscope.open_run(path).events if e["kind"] == "warning"]
    assert [e["message"] for e in warned] == [text]


@pytest.mark.once
def test_a_run_in_a_folder_of_any_name_can_be_read(tmp_path):
    path = tmp_path / 'it\'s 100% "zwölf" 十二?#&'
    loop = fresh(small_loop, FUSED)
    loop.fit(*blobs(64), batch_size=8, verbose=0, run=Recording(path))
    run = loopscope.open_run(path)
    assert run.summary.status == "finished"
    assert len(run.steps["loss"]) == STEPS
