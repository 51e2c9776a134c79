"""Short trainings that answer a question, and leave everything as it was."""

import csv

import keras
import numpy as np
import pytest

import loopscope
from loopscope.errors import UsageError
from models import FUSED, GEARS, blobs, fresh, small_loop

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

X, Y = blobs(64)


def test_a_dev_run_runs_everything_and_leaves_nothing(tmp_path):
    loop = fresh(small_loop, "auto")
    loop.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    before, gear, step = loop.state.sha256(), loop.gear, loop.step
    seen = []

    class Sees(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(("train", batch))

        def on_test_batch_end(self, batch, logs=None):
            seen.append(("test", batch))

        def on_epoch_end(self, epoch, logs=None):
            seen.append(("epoch", epoch, sorted(logs)))

    history = loop.fit(
        X,
        Y,
        batch_size=8,
        epochs=7,
        verbose=0,
        validation_data=blobs(64, seed=9),
        callbacks=[
            Sees(),
            keras.callbacks.ModelCheckpoint(tmp_path / "a.keras"),
            keras.callbacks.CSVLogger(tmp_path / "a.csv"),
        ],
        run=tmp_path / "run",
        fast_dev_run=3,
    )
    assert [s for s in seen if s[0] == "train"] == [("train", i) for i in range(3)]
    assert [s for s in seen if s[0] == "test"] == [("test", i) for i in range(2)] + [
        ("test", 2)
    ]
    assert [s[:2] for s in seen if s[0] == "epoch"] == [("epoch", 0)]
    assert len(history.history["loss"]) == len(history.history["val_loss"]) == 1
    assert not list(tmp_path.iterdir())
    assert (loop.state.sha256(), loop.gear, loop.step) == (before, gear, step)


def test_a_training_after_a_dev_run_is_that_without_one():
    ends = []
    for first in (0, 3):
        loop = fresh(small_loop, FUSED)
        if first:
            loop.fit(X, Y, batch_size=8, verbose=0, fast_dev_run=first)
        loop.fit(X, Y, batch_size=8, epochs=2, verbose=0)
        ends.append(loop.state.sha256())
    assert ends[0] == ends[1]


def test_a_dev_run_of_more_steps_than_there_are_runs_those(recwarn):
    loop = fresh(small_loop, FUSED)
    loop.fit(X[:16], Y[:16], batch_size=8, verbose=0, fast_dev_run=9)
    assert loop.step == 0
    assert not [w for w in recwarn if "ran out" in str(w.message)]


def test_the_number_of_steps_of_a_dev_run_is_checked():
    with pytest.raises(UsageError, match="fast_dev_run"):
        fresh(small_loop, FUSED).fit(X, Y, fast_dev_run=-1)


def test_callbacks_that_write_still_do_in_a_real_run(tmp_path):
    loop = fresh(small_loop, FUSED)
    log = keras.callbacks.CSVLogger(tmp_path / "a.csv")
    loop.fit(X, Y, batch_size=8, verbose=0, callbacks=[log])
    with (tmp_path / "a.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


@pytest.mark.parametrize("gear", [g for g in GEARS if g != "fused-xla"])
def test_a_loop_learns_a_batch_by_heart(gear):
    loop = fresh(small_loop, gear)
    found = loop.overfit(X, Y, batch_size=8, steps=300)
    assert found.learnt
    assert found.losses[-1] < 0.1 * found.losses[0]
    assert "learnt by heart" in str(found)
    assert loop.step == 0


def test_a_broken_loop_does_not():
    loop = fresh(small_loop, FUSED)
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        def loss():
            logits = keras.ops.stop_gradient(model(x, training=True))
            last = model.trainable_variables[-1]
            return model.loss(y, logits) + 0 * keras.ops.sum(last)

        value, grads = loopscope.value_and_grad(loss, model.trainable_variables)
        model.optimizer.apply(grads, model.trainable_variables)
        return value

    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        found = loop.overfit(X, Y, batch_size=8, steps=20)
    assert not found.learnt
    assert "broken" in str(found)


def test_an_overfitted_loop_is_as_it_was():
    loop = fresh(small_loop, FUSED)
    loop.fit(X, Y, batch_size=8, verbose=0)
    before = loop.state.sha256()
    loop.overfit(X, Y, batch_size=8, batches=2, steps=20)
    loop.find_lr(X, Y, batch_size=8, steps=20)
    assert loop.state.sha256() == before
    assert loop.step == 8


def test_the_rate_at_which_the_loss_falls_fastest_is_suggested():
    loop = fresh(
        lambda gear: small_loop(gear, optimizer=keras.optimizers.SGD(0.01)), FUSED
    )
    found = loop.find_lr(X, Y, batch_size=16, start=1e-6, end=100, steps=120)
    assert 1e-3 < found.suggestion < 10
    assert len(found.rates) == len(found.losses) == len(found.smoothed) <= 120
    assert found.rates[0] == pytest.approx(1e-6)
    np.testing.assert_array_less(found.rates[:-1], found.rates[1:])
    assert float(loop.model.optimizer.learning_rate) == pytest.approx(0.01)
    assert "<svg" in found._repr_html_()


def test_a_sweep_ends_when_the_loss_explodes():
    loop = fresh(
        lambda gear: small_loop(gear, optimizer=keras.optimizers.SGD(0.01)), FUSED
    )
    found = loop.find_lr(X, Y, batch_size=16, start=1.0, end=1e9, steps=100)
    assert len(found.losses) < 100


def test_a_schedule_cannot_be_swept():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    loop = fresh(
        lambda gear: small_loop(gear, optimizer=keras.optimizers.SGD(schedule)), FUSED
    )
    with pytest.raises(UsageError, match="learning rate"):
        loop.find_lr(X, Y, batch_size=8)


@pytest.mark.parametrize("arguments", [{"start": 1.0, "end": 0.1}, {"steps": 1}])
def test_a_sweep_needs_a_range(arguments):
    with pytest.raises(UsageError, match="start"):
        fresh(small_loop, FUSED).find_lr(X, Y, batch_size=8, **arguments)


def test_the_loop_is_shown_as_code_with_callbacks_in_their_places(capsys):
    class Sees(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            pass

        def on_train_batch_end(self, batch, logs=None):
            pass

    loop = fresh(small_loop, FUSED, watch=10)
    loop.show([Sees(), keras.callbacks.EarlyStopping()])
    lines = capsys.readouterr().out.splitlines()
    place = {line.split("#")[0].strip(): i for i, line in enumerate(lines)}
    assert place["for x, y in train:"] < place["callbacks.on_train_batch_end(...)"]
    assert "callbacks.on_train_batch_begin(...)" not in place
    (ends,) = (line for line in lines if "on_epoch_end" in line)
    assert "Sees, EarlyStopping" in ends
    assert any("optimizer.apply(gradients" in line for line in lines)
    assert any(f"gear {FUSED}" in line for line in lines)
    checks = ["if step % 10 == 0:", "judge(chunk)", "doctor(step)"]
    assert [place[check] for check in checks] == sorted(place[c] for c in checks)


def test_an_own_step_is_shown_with_its_source(capsys):
    loop = fresh(small_loop, FUSED)

    @loop.train_step
    def train_step(x, y):
        return keras.ops.mean(loop.model(x))  # a line of mine

    loop.show()
    out = capsys.readouterr().out
    assert "# a line of mine" in out
    assert __file__ in out
