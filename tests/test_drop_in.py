"""`loopscope.fit(model, ...)`: what a compiled model does itself, run by a loop."""

import gc
import weakref

import keras
import numpy as np

import loopscope
from loopscope.gear import words_of
from models import blobs, relative, small_model

OPTIONS = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}


def compiled():
    keras.utils.set_random_seed(0)
    model = small_model()
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def test_fit_evaluate_and_predict_give_what_the_model_gives():
    (x, y), ours, theirs = blobs(40), compiled(), compiled()
    got = loopscope.fit(ours, x, y, **OPTIONS)
    expected = theirs.fit(x, y, **OPTIONS)
    assert isinstance(got, keras.callbacks.History)
    for name, values in expected.history.items():
        np.testing.assert_allclose(got.history[name], values, rtol=1e-5)
    for was, now in zip(theirs.get_weights(), ours.get_weights(), strict=True):
        assert relative(was, now) < 1e-5
    np.testing.assert_allclose(
        loopscope.evaluate(ours, x, y, verbose=0),
        theirs.evaluate(x, y, verbose=0),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        loopscope.predict(ours, x, verbose=0),
        theirs.predict(x, verbose=0),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_second_call_goes_on_with_the_same_loop():
    (x, y), model = blobs(40), compiled()
    loopscope.fit(model, x, y, **OPTIONS)
    loop, _ = model._loopscope_loop
    loopscope.fit(model, x, y, **OPTIONS)
    assert model._loopscope_loop[0] is loop
    assert loop.step == 20
    assert int(model.optimizer.iterations) == 20


def test_a_model_that_was_trained_can_be_saved_and_goes_on(tmp_path):
    (x, y), model = blobs(40), compiled()
    loopscope.fit(model, x, y, **OPTIONS)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loopscope.fit(loaded, x, y, **OPTIONS)
    loopscope.fit(model, x, y, **OPTIONS)
    for was, now in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert relative(was, now) < 1e-5


def test_a_model_is_forgotten_with_its_loop():
    (x, y), model = blobs(40), compiled()
    loopscope.fit(model, x, y, **OPTIONS)
    gone = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None


def test_what_compile_asks_for_is_obeyed_also_the_next_time():
    (x, y), model = blobs(40), compiled()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gears = []
    for words in ({}, {"run_eagerly": True}, {"jit_compile": True}):
        model.compile("sgd", loss, **words)
        loopscope.fit(model, x, y, **OPTIONS)
        gears.append(model._loopscope_loop[0].gear)
    assert not gears[0].run_eagerly
    assert gears[1].run_eagerly
    assert gears[2].jit_compile
    assert model._loopscope_loop[0].step == 30


def test_compiling_without_xla_means_eager_where_there_is_no_graph():
    model = compiled()
    model.compile("sgd", "mse", jit_compile=False)
    asked = words_of(model)
    tensorflow = keras.backend.backend() == "tensorflow"
    assert asked == ({} if tensorflow else {"run_eagerly": True})
