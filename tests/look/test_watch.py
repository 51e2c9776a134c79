"""A watched step measures what an opened step shows, and trains to the same bits."""

import sqlite3
from contextlib import closing

import keras
import numpy as np
import pytest
from keras import layers
from looking import looked_into, repeated

import loopscope
from loopscope.errors import RunError, UsageError
from loopscope.events import ChunkEnd, Incident
from loopscope.watching import SIGNALS
from models import (
    ALL,
    BATCH,
    FUSED,
    ONE_GEAR,
    TENSORFLOW,
    blobs,
    convnet_with_batchnorm,
    differences,
    fresh,
    gan,
    halved,
    mixed_loop,
    small_loop,
    some_of,
    warned,
)

KINDS = {
    "gradient_norm",
    "weight_norm",
    "update_ratio",
    "activation_mean",
    "activation_std",
    "activation_zeros",
}


class Heard:
    """What a loop tells of signals and incidents."""

    def __init__(self, loop, limit=None):
        self.signals, self.incidents, self.losses = [], [], []
        loop.subscribe(self, chunk_steps={"train": limit} if limit else None)

    def __call__(self, event):
        if isinstance(event, ChunkEnd) and event.phase == "train":
            self.signals.append(event.signals)
            self.losses += next(iter(event.outputs.values())).tolist()
        elif isinstance(event, Incident):
            self.incidents.append(event)

    @property
    def steps(self):
        return [int(step) for found in self.signals for step in found.steps]

    def at(self, step):
        for found in self.signals:
            for i in np.flatnonzero(found.steps == step):
                return {name: float(v[i]) for name, v in found.values.items()}
        raise AssertionError(f"no signals of step {step}")


def by_layer(records, value):
    """Norms of variables as norms of layers."""
    squares = {}
    for record in records:
        layer = record.path.rpartition("/")[0]
        squares[layer] = squares.get(layer, 0.0) + value(record) ** 2
    return {layer: np.sqrt(square) for layer, square in squares.items()}


@pytest.mark.parametrize("build", some_of(ALL, 2, 0))
def test_signals_are_what_the_opened_step_shows(build):
    make, data = build()
    loop = fresh(make, FUSED, watch=2)
    heard = Heard(loop)
    x, y = repeated(data, 3)
    step = looked_into(loop, x, y, batch_size=BATCH, steps={2}).opened[2]
    assert heard.steps == [0, 2]
    found = heard.at(2)
    assert {name.partition("/")[0] for name in found} == KINDS

    gradients = by_layer(step.gradients, lambda g: g.stats.norm if g.stats else 0.0)
    weights = by_layer(step.updates, lambda u: u.weight_norm)
    updates = by_layer(step.updates, lambda u: u.norm)
    assert {n.partition("/")[2] for n in found if "gradient" in n} == set(gradients)
    for layer, value in gradients.items():
        assert found[f"gradient_norm/{layer}"] == pytest.approx(value, rel=1e-4)
        assert found[f"weight_norm/{layer}"] == pytest.approx(weights[layer], rel=1e-5)
        ratio = updates[layer] / weights[layer]
        assert found[f"update_ratio/{layer}"] == pytest.approx(ratio, rel=1e-3)

    outputs = {o.path: o for o in reversed(step.layers)}  # The first call counts.
    paths = [n.partition("/")[2] for n in found if n.startswith("activation_mean")]
    assert paths
    for path in paths:
        stats = outputs[path].stats
        scale = abs(stats.mean) + stats.std
        mean, std = found[f"activation_mean/{path}"], found[f"activation_std/{path}"]
        assert mean == pytest.approx(stats.mean, abs=1e-4 * scale)
        assert std == pytest.approx(stats.std, rel=1e-3)
        assert found[f"activation_zeros/{path}"] == pytest.approx(stats.zeros, abs=1e-6)


@pytest.mark.parametrize("build", some_of(ALL, 1, 0))
def test_watching_trains_the_same(build):
    """To the same bits, but that TensorFlow computes one BatchNorm in another way."""
    make, data = build()
    x, y = repeated(data, 5)
    ends = []
    for watch in (None, 2):
        loop = fresh(make, FUSED, watch=watch)
        heard = Heard(loop)
        loop.fit(x, y, batch_size=BATCH, epochs=2, verbose=0)
        ends.append({**loop.state.numpy(), "losses": heard.losses})
    apart = differences(*ends)
    most = 1e-6 if TENSORFLOW and build is convnet_with_batchnorm else 0.0
    assert max(apart.values()) <= most, apart


@pytest.mark.parametrize("gear", ONE_GEAR)
def test_the_same_steps_are_measured_however_chunks_are_cut(gear):
    x, y = blobs(rows=BATCH * 11)
    found = []
    for limit in (None, 1, 4):
        loop = fresh(mixed_loop, gear, watch=3)
        heard = Heard(loop, limit)
        loop.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
        assert heard.steps == [0, 3, 6, 9]
        found.append([heard.at(step) for step in heard.steps])
    assert found[0] == found[1] == found[2]


def test_what_is_not_watched_has_nothing_of_it():
    x, y = blobs()

    def outputs(loop):
        loop.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
        (trace,) = loop._runner.stages["train"].traces.values()
        size = len(trace.handle.graph.get_operations()) if TENSORFLOW else 0
        return set(trace.outputs), size

    plain, watched = fresh(small_loop, FUSED), fresh(small_loop, FUSED, watch=2)
    names, size = outputs(plain)
    assert names == {"loss"}
    with_signals, larger = outputs(watched)
    assert with_signals == {"loss", SIGNALS}
    assert larger > size or not TENSORFLOW
    heard = Heard(watched)
    watched.watch = None
    assert outputs(watched) == (names, size)
    assert heard.signals[0] is None


@pytest.mark.parametrize("gear", ONE_GEAR)
def test_the_first_value_that_is_not_finite_is_found_at_its_step(gear):
    x, y = blobs(rows=BATCH * 30)
    x[BATCH * 17 + 3, 1] = np.nan
    loop = fresh(small_loop, gear, watch=10)
    heard = Heard(loop)
    with warned("Step 17: the norm of the gradient of .* is nan"):
        loop.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False)
    (incident,) = heard.incidents
    assert (incident.kind, incident.step) == ("nonfinite", 17)
    assert incident.examples == (BATCH * 17 + 3,)
    assert incident.first.startswith("batch x")
    assert incident.opened.step == 17
    assert np.isnan(incident.value)


class Log(layers.Layer):
    def call(self, inputs):
        return keras.ops.log(inputs)


@pytest.mark.parametrize("gear", halved([FUSED, "eager"]))
def test_a_value_that_the_loss_hides_is_found(gear):
    """A ReLU makes 0 of NaN on TensorFlow; the gradient before it stays NaN."""
    x, y = blobs(rows=BATCH * 12)
    x = np.abs(x) + 1.0
    x[BATCH * 7, 2] = -1.0

    def make(gear, **options):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                Log(name="log"),
                layers.Dense(8, activation="relu"),
                layers.Dense(3),
            ]
        )
        return small_loop(gear, model=model, **options)

    loop = fresh(make, gear, watch=5)
    heard = Heard(loop)
    with warned("Step 7: the norm of the gradient of .* is nan; first not finite"):
        loop.fit(x, y, batch_size=BATCH, epochs=1, verbose=0, shuffle=False)
    (incident,) = heard.incidents
    assert "log" in incident.first
    assert incident.examples == (BATCH * 7,)


@pytest.mark.parametrize("gear", ONE_GEAR)
def test_a_spike_is_found_at_its_step_and_changes_nothing(gear):
    x, y = blobs(rows=BATCH * 60)
    x[BATCH * 41 + 5] *= 500
    y[BATCH * 41 + 5] = (y[BATCH * 41 + 5] + 1) % 3
    ends = []
    for watch in (None, 7):
        loop = fresh(small_loop, gear, watch=watch)
        heard = Heard(loop)
        arguments = {"batch_size": BATCH, "epochs": 1, "verbose": 0, "shuffle": False}
        if watch is None:
            loop.fit(x, y, **arguments)
        else:
            with warned("Step 41: .* times the largest of the steps before"):
                loop.fit(x, y, **arguments)
        ends.append((heard.losses, loop.state.sha256()))
    incident = heard.incidents[0]
    assert (incident.kind, incident.step) == ("spike", 41)
    assert incident.examples[0] == BATCH * 41 + 5
    assert incident.first == ""
    assert incident.value > 4 * incident.usual
    assert ends[0] == ends[1]


def test_loss_scaling_that_skips_a_step_is_none():
    x, y = blobs(rows=BATCH * 40)

    def make(gear, **options):
        keras.config.set_dtype_policy("mixed_float16")
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), initial_scale=2.0**40
        )
        return small_loop(gear, optimizer=optimizer, **options)

    loop = fresh(make, FUSED, watch=1)
    heard = Heard(loop)
    loop.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
    assert not heard.incidents
    skipped, last = heard.at(0), heard.at(39)
    gradients = [n for n in last if n.startswith("gradient_norm")]
    assert not all(np.isfinite(skipped[n]) for n in gradients)
    assert all(0 < last[n] < 100 for n in gradients)


def test_a_healthy_training_has_no_incident():
    x, y = blobs(rows=BATCH * 100)
    loop = fresh(small_loop, FUSED, watch=5)
    heard = Heard(loop)
    loop.fit(x, y, batch_size=BATCH, epochs=5, verbose=0)
    assert not heard.incidents
    assert len(heard.steps) == 100


@pytest.mark.skipif(not TENSORFLOW, reason="a tape is TensorFlow's")
@pytest.mark.parametrize("gear", ["eager", "graph", "fused-graph"])
def test_steps_with_a_tape_are_watched(gear):
    import tensorflow as tf

    x, y = blobs(rows=BATCH * 8)

    losses = []
    for watch in (None, 4):
        loop = fresh(small_loop, gear, watch=watch)
        model = loop.model

        @loop.train_step
        def train_step(x, y, model=model):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            if loss > 100.0:  # AutoGraph makes a `cond` of it.
                loss = loss * 1.0
            model.optimizer.apply(gradients, model.trainable_variables)
            return loss

        heard = Heard(loop)
        loop.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
        losses.append(heard.losses)
    assert losses[0] == losses[1]
    assert heard.steps == [0, 4]
    assert {n.partition("/")[0] for n in heard.at(4)} == KINDS


def test_an_own_step_may_call_other_layers_each_time():
    x, y = blobs(rows=BATCH * 6)
    loop = fresh(small_loop, "eager", watch=1)
    model, extra, calls = loop.model, layers.Dense(3, name="extra"), []

    @loop.train_step
    def train_step(x, y):
        calls.append(1)
        if len(calls) > 2:
            extra(x)
        loss, _ = loopscope.value_and_grad(
            lambda: model.compute_loss(x, y, model(x, training=True)),
            model.trainable_variables,
        )
        return loss

    heard = Heard(loop)
    loop.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
    assert heard.steps == list(range(6))
    assert heard.at(0).keys() == heard.at(5).keys()


class Killed(Exception):
    pass


def test_a_run_keeps_its_signals_and_goes_on_with_them(tmp_path):
    x, y = blobs(rows=BATCH * 20)
    arguments = {"batch_size": BATCH, "epochs": 2, "verbose": 0}

    def kill(event):
        if isinstance(event, ChunkEnd) and event.step + event.steps >= 27:
            raise Killed

    whole = fresh(small_loop, FUSED, watch=4)
    whole.fit(x, y, **arguments, run=tmp_path / "whole")
    loop = fresh(small_loop, FUSED, watch=4)
    loop.subscribe(kill, chunk_steps={"train": 9})
    recording = loopscope.Recording(tmp_path / "cut", replay_steps=6)
    with pytest.raises(Killed):
        loop.fit(x, y, **arguments, run=recording)
    fresh(small_loop, FUSED, watch=4).fit(
        x, y, **arguments, run=tmp_path / "cut", resume=True
    )
    was, now = (loopscope.open_run(tmp_path / n).signals for n in ("whole", "cut"))
    assert was["step"].tolist() == list(range(0, 40, 4))
    assert was.keys() == now.keys()
    assert all(np.array_equal(was[name], now[name]) for name in was)

    experiment = loopscope.Experiment(
        fresh(small_loop, FUSED), x=x, y=y, batch_size=BATCH, epochs=2
    )
    run = loopscope.open_run(tmp_path / "cut", experiment=experiment)
    rewound = run.rewind(31, look=False)
    assert rewound.identical
    assert not run.verify().differences
    run.close()
    assert experiment.loop.watch is None


def test_a_watched_run_is_not_gone_on_with_unwatched(tmp_path):
    x, y = blobs(rows=BATCH * 4)
    arguments = {"batch_size": BATCH, "verbose": 0, "run": tmp_path / "run"}
    fresh(small_loop, FUSED, watch=4).fit(x, y, **arguments)
    with pytest.raises(RunError, match="watch"):
        fresh(small_loop, FUSED).fit(x, y, **arguments, epochs=2, resume=True)


def test_a_run_keeps_its_incidents(tmp_path):
    x, y = blobs(rows=BATCH * 10)
    x[BATCH * 3, 0] = np.inf
    loop = fresh(small_loop, FUSED, watch=4)
    with warned("Step 3: "):
        loop.fit(x, y, batch_size=BATCH, verbose=0, shuffle=False, run=tmp_path / "run")
    events = loopscope.open_run(tmp_path / "run").events
    (found,) = [e for e in events if e["kind"] == "incident"]
    assert found["incident"] == "nonfinite"
    assert found["at"] == 3
    assert found["examples"] == [BATCH * 3]
    assert found["text"].startswith("Step 3: ")


@pytest.mark.parametrize("watch", [0, -1, 1.5, True, "often"])
def test_what_is_no_number_of_steps_is_refused(watch):
    with pytest.raises(UsageError, match="watch"):
        small_loop(watch=watch)


def test_watching_does_not_begin_while_a_loop_trains():
    x, y = blobs()
    loop = fresh(small_loop, FUSED, watch=4)

    class Meddler(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            loop.watch = None

    with pytest.raises(UsageError, match="training"):
        loop.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[Meddler()])
    loop.watch = None


def test_several_optimizers_are_watched_together():
    make, data = gan()
    loop = fresh(make, FUSED, watch=1)
    heard = Heard(loop)
    loop.fit(*data, batch_size=BATCH, verbose=0)
    layers_ = {n.partition("/")[2] for n in heard.at(0) if n.startswith("update_ratio")}
    assert len({path.partition("/")[0] for path in layers_}) == 2


def test_a_journal_of_the_first_version_is_read_and_gone_on_with(tmp_path):
    """It knew no signals; nothing else has changed."""
    x, y = blobs(rows=BATCH * 4)
    arguments = {"batch_size": BATCH, "verbose": 0, "run": tmp_path / "run"}
    fresh(small_loop, FUSED).fit(x, y, **arguments)
    with closing(sqlite3.connect(tmp_path / "run" / "journal.sqlite")) as journal:
        journal.execute("DROP TABLE signals")
        journal.execute("PRAGMA user_version=1")
        journal.commit()
    assert loopscope.open_run(tmp_path / "run").signals["step"].size == 0
    fresh(small_loop, FUSED).fit(x, y, **arguments, epochs=2, resume=True)
    run = loopscope.open_run(tmp_path / "run")
    assert len(run.steps["loss"]) == 8
    assert run.signals["step"].size == 0
