"""The story of a spike names what caused it; two steps part where they were made to."""

import keras
import numpy as np
import pytest

from loopscope import Experiment, Recording, open_run
from loopscope.errors import UsageError
from models import (
    FUSED,
    GEARS,
    STEP,
    TENSORFLOW,
    TORCH,
    blobs,
    fresh,
    mixed_loop,
    small_loop,
)

STEPS = 30
SPIKE = 20
ROW = 8 * SPIKE + 3
EPOCH = {"batch_size": 8, "shuffle": False, "epochs": 1}


def spoilt():
    """Data with one example that is far off, in the batch of step `SPIKE`."""
    x, y = blobs(8 * STEPS)
    x = x.copy()
    x[ROW] *= 40
    y = y.copy()
    y[ROW] = (y[ROW] + 1) % 3
    return x, y


def run_of(path, *, make=small_loop, gear=FUSED, data=None, **arguments):
    """A recorded run, opened with an experiment of its own."""
    x, y = blobs(8 * STEPS) if data is None else data
    loop = fresh(make, gear)
    how = Recording(path, replay_steps=7)
    loop.fit(x, y, **EPOCH, verbose=0, run=how, **arguments)
    return open_run(path, experiment=Experiment(fresh(make, gear), x=x, y=y, **EPOCH))


@pytest.fixture(scope="module")
def spike(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("spike") / "run", data=spoilt())


@pytest.fixture(scope="module")
def story(spike):
    return spike.why(SPIKE)


def test_the_example_that_carries_the_loss_is_named(spike, story):
    assert story.loss == spike.steps["loss"][SPIKE]
    assert story.loss > 3 * story.usual_loss
    first = story.examples[0]
    assert (first.position, first.example) == (3, ROW)
    assert first.label == spoilt()[1][ROW] != first.predicted
    assert first.share > 0.5
    assert len(story.examples) == 1
    told = "\n".join(story.story())
    assert f"row {ROW}" in told
    assert f"Step {SPIKE}" in told


def test_the_gradients_that_have_jumped_are_named_against_steps_before(story):
    assert story.history == [4, 12, 16, 18, 19]
    assert story.gradients
    assert story.gradients[0].times == max(j.times for j in story.gradients) > 3
    for jump in story.gradients:
        assert jump.times == pytest.approx(jump.norm / jump.usual)


def test_what_the_loss_would_have_been_is_measured(spike, story):
    recorded = spike.steps["loss"]
    for found, step in ((story.earlier, SPIKE), (story.later, SPIKE + 1)):
        as_it_was, half, clipped = found
        assert as_it_was.loss == pytest.approx(recorded[step], rel=1e-4)
        assert "half the learning rate" in half.change
        assert "clipped" in clipped.change
        assert half.loss != as_it_was.loss
    # The step after the outlier suffers from it, unless its gradients are clipped.
    assert story.later[2].loss < 0.5 * story.later[0].loss


@pytest.mark.skipif(TORCH, reason="its initial weights learn another way")
def test_a_spike_of_the_learning_rate_is_found_by_running_the_step_before(tmp_path):
    class Leap(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 50.0 if batch == SPIKE - 1 else 0.1

    run = run_of(tmp_path / "run", callbacks=[Leap()])
    story = run.why(SPIKE)
    as_it_was, half, clipped = story.earlier
    assert as_it_was.loss == pytest.approx(run.steps["loss"][SPIKE], rel=1e-4)
    assert half.loss < as_it_was.loss
    assert clipped.loss <= as_it_was.loss


def test_a_quiet_step_is_told_as_one(spike):
    story = spike.why(10)
    assert "no spike" in story.story()[0]
    assert not story.gradients


def test_the_first_and_the_last_step_have_a_story_too(spike):
    first, last = spike.why(0), spike.why(STEPS - 1)
    assert not first.history
    assert not first.earlier
    assert first.later
    assert last.earlier
    assert not last.later


def test_a_story_of_a_step_that_is_not_there_is_refused(spike):
    with pytest.raises(UsageError, match=f"steps 0 to {STEPS - 1}"):
        spike.why(STEPS)


def test_a_rewound_step_is_opened_and_compared_with_the_record(spike):
    rewound = spike.rewind(SPIKE)
    look = rewound.look
    assert rewound.identical
    assert look.loss_recorded == rewound.loss_recorded
    assert look.loss_difference < 1e-6
    assert look.examples.tolist() == list(range(8 * SPIKE, 8 * SPIKE + 8))
    document = rewound.as_dict()
    assert {
        "loss_per_example",
        "layers",
        "gradients",
        "updates",
        "phases",
        "first_nonfinite",
    } <= set(document)
    assert set(document["layers"][0]) >= {
        "path",
        "shape",
        "mean",
        "std",
        "min",
        "max",
        "zeros",
        "finite",
    }
    assert set(document["gradients"][0]) >= {"path", "norm", "zeros"}
    assert set(document["updates"][0]) >= {"path", "norm", "ratio"}
    assert spike.rewind(SPIKE, look=False).look is None


@pytest.mark.parametrize(
    "gear",
    [pytest.param(g, marks=pytest.mark.slow) if g == "fused-xla" else g for g in GEARS],
)
def test_a_step_of_any_gear_is_opened_with_its_random_numbers(gear, tmp_path):
    run = run_of(tmp_path / "run", make=mixed_loop, gear=gear)
    for step in (0, 9):
        assert run.rewind(step).look.loss_difference < 2e-6


def test_two_runs_part_where_their_data_do(tmp_path):
    x, y = blobs(8 * STEPS)
    one = run_of(tmp_path / "one", data=(x, y))
    x = x.copy()
    x[8 * 11 + 5] += 1
    other = run_of(tmp_path / "other", data=(x, y))
    a, b, found = one.diff(other=other)
    assert (a, b) == (11, 11)
    assert (found.first.kind, found.first.name) == ("batch", "x")
    kinds = [p.kind for p in found.partings]
    assert {"layer", "gradient", "update", "output"} <= set(kinds)
    assert "weight" not in kinds
    assert not one.diff(10, other=other)[2].partings
    with pytest.raises(UsageError, match="are the same, bit for bit"):
        one.diff(other=one)


def test_two_runs_of_other_weights_part_there(tmp_path):
    one = run_of(tmp_path / "one")
    other = run_of(
        tmp_path / "other",
        make=lambda gear: small_loop(gear, optimizer=keras.optimizers.SGD(0.2)),
    )
    step, _, found = one.diff(other=other)
    assert step == 1
    assert found.first.kind == "weight"


def test_two_steps_of_a_run_part_in_their_batch(spike):
    a, b, found = spike.diff(3, other_step=4)
    assert (a, b) == (3, 4)
    assert found.first.kind == "batch"


def test_a_step_in_two_gears_parts_by_rounding_at_most(spike):
    _, _, found = spike.diff(SPIKE, gear="eager")
    assert all(p.kind in ("output", "after") for p in found.partings)
    assert all(p.relative < 1e-4 for p in found.partings)
    assert found.compared > 8
    _, _, same = spike.diff(SPIKE, gear=FUSED)
    assert not same.partings


def test_there_has_to_be_something_to_compare_with(spike):
    for arguments in ({}, {"step": 3}, {"gear": "eager"}):
        with pytest.raises(UsageError):
            spike.diff(**arguments)
    with pytest.raises(UsageError, match="gear"):
        spike.diff(3, gear="turbo")


def test_rewinding_and_telling_change_nothing_of_the_run(spike):
    def content():
        return {
            p.name: p.read_bytes()
            for p in sorted(spike.path.rglob("*"))
            if p.is_file() and "-shm" not in p.name and "-wal" not in p.name
        }

    before = content()
    spike.why(SPIKE)
    spike.diff(3, other_step=4)
    assert content() == before


@pytest.mark.skipif(not TENSORFLOW, reason="a step that only a compiler can run")
def test_a_step_that_cannot_be_opened_is_still_rewound(tmp_path):
    import tensorflow as tf

    def make(gear):
        loop = small_loop(gear)
        model = loop.model

        @loop.train_step
        def train_step(x, y):
            assert not tf.executing_eagerly()
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True)))
            grads = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(
                zip(grads, model.trainable_variables, strict=True)
            )
            return loss

        return loop

    run = run_of(tmp_path / "run", make=make, gear=STEP)
    with pytest.warns(UserWarning, match="cannot be opened up"):
        rewound = run.rewind(5)
    assert rewound.identical
    assert rewound.look is None


def test_the_numbers_of_a_story_are_plain_data(story):
    import json

    document = json.loads(json.dumps(story.as_dict()))
    assert document["examples"][0]["example"] == ROW
    assert document["story"] == story.story()
    assert np.isfinite(document["usual_loss"])
