"""`fit`, `evaluate` and `predict` give what Keras's own give."""

import warnings

import keras
import numpy as np
import pytest

from loopscope.events import ChunkEnd
from models import (
    FUSED,
    STEP,
    Batches,
    blobs,
    fresh,
    halved,
    numbers,
    reference,
    relative,
    small_loop,
    small_model,
    warned,
)

ROWS = 40


@pytest.fixture(scope="module")
def data():
    return blobs(ROWS)


def loops(**options):
    """A loop and a compiled Keras model that start from the same weights."""
    loop = fresh(small_loop, FUSED, **options)
    return loop, reference(fresh(small_loop, FUSED, **options))


def assert_alike(loop, model, ours, theirs):
    assert list(ours.history) == list(theirs.history)
    assert ours.epoch == theirs.epoch
    for name, values in theirs.history.items():
        assert all(isinstance(value, float) for value in ours.history[name])
        np.testing.assert_allclose(ours.history[name], values, rtol=1e-5, atol=1e-7)
    for was, now in zip(model.get_weights(), loop.model.get_weights(), strict=True):
        assert relative(was, now) < 1e-5


def half(data):
    return tuple(part[:16] for part in data)


class Pair:
    """A loop and a Keras model that go back to the same start as often as needed."""

    def __init__(self, data):
        self.loop, self.model = loops()
        self.loop.prepare("train", self.loop.source(*data, batch_size=8))
        self.model.optimizer.build(self.model.trainable_variables)
        self.variables = [
            variable
            for model in (self.loop.model, self.model)
            for variable in (*model.variables, *model.optimizer.variables)
        ]
        self.values = [keras.ops.convert_to_numpy(v) for v in self.variables]

    def restart(self):
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(value)
        return self.loop, self.model


@pytest.fixture(scope="module")
def made_once(data):
    return Pair(data)


@pytest.fixture
def pair(made_once):
    return made_once.restart()


CALLS = {
    "plain": {},
    "validation_data": {"validation_data": half},
    "validation_data with weights": {
        "validation_data": lambda data: (
            *half(data),
            np.linspace(0, 2, 16, dtype="float32"),
        )
    },
    "validation_split": {"validation_split": 0.2},
    "validation_freq": {"validation_split": 0.2, "validation_freq": 2},
    "validation_freq in a list": {"validation_split": 0.2, "validation_freq": [1, 3]},
    "validation_steps": {"validation_data": half, "validation_steps": 1},
    "validation_batch_size": {"validation_data": half, "validation_batch_size": 4},
    "sample_weight": {
        "sample_weight": lambda data: np.linspace(0, 2, ROWS, dtype="float32")
    },
    "sample_weight and split": {
        "sample_weight": lambda data: np.linspace(0, 2, ROWS, dtype="float32"),
        "validation_split": 0.2,
    },
    "class_weight": {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0}},
    "class_weight of some": {"class_weight": {1: 3.0}},
    "initial_epoch": {"initial_epoch": 1},
    "no epochs": {"epochs": 0},
    "steps_per_epoch": {"steps_per_epoch": 2, "epochs": 2},
}


@pytest.mark.parametrize("name", halved(CALLS))
def test_fit_gives_the_history_and_the_weights_of_keras(name, data, pair):
    options = {"epochs": 3, "batch_size": 8, "shuffle": False, "verbose": 0}
    options.update({k: v(data) if callable(v) else v for k, v in CALLS[name].items()})
    loop, model = pair
    ours = loop.fit(*data, **options)
    theirs = model.fit(*data, **options)
    assert_alike(loop, model, ours, theirs)


def test_an_epoch_that_runs_dry_is_short_and_the_next_one_starts_anew(data, pair):
    loop, model = pair
    options = {"epochs": 3, "batch_size": 8, "shuffle": False, "verbose": 0}
    with warned("ran out of data"):
        ours = loop.fit(*data, steps_per_epoch=3, **options)
    with warned("ran out of data"):
        theirs = model.fit(*data, steps_per_epoch=3, **options)
    assert_alike(loop, model, ours, theirs)


def test_a_ragged_last_batch_counts_as_it_does_under_keras(pair):
    loop, model = pair
    x, y = blobs(44)
    options = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
    ours = loop.fit(x, y, **options, validation_data=(x[:21], y[:21]))
    theirs = model.fit(x, y, **options, validation_data=(x[:21], y[:21]))
    assert_alike(loop, model, ours, theirs)


def test_fit_of_a_compiled_model_is_that_of_keras(data):
    from loopscope import Loop

    def make(gear):
        model = small_model()
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=["accuracy"],
        )
        return Loop(model, gear=gear)

    loop, model = fresh(make, FUSED), reference(fresh(make, FUSED))
    options = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
    ours, theirs = loop.fit(*data, **options), model.fit(*data, **options)
    assert_alike(loop, model, ours, theirs)


def test_fit_of_a_stream_is_that_of_keras(data, pair):
    x, y = data
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, ROWS, 8)]

    class Dataset(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    loop, model = pair
    ours = loop.fit(Batches(batches), epochs=2, verbose=0)
    theirs = model.fit(Dataset(), epochs=2, shuffle=False, verbose=0)
    assert_alike(loop, model, ours, theirs)


def test_fit_goes_on_where_it_was_as_keras_does(data):
    loop, model = loops()
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    for _ in range(2):
        ours, theirs = loop.fit(*data, **options), model.fit(*data, **options)
    assert_alike(loop, model, ours, theirs)
    assert loop.step == 10


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 8},
        {"batch_size": 8, "steps": 3},
        {"batch_size": 8, "return_dict": True},
        {"sample_weight": np.linspace(0, 2, ROWS, dtype="float32")},
    ],
    ids=["plain", "steps", "return_dict", "sample_weight"],
)
def test_evaluate_gives_what_keras_gives(options, data, pair):
    loop, model = pair
    ours = loop.evaluate(*data, verbose=0, **options)
    theirs = model.evaluate(*data, verbose=0, **options)
    assert type(ours) is type(theirs)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_evaluate_of_a_model_with_a_loss_only_gives_one_number(data):
    loop, model = loops(metrics=None)
    ours, theirs = loop.evaluate(*data, verbose=0), model.evaluate(*data, verbose=0)
    assert isinstance(ours, float)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_evaluate_changes_no_variable(data, pair):
    loop, _ = pair
    loop.fit(*data, batch_size=8, verbose=0)
    before = loop.state.numpy()
    loop.evaluate(*data, verbose=0)
    after = loop.state.numpy()
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize("gear", ["eager", STEP, FUSED])
@pytest.mark.parametrize("steps", [None, 2])
def test_predict_gives_what_keras_gives(gear, steps, data):
    loop = fresh(small_loop, gear)
    ours = loop.predict(data[0], batch_size=8, steps=steps, verbose=0)
    theirs = loop.model.predict(data[0], batch_size=8, steps=steps, verbose=0)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_predict_keeps_the_structure_of_the_outputs(data):
    x = keras.Input((4,))
    hidden = keras.layers.Dense(5)(x)
    model = keras.Model(x, {"a": hidden, "b": [keras.layers.Dense(2)(hidden), hidden]})
    ours = small_loop(model=model, loss=None, metrics=None).predict(
        data[0], batch_size=8, verbose=0
    )
    theirs = model.predict(data[0], batch_size=8, verbose=0)
    keras.tree.assert_same_structure(ours, theirs)
    for mine, keras_own in zip(
        keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True
    ):
        np.testing.assert_allclose(mine, keras_own, rtol=1e-5, atol=1e-6)


# Callbacks.


def test_batch_hooks_are_called_once_a_step_in_every_gear(data):
    for gear in (STEP, FUSED):
        begun, ended, iterations = [], [], []
        loop = fresh(small_loop, gear)
        optimizer = loop.model.optimizer
        callback = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs, b=begun: b.append(batch),
            on_train_batch_end=lambda batch, logs, e=ended, o=optimizer, i=iterations: (
                e.append((batch, logs["loss"])),
                i.append(int(o.iterations)),
            ),
        )
        loop.fit(*data, batch_size=8, epochs=2, callbacks=[callback], verbose=0)
        assert begun == [0, 1, 2, 3, 4] * 2
        assert [batch for batch, _ in ended] == begun
        assert iterations == list(range(1, 11))
        assert all(np.isfinite(loss) for _, loss in ended)


def chunk_sizes(data, callbacks, **options):
    loop = fresh(small_loop, FUSED)
    source = (np.tile(data[0], (4, 1))[:160], np.tile(data[1], 4)[:160])
    loop.fit(*source, batch_size=8, verbose=0)
    sizes = []

    def listen(event):
        if isinstance(event, ChunkEnd) and event.phase == "train":
            sizes.append(event.steps)

    loop.subscribe(listen)
    loop.fit(*source, batch_size=8, callbacks=callbacks, verbose=0, **options)
    return sizes


def test_only_callbacks_with_batch_hooks_cut_chunks(data, tmp_path):
    quiet = [
        keras.callbacks.EarlyStopping(monitor="loss"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.weights.h5", "loss", save_weights_only=True
        ),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.01),
        keras.callbacks.ReduceLROnPlateau(monitor="loss"),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    ]
    assert len(chunk_sizes(data, quiet)) < 5
    assert (tmp_path / "best.weights.h5").exists()
    assert "accuracy,loss" in (tmp_path / "log.csv").read_text()
    loud = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: None)
    assert chunk_sizes(data, [loud]) == [1] * 20


def test_a_checkpoint_every_so_many_steps_cuts_chunks(data, tmp_path):
    name = str(tmp_path / "at-{batch}.weights.h5")
    callback = keras.callbacks.ModelCheckpoint(
        name, save_weights_only=True, save_freq=8
    )
    # The first step of an epoch is told alone, then every eighth.
    assert chunk_sizes(data, [callback]) == [1, 7, 8, 4]
    assert {path.name for path in tmp_path.iterdir()} == {
        "at-8.weights.h5",
        "at-16.weights.h5",
    }


def test_early_stopping_stops_where_keras_stops(data):
    loop, model = loops(optimizer=lambda: keras.optimizers.SGD(0.0))
    options = {"epochs": 9, "batch_size": 8, "shuffle": False, "verbose": 0}

    def stopping():
        return [keras.callbacks.EarlyStopping("val_loss", patience=2)]

    ours = loop.fit(*data, **options, validation_data=data, callbacks=stopping())
    model.fit(*data, **options, validation_data=data, callbacks=stopping())
    assert ours.epoch == model.history.epoch == [0, 1, 2]
    assert len(loop.fit(*data, **options).epoch) == 9


def test_early_stopping_restores_the_best_weights(data):
    loop, _ = loops(optimizer=lambda: keras.optimizers.SGD(50.0))
    stopping = keras.callbacks.EarlyStopping(
        "val_loss", patience=2, restore_best_weights=True, start_from_epoch=0
    )
    history = loop.fit(
        *data,
        epochs=9,
        batch_size=8,
        validation_data=data,
        callbacks=[stopping],
        verbose=0,
    )
    best = min(history.history["val_loss"])
    assert loop.evaluate(*data, batch_size=8, verbose=0)[0] == pytest.approx(best)


def test_stop_training_in_a_batch_hook_ends_the_epoch_at_once(data):
    loop, _ = loops()

    def stop(batch, logs):
        if batch == 3:
            loop.model.stop_training = True

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    history = loop.fit(*data, batch_size=8, epochs=5, callbacks=[callback], verbose=0)
    assert history.epoch == [0]
    assert loop.step == 4


def test_a_learning_rate_scheduler_is_obeyed(data):
    loop, model = loops(optimizer=lambda: keras.optimizers.SGD(0.1))
    options = {"epochs": 3, "batch_size": 8, "shuffle": False, "verbose": 0}

    def schedule():
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch: [0.2, 0.0, 0.05][epoch])
        ]

    ours = loop.fit(*data, **options, callbacks=schedule())
    theirs = model.fit(*data, **options, callbacks=schedule())
    assert_alike(loop, model, ours, theirs)
    assert ours.history["learning_rate"] == pytest.approx([0.2, 0.0, 0.05])


def test_a_learning_rate_set_between_two_trainings_is_obeyed(data):
    loop, _ = loops(optimizer=lambda: keras.optimizers.SGD(0.1))
    loop.fit(*data, batch_size=8, verbose=0)
    loop.model.optimizer.learning_rate = 0.0
    weights = loop.model.get_weights()
    loop.fit(*data, batch_size=8, verbose=0)
    for was, now in zip(weights, loop.model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_a_callback_that_changes_weights_is_obeyed_in_fused_gears(data):
    loop, _ = loops(optimizer=lambda: keras.optimizers.SGD(0.0))

    def clear(epoch, logs):
        loop.model.set_weights([0 * w for w in loop.model.get_weights()])

    callback = keras.callbacks.LambdaCallback(on_epoch_end=clear)
    history = loop.fit(*data, batch_size=8, epochs=2, callbacks=[callback], verbose=0)
    assert history.history["loss"][1] == pytest.approx(np.log(3), rel=1e-5)


def test_the_history_is_the_models_history_as_in_keras(data, pair):
    loop, _ = pair
    history = loop.fit(*data, verbose=0)
    assert isinstance(history, keras.callbacks.History)
    assert loop.model.history is history


@pytest.mark.parametrize("verbose", [1, 2])
def test_the_progress_bar_of_keras_is_shown(verbose, data, capsys, pair):
    loop, _ = pair
    loop.fit(*data, batch_size=8, epochs=2, verbose=verbose, validation_data=data)
    shown = capsys.readouterr().out
    assert "Epoch 1/2" in shown
    assert "Epoch 2/2" in shown
    assert "5/5" in shown
    assert "val_loss" in shown


def test_nothing_is_shown_without_verbose(data, capsys, pair):
    loop, _ = pair
    loop.fit(*data, batch_size=8, verbose=0, validation_data=data)
    loop.evaluate(*data, verbose=0)
    loop.predict(data[0], verbose=0)
    assert capsys.readouterr().out == ""


def test_unsupervised_models_train_on_x_alone():
    class Norm(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            y = self.dense(x)
            self.add_loss(keras.ops.mean(keras.ops.square(y)))
            return y

    def make(gear):
        from loopscope import Loop

        model = Norm()
        model.compile("sgd")
        return Loop(model, gear=gear)

    loop, model = fresh(make, FUSED), reference(fresh(make, FUSED))
    options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    x = numbers(24, 4)
    assert_alike(loop, model, loop.fit(x, **options), model.fit(x, **options))


def test_a_softmax_whose_loss_wants_logits_is_reported_on_every_backend(data):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation="softmax", name="last")]
    )
    loop = small_loop(model=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.fit(*data, batch_size=8, verbose=0)
    # On TensorFlow, Keras warns too, in words of its own.
    texts = [str(w.message) for w in caught]
    assert sum("The output 'last' ends in a softmax, but" in t for t in texts) == 1
