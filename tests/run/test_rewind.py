"""Any past step of a run is run again, bit for bit; where it cannot be, it is said."""

import json

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import loopscope
from loopscope import Experiment, Recording, open_run
from loopscope.errors import RunError, UsageError
from loopscope.events import ChunkEnd
from loopscope.run import writes
from models import (
    ALL,
    FUSED,
    ONE_GEAR,
    STEP,
    TORCH,
    blobs,
    fresh,
    gan,
    mixed_loop,
    small_loop,
)

X, Y = blobs(60)
VALIDATION = blobs(20, seed=9)
STEPS = 24


class Sees:
    """The state before and after each step of a training, as its digests."""

    def __init__(self, loop):
        self.loop, self.before, self.after = loop, {}, {}
        # Chunks of one step: where they are cut changes no bit.
        loop.subscribe(self, chunk_steps={"train": 1})

    def __call__(self, event):
        if isinstance(event, ChunkEnd) and event.phase == "train":
            self.after[self.loop.step - 1] = self.loop.state.sha256()


class Warmer(keras.callbacks.Callback):
    """Assigns variables at batches and epochs, as no step would."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3:
            self.model.optimizer.learning_rate = 0.03

    def on_epoch_end(self, epoch, logs=None):
        kernel = self.model.trainable_variables[0]
        kernel.assign(kernel * 0.5)
        self.model.optimizer.learning_rate = 0.1


def experiment(make=small_loop, gear=STEP, **arguments):
    arguments = {"x": X, "y": Y, "batch_size": 8, "epochs": 3, **arguments}
    return Experiment(fresh(make, gear), **arguments)


def recorded(path, made, *, every=5, **changes):
    """Train an experiment, recorded; the state after each step."""
    seen = Sees(made.loop)
    made.fit(run=Recording(path, replay_steps=every), verbose=0, **changes)
    return seen.after


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run with callbacks that assign variables, opened once."""
    path = tmp_path_factory.mktemp("small") / "run"
    plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0)
    after = recorded(
        path,
        experiment(validation_data=VALIDATION),
        callbacks=[Warmer(), plateau],
    )
    return open_run(path, experiment=experiment(validation_data=VALIDATION)), after


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(0)
@example(STEPS - 1)
@example(8)
@given(st.integers(0, STEPS - 1))
def test_any_step_is_run_again_to_the_recorded_bits(small, step):
    run, after = small
    rewound = run.rewind(step)
    assert rewound.identical
    assert rewound.first_difference is None
    assert rewound.state_sha256_after == after[step]
    assert rewound.replayed_steps <= 5
    assert (rewound.epoch, rewound.batch_index) == divmod(step, 8)
    assert rewound.loss_replayed == rewound.loss_recorded == run.steps["loss"][step]


def test_the_state_before_a_step_is_what_it_read(small):
    run, after = small
    within = run.rewind(2)
    assert within.state_sha256_before == after[1]
    assert within.learning_rate == pytest.approx(0.1)
    # A callback lowers the rate before batch 3, and halves weights after an epoch.
    assert run.rewind(3).learning_rate == pytest.approx(0.03)
    assert run.rewind(3).state_sha256_before != after[2]
    path = "sequential/dense/kernel"
    last, first = run.rewind(7), run.rewind(8)
    np.testing.assert_array_equal(
        first.state_before[path], last.state_after[path] * np.float32(0.5)
    )


def test_rewinding_changes_nothing_of_the_run_or_of_the_loop(small):
    run, _ = small
    before = contents(run.path)
    run.rewind(11)
    run.verify()
    assert contents(run.path) == before


def contents(path):
    return {
        str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()
    }


def test_a_loop_that_is_lent_is_given_back_as_it_was(tmp_path):
    made = experiment()
    recorded(tmp_path / "run", made)
    state, step, gear = made.loop.state.sha256(), made.loop.step, made.loop.gear
    run = open_run(tmp_path / "run", experiment=made)
    assert run.rewind(7).identical
    run.close()
    assert (made.loop.state.sha256(), made.loop.step, made.loop.gear) == (
        state,
        step,
        gear,
    )


BRIEF_MODELS = ("convnet_with_batchnorm", "gan")


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(b, marks=[] if b.__name__ in BRIEF_MODELS else pytest.mark.slow)
        for b in ALL
    ],
)
def test_every_kind_of_model_is_rewound_and_verified(build, tmp_path):
    if TORCH and build is gan:
        pytest.skip("an untraced step makes its optimizers' slots as it first runs")
    make, (x, y) = build()
    rows = len(keras.tree.flatten(x)[0])
    more = keras.tree.map_structure(lambda a: np.concatenate([a] * 4), (x, y))
    arguments = dict(zip("xy", more, strict=True), batch_size=rows, epochs=2)
    after = recorded(tmp_path / "run", experiment(make, FUSED, **arguments), every=3)
    run = open_run(tmp_path / "run", experiment=experiment(make, FUSED, **arguments))
    assert run.rewind(5).state_sha256_after == after[5]
    found = run.verify(whole=True)
    assert found.verified
    assert sum(s.stop - s.first for s in found.segments) == 8
    assert all(s.state_identical for s in found.segments)


@pytest.mark.parametrize("gear", ONE_GEAR)
def test_every_gear_is_rewound_with_dropout_and_batchnorm(gear, tmp_path):
    arguments = dict(zip("xy", blobs(44), strict=True), epochs=2)
    after = recorded(tmp_path / "run", experiment(mixed_loop, gear, **arguments))
    run = open_run(
        tmp_path / "run", experiment=experiment(mixed_loop, gear, **arguments)
    )
    for step in (0, 5, 6, 11):
        rewound = run.rewind(step)
        assert rewound.identical
        assert rewound.gear == gear
        assert rewound.state_sha256_after == after[step]


def test_more_than_can_be_recorded_between_steps_gets_a_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(writes, "WRITE_BYTES", 16)

    class Shrink(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            for weight in self.model.trainable_variables:
                weight.assign(0.5 * weight)

    after = recorded(tmp_path / "run", experiment(), every=100, callbacks=[Shrink()])
    run = open_run(tmp_path / "run", experiment=experiment())
    for step in (0, 7, 8, 15, 16, 23):
        rewound = run.rewind(step)
        assert rewound.identical
        assert rewound.state_sha256_after == after[step]
    assert run.rewind(9).checkpoint_step == 8


def test_a_run_that_was_ended_and_gone_on_with_is_rewound_all_the_same(tmp_path):
    class Ended(Exception):
        pass

    made = experiment()

    def end(event):
        if isinstance(event, ChunkEnd) and made.loop.step == 13:
            raise Ended

    made.loop.subscribe(end, chunk_steps={"train": 1})
    with pytest.raises(Ended):
        made.fit(run=Recording(tmp_path / "run", replay_steps=5), verbose=0)
    after = recorded(tmp_path / "run", experiment(), resume=True)
    run = open_run(tmp_path / "run", experiment=experiment())
    assert run.verify(whole=True).verified
    for step in (11, 13, 16, 23):
        assert run.rewind(step).state_sha256_after == after[step]


# Where it departs.


def test_other_data_are_said_to_be_the_likeliest_cause(tmp_path):
    recorded(tmp_path / "run", experiment())
    other = X.copy()
    other[:] += 1e-3
    run = open_run(tmp_path / "run", experiment=experiment(x=other))
    rewound = run.rewind(9)
    assert not rewound.identical
    apart = rewound.first_difference
    assert apart.step == rewound.checkpoint_step
    assert apart.name == "loss"
    assert apart.recorded != apart.replayed
    assert 0 < apart.relative < 1
    assert apart.causes[0].startswith("the data are not the same (data: was")
    found = run.verify()
    assert not found.verified
    assert found.as_dict()["largest_relative_difference"] > 0
    assert "departs at step" in str(apart)


def test_a_step_that_reads_what_no_variable_holds_departs_and_it_is_said(tmp_path):
    def make(gear):
        loop = small_loop("eager")
        random = np.random.default_rng()

        @loop.train_step
        def train_step(x, y):
            return loopscope.value_and_grad(
                lambda: keras.ops.mean(loop.model(x)) * float(random.uniform()),
                loop.model.trainable_variables,
            )[0]

        return loop

    recorded(tmp_path / "run", experiment(make, "eager"))
    run = open_run(tmp_path / "run", experiment=experiment(make, "eager"))
    rewound = run.rewind(3)
    assert not rewound.identical
    assert "random numbers" in rewound.first_difference.causes[0]


def test_a_step_that_was_never_run_is_refused(small):
    run, _ = small
    for step in (-1, STEPS, 1.5):
        with pytest.raises(UsageError, match=f"steps 0 to {STEPS - 1}"):
            run.rewind(step)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path):
    after = recorded(tmp_path / "run", experiment(), every=3)
    for file in (tmp_path / "run/checkpoints").glob("*000000000006-*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    run = open_run(tmp_path / "run", experiment=experiment())
    rewound = run.rewind(7)
    assert rewound.checkpoint_step < 6
    assert rewound.state_sha256_after == after[7]


def test_a_run_of_a_script_says_how_to_open_it(tmp_path):
    recorded(tmp_path / "run", experiment())
    with pytest.raises(RunError, match="begun by `fit` in a script"):
        open_run(tmp_path / "run").rewind(3)


def test_code_in_a_run_folder_is_never_run(tmp_path):
    recorded(tmp_path / "run", experiment())
    code = tmp_path / "run" / "evil.py"
    code.write_text("raise SystemExit('executed')")
    manifest = json.loads((tmp_path / "run/run.json").read_text())["content"]
    manifest.pop("format")
    manifest["origin"] = {"experiment": "evil", "function": f"{code}:f", "seed": 0}
    run = open_run(tmp_path / "run")
    run._folder.write_manifest(manifest)
    with pytest.raises(RunError, match="names code inside of its own folder"):
        open_run(tmp_path / "run").rewind(3)


# Branches.


def test_a_branch_shares_the_past_and_goes_on_with_another_rate(tmp_path):
    plateau = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    recorded(tmp_path / "run", experiment(), callbacks=[plateau])
    before, log = contents(tmp_path / "run"), (tmp_path / "log.csv").read_text()
    run = open_run(tmp_path / "run", experiment=experiment())
    run.branch(13, tmp_path / "branch", learning_rate=0.01)
    made = experiment()
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    recorded(tmp_path / "branch", made, resume=True, callbacks=[logger])
    branch = open_run(tmp_path / "branch", experiment=experiment())
    a, b = run.steps["loss"], branch.steps["loss"]
    np.testing.assert_array_equal(a[:14], b[:14])  # Step 13 has read the same weights.
    assert (a[14:] != b[14:]).any()
    assert branch.verify(whole=True).verified
    # The branch has no checkpoint before the one that it began with.
    assert run.rewind(12).learning_rate == pytest.approx(0.1)
    assert branch.rewind(13).learning_rate == pytest.approx(0.01)
    assert branch.manifest["parent"]["step"] == 13
    assert contents(tmp_path / "run") == before
    assert (tmp_path / "log.csv").read_text() == log
    assert (tmp_path / "branch/log.csv").read_text().count("\n") == 4


@pytest.mark.slow
def test_a_branch_may_go_on_in_another_gear(tmp_path):
    recorded(tmp_path / "run", experiment())
    run = open_run(tmp_path / "run", experiment=experiment())
    run.branch(13, tmp_path / "branch", gear="eager")
    recorded(tmp_path / "branch", experiment(), resume=True)
    branch = open_run(tmp_path / "branch", experiment=experiment())
    assert branch.rewind(12).gear == STEP
    assert branch.rewind(13).gear == "eager"
    assert branch.verify(whole=True).verified


def test_a_branch_from_a_step_that_is_not_there_is_refused(tmp_path):
    recorded(tmp_path / "run", experiment())
    run = open_run(tmp_path / "run")
    with pytest.raises(UsageError, match="steps 0 to 23"):
        run.branch(99, tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_no_replay_goes_across_a_change_of_gear(tmp_path):
    made = experiment()
    source = made.loop.source(X, Y, batch_size=8)
    run = Recording(tmp_path / "run", replay_steps=100)
    for epoch in made.loop.epochs(3, run=run):
        made.loop.gear = "eager" if epoch.index == 1 else STEP
        for _ in epoch.train(source):
            pass
    opened = open_run(tmp_path / "run", experiment=experiment())
    assert [opened.rewind(step).gear for step in (7, 8, 15, 16)] == [
        STEP,
        "eager",
        "eager",
        STEP,
    ]
    assert opened.rewind(10).checkpoint_step == 8
    assert opened.verify(whole=True).verified
