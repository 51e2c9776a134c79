"""What `fit` finds by itself as training begins; and that nothing else changes."""

import random
import re
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from planted import BUGS, FAMILIES, built_in
from test_healthy import SMALL

import loopscope
from loopscope import Experiment, Loop
from loopscope.doctor import first_chunk
from loopscope.doctor.checks import ALL, Cheap
from loopscope.errors import DoctorWarning
from loopscope.events import ChunkEnd, Diagnosed
from models import FUSED, STEP, TENSORFLOW, blobs, fresh, numbers, small_loop

CHEAP = tuple(name for name, check in ALL.items() if isinstance(check, Cheap))
DENSE = FAMILIES[0]


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    """On, and with time enough on a machine that is busy with something else."""
    monkeypatch.delenv("LOOPSCOPE_DOCTOR", raising=False)
    monkeypatch.setattr(first_chunk, "BUDGET_S", 60.0)


def heard(loop, kind=Diagnosed):
    """The events of a kind that a loop sends from now on."""
    events = []
    loop.subscribe(lambda event: events.append(event) if type(event) is kind else None)
    return events


def trained(loop, *data, **options):
    """What the doctor told of a training, and the warnings that came of it."""
    options = {"batch_size": 16, "epochs": 3, "verbose": 0, **options}
    events = heard(loop)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.fit(*data, **options)
    return events, [w for w in caught if w.category is DoctorWarning]


def with_dropout(gear=STEP):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(16, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.3, seed=1),
            layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Loop(model, "rmsprop", loss, ["accuracy"], gear=gear, seed=0)


# What is found.


def test_an_error_is_warned_of_once_with_what_to_change():
    _, plant = BUGS["dropout_that_drops_nothing"]
    loop, data = plant(DENSE)
    (event,), (warned,) = trained(loop, *data)
    assert [f.check for f in event.findings] == ["training_flag"]
    assert event.checks == CHEAP
    assert not event.why_not
    text = str(warned.message)
    assert "drops nothing in the train step (layer " in text
    assert "Call the model with training=True" in text
    assert "docs/doctor/training_flag.md" in text
    assert "fit(doctor=False)" in text
    assert warned.filename == __file__


FOUND = [
    name
    for name, (check, _) in BUGS.items()
    if check in CHEAP and check not in ("labels", "nonfinite")
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("name", FOUND)
def test_a_planted_bug_is_found_as_training_begins(name, family):
    check, plant = BUGS[name]
    loop, data = plant(family)
    options = data[-1] if isinstance(data[-1], dict) else {}
    (event,), _ = trained(loop, *(data[:-1] if options else data), **options)
    assert check in [f.check for f in event.findings] or event.why_not


@pytest.mark.slow
@pytest.mark.parametrize("healthy", SMALL, ids=lambda healthy: healthy.__name__)
def test_nothing_is_found_in_a_healthy_training(healthy):
    loop, data = healthy()
    names = ("x", "y", "sample_weight")
    options = {} if len(data) == 1 else {"batch_size": 32}
    given = dict(zip(names, data, strict=False))
    events = heard(loop)
    loop.fit(**given, **options, epochs=3, verbose=0)
    assert not [f for event in events for f in event.findings]


@pytest.mark.slow_on_jax
def test_bad_data_are_found_in_every_gear_and_on_every_backend():
    x, y = blobs(64)
    x[3] = np.nan
    (event,), caught = trained(with_dropout(FUSED), x, y)
    assert ("inputs", "error") in [(f.check, f.severity) for f in event.findings]
    assert any("not finite in 'x'" in str(w.message) for w in caught)


@pytest.mark.slow_on_jax
def test_what_only_costs_accuracy_is_told_but_not_warned_of():
    x, y = blobs(64)
    (event,), caught = trained(with_dropout(), 30 * x, y)
    assert {f.severity for f in event.findings} <= {"warning"}
    assert not caught


@pytest.mark.slow_on_jax
def test_a_softmax_that_keras_is_warned_of_is_not_warned_of_again():
    model = DENSE.model(layers.Dense(3, activation="softmax"))
    loop = built_in(model)
    (event,), caught = trained(loop, DENSE.x(), DENSE.y())
    assert [f.check for f in event.findings] == ["from_logits"]
    assert not caught


@pytest.mark.slow_on_jax
def test_what_the_last_step_of_the_chunk_does_not_show_is_not_said(monkeypatch):
    chance = []

    def by_chance(facts):
        chance.append(facts.first.look.loss)
        if len(chance) == 1:
            yield first_chunk.Finding("chance", "error", "", "", "")

    monkeypatch.setitem(ALL, "chance", Cheap(by_chance))
    (event,), caught = trained(with_dropout(), *blobs(64))
    assert len(chance) == 2
    assert "chance" in event.checks
    assert not event.findings
    assert not caught


# When it looks.


@pytest.mark.slow_on_jax
def test_it_looks_once_in_the_life_of_a_step():
    loop = with_dropout()
    (_,), _ = trained(loop, *blobs(64))
    again, _ = trained(loop, *blobs(64))
    assert not again
    loop.model.compile("sgd", "sparse_categorical_crossentropy")
    (_,), _ = trained(loop, *blobs(64))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_it_can_be_turned_off(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("LOOPSCOPE_DOCTOR", "0")
    options = {"doctor": False} if how == "argument" else {}
    events, _ = trained(with_dropout(), *blobs(64), **options)
    assert not events


def test_in_gear_eager_the_built_in_step_is_looked_into():
    _, y = blobs(64)
    model = DENSE.model(layers.Dense(3))
    loop = Loop(model, "sgd", "sparse_categorical_crossentropy", gear="eager", seed=0)
    (event,), _ = trained(loop, DENSE.x(64), y, epochs=1)
    assert not event.why_not
    assert "from_logits" in {finding.check for finding in event.findings}


def test_in_gear_eager_no_own_step_is_run_once_more():
    ran = []
    model, optimizer = DENSE.model(layers.Dense(1)), keras.optimizers.SGD(1e-3)
    loop = Loop(model, gear="eager", seed=0)

    @loop.train_step
    def train_step(x, y):
        ran.append(1)
        loss, grads = loopscope.value_and_grad(
            lambda: keras.ops.mean(keras.ops.square(model(x) - y)),
            model.trainable_variables,
        )
        optimizer.apply(grads, model.trainable_variables)
        return loss

    x, y = DENSE.x(32), numbers(32, 1)
    (event,), _ = trained(loop, x, y, epochs=1)
    assert len(ran) == 2
    assert "gear eager" in event.why_not


def test_a_step_that_would_take_too_long_is_not_looked_into(monkeypatch):
    monkeypatch.setattr(first_chunk, "BUDGET_S", 0.01)
    (event,), _ = trained(with_dropout(), *blobs(64))
    assert "it would take about" in event.why_not
    assert not event.findings


@pytest.mark.skipif(not TENSORFLOW, reason="compiling cannot be broken off")
def test_a_look_that_takes_too_long_all_the_same_is_left(monkeypatch):
    monkeypatch.setattr(first_chunk, "BUDGET_S", 0.02)
    monkeypatch.setattr(first_chunk, "look_s", lambda step_s, runner: 0.0)
    loop = with_dropout()
    before = heard(loop, ChunkEnd)
    (event,), _ = trained(loop, *blobs(64))
    assert "TimeoutError" in event.why_not
    assert sum(chunk.steps for chunk in before) == 12


@pytest.mark.skipif(TENSORFLOW, reason="TensorFlow compiles nothing for a look")
def test_where_it_has_to_be_compiled_the_forward_pass_may_be_all(monkeypatch):
    monkeypatch.setattr(first_chunk, "WHOLE", 1e9)
    _, plant = BUGS["dropout_that_drops_nothing"]
    loop, data = plant(DENSE)
    (event,), (warned,) = trained(loop, *data)
    assert [f.check for f in event.findings] == ["training_flag"]
    assert "drops nothing" in str(warned.message)
    _, plant = BUGS["a_learning_rate_of_zero"]
    loop, data = plant(DENSE)
    (event,), _ = trained(loop, *data)
    assert not event.findings
    assert event.checks == CHEAP


@pytest.mark.slow_on_jax
def test_a_trial_of_a_few_steps_is_looked_at_as_well():
    loop = with_dropout()
    (event,), _ = trained(loop, *blobs(64), fast_dev_run=3)
    assert event.checks == CHEAP
    assert loop.step == 0


# That nothing else changes.


def both(make, data, **options):
    """The state, the logs and the next random numbers, without the doctor and with."""
    results = []
    for doctor in (False, True):
        loop = fresh(make, FUSED)
        events = heard(loop)
        given = data() if callable(data) else data
        history = loop.fit(*given, verbose=0, epochs=3, doctor=doctor, **options)
        assert len(events) == doctor
        drawn = (random.random(), np.random.rand(), _next_of_the_backend())
        results.append((loop.state.sha256(), history.history, drawn))
    return results


def _next_of_the_backend():
    if not TENSORFLOW:
        return None
    import tensorflow as tf

    return float(tf.random.uniform(()))


def noisy(gear):
    """A step that draws from everything there is outside of Keras."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3)])
    optimizer = keras.optimizers.Adam(1e-3)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, gear=gear, seed=0)

    @loop.train_step
    def train_step(x, y):
        x = x + 0.0 * (random.random() + np.random.rand())
        if TENSORFLOW:
            import tensorflow as tf

            x = x + 0.0 * tf.random.normal((4,))
            x = x + 0.1 * keras.random.normal((4,))
        loss, grads = loopscope.value_and_grad(
            lambda: loss_fn(y, model(x, training=True)), model.trainable_variables
        )
        optimizer.apply(grads, model.trainable_variables)
        return loss

    return loop


@pytest.mark.parametrize(
    "make", [with_dropout, pytest.param(noisy, marks=pytest.mark.slow)]
)
def test_not_a_bit_changes(make):
    without, with_it = both(make, blobs(64), batch_size=16)
    assert without == with_it


@pytest.mark.slow_on_jax
def test_not_a_batch_of_a_stream_is_missed():
    taken = []

    def stream():
        x, y = blobs(48)
        taken.append(0)

        def batches():
            for i in range(0, 48, 8):
                taken[-1] += 1
                yield x[i : i + 8], y[i : i + 8]

        return (batches(),)

    without, with_it = both(with_dropout, stream, steps_per_epoch=2)
    assert without == with_it
    assert taken == [6, 6]


@pytest.mark.slow_on_jax
def test_a_recorded_run_says_what_was_found_and_replays_to_the_same_bits(tmp_path):
    x, y = blobs(64)
    data = {"x": 30 * x, "y": y, "batch_size": 16, "epochs": 3}

    def experiment():
        return Experiment(fresh(with_dropout, FUSED), **data)

    made = experiment()
    made.fit(run=tmp_path / "run", verbose=0)
    run = loopscope.open_run(tmp_path / "run", experiment=experiment())
    (event,) = [e for e in run.events if e["kind"] == "doctor"]
    assert event["checks"] == list(CHEAP)
    assert event["step"] > 0
    assert event["findings"][0]["check"] == "inputs"
    assert not [e for e in run.events if e["kind"] in ("warning", "problem")]
    assert run.verify(whole=True).verified
    without = experiment()
    without.fit(verbose=0, doctor=False)
    assert without.loop.state.sha256() == made.loop.state.sha256()


def test_the_page_names_the_checks_that_are_made():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text("utf-8")
    _, _, listed = page.partition("<!-- cheap:begin -->")
    listed, _, _ = listed.partition("<!-- cheap:end -->")
    assert tuple(re.findall(r"`(\w+)`", listed)) == CHEAP


def test_a_training_that_goes_on_in_the_middle_is_not_looked_at(tmp_path):
    x, y = blobs(64)
    options = {"batch_size": 16, "verbose": 0, "run": tmp_path, "resume": True}
    first = fresh(small_loop, FUSED)
    begun = heard(first)
    first.fit(x, y, epochs=2, **options)
    second = fresh(small_loop, FUSED)
    gone_on = heard(second)
    second.fit(x, y, epochs=4, **options)
    assert (len(begun), len(gone_on)) == (1, 0)
    whole = fresh(small_loop, FUSED)
    whole.fit(x, y, batch_size=16, verbose=0, epochs=4, doctor=False)
    assert whole.state.sha256() == second.state.sha256()
