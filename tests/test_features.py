"""What real models have: each feature trains as it does under `keras.Model.fit`."""

import keras
import numpy as np
import pytest
from keras import layers

import loopscope
from loopscope import Loop
from models import (
    ALL,
    BATCH,
    FUSED,
    TENSORFLOW,
    blobs,
    classes,
    fresh,
    gan,
    halved,
    numbers,
    reference,
    relative,
    small_loop,
    small_model,
)

ROWS = 24


def against_keras(make, x, y, *, epochs=2, gear=FUSED, rtol=1e-5, **options):
    """Train the same model in a loop and under Keras; compare; give the loop back."""
    options = {
        "batch_size": 8,
        "epochs": epochs,
        "shuffle": False,
        "verbose": 0,
        **options,
    }
    loop, model = fresh(make, gear), reference(fresh(make, gear))
    ours = loop.fit(x, y, **options).history
    theirs = model.fit(x, y, **options).history
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-6)
    mine, keras_own = values(loop.model), values(model)
    assert list(mine) == list(keras_own)
    apart = {p: relative(keras_own[p], mine[p]) for p in mine}
    assert {p: d for p, d in apart.items() if d > rtol} == {}
    return loop


def values(model):
    variables = (*model.variables, *model.optimizer.variables)
    return {v.path: keras.ops.convert_to_numpy(v) for v in variables}


def of(optimizer, *, model=small_model, **options):
    """A function that makes the small loop with this optimizer and model."""

    def make(gear):
        return small_loop(gear, model=model(), optimizer=optimizer(), **options)

    return make


@pytest.mark.parametrize(
    "builder", halved([b for b in ALL if b is not gan], ids=lambda b: b.__name__)
)
def test_every_model_trains_as_under_keras(builder):
    make, (x, y) = builder()
    against_keras(make, x, y, batch_size=BATCH, epochs=1)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.RMSprop(0.01),
        lambda: keras.optimizers.Adam(0.01, amsgrad=True),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.5, clipnorm=0.01),
        lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.01),
        lambda: keras.optimizers.SGD(0.5, clipvalue=0.001),
        lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
        lambda: keras.optimizers.SGD(
            0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
        ),
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        lambda: keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
        ),
        lambda: keras.optimizers.SGD(
            keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.5, 0.05, 0.0])
        ),
    ],
    ids=[
        "momentum",
        "rmsprop",
        "amsgrad",
        "adamw",
        "weight decay",
        "clipnorm",
        "global clipnorm",
        "clipvalue",
        "ema",
        "ema overwriting",
        "gradient accumulation",
        "exponential decay",
        "piecewise decay",
    ],
)
def test_an_optimizer_does_what_it_does_under_keras(optimizer):
    against_keras(of(optimizer), *blobs(ROWS))


def test_gradient_accumulation_updates_weights_every_second_step_only():
    loop = of(lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))(FUSED)
    weights, moved = loop.model.get_weights()[0], []
    for epoch in loop.epochs(1):
        for _ in epoch.train(blobs(32), batch_size=8):
            now = loop.model.get_weights()[0]
            moved.append(not np.array_equal(now, weights))
            weights = now
    assert moved == [False, True, False, True]


def test_ema_has_an_average_of_its_own_in_the_state():
    loop = of(lambda: keras.optimizers.SGD(0.1, use_ema=True))(FUSED)
    loop.fit(*blobs(ROWS), verbose=0)
    averages = [path for path in dict(loop.state) if "average" in path]
    assert len(averages) == 4


def test_a_schedule_counts_steps_inside_of_a_chunk():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.0])
    loop = of(lambda: keras.optimizers.SGD(schedule))(FUSED)
    states = {}
    for epoch in loop.epochs(1):
        for step in epoch.train(blobs(48), batch_size=8):
            states[step.index] = loop.model.get_weights()[0]
    assert not np.array_equal(states[0], states[2])
    np.testing.assert_array_equal(states[2], states[5])


# Layers.


def test_batchnorm_moves_its_statistics_while_training_only():
    def model():
        return keras.Sequential(
            [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3)]
        )

    make = of(lambda: keras.optimizers.SGD(0.1), model=model)
    x, y = blobs(ROWS)
    loop = against_keras(make, x, y)
    mean = keras.ops.convert_to_numpy(loop.model.layers[0].moving_mean).copy()
    assert np.abs(mean).max() > 0.01
    loop.evaluate(x, y, verbose=0)
    loop.predict(x, verbose=0)
    now = keras.ops.convert_to_numpy(loop.model.layers[0].moving_mean)
    np.testing.assert_array_equal(mean, now)


def test_the_moving_mean_of_batchnorm_is_what_its_formula_says():
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(momentum=0.5), layers.Dense(3)]
    )
    loop = small_loop(model=model)
    x, y = blobs(16)
    loop.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    expected = 0.25 * x[:8].mean(0) + 0.5 * x[8:].mean(0)
    found = keras.ops.convert_to_numpy(model.layers[0].moving_mean)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def dropout_model():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(32),
            layers.Dropout(0.5, seed=3),
            layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_the_seed_of_dropout_advances_with_each_step_and_is_part_of_the_state(gear):
    loop = fresh(of(keras.optimizers.SGD, model=dropout_model), gear)
    seeds = [p for p in dict(loop.state) if "seed_generator_state" in p]
    assert len(seeds) == 1
    seen = []
    for epoch in loop.epochs(1):
        for _ in epoch.train(blobs(ROWS), batch_size=8):
            seen.append(tuple(loop.state.numpy()[seeds[0]]))
    assert len(set(seen)) == 3
    loop.evaluate(*blobs(ROWS), verbose=0)
    assert tuple(loop.state.numpy()[seeds[0]]) == seen[-1]


def test_dropout_draws_another_mask_in_each_step_of_a_chunk():
    loop = fresh(
        of(lambda: keras.optimizers.SGD(0.0), model=dropout_model, metrics=None), FUSED
    )
    x, y = blobs(8)
    same = np.tile(x, (6, 1)), np.tile(y, 6)
    losses = []
    loop.subscribe(lambda e: losses.extend(getattr(e, "outputs", {}).get("loss", ())))
    loop.fit(*same, batch_size=8, shuffle=False, verbose=0)
    assert len(losses) == len(set(losses)) == 6


def test_dropout_trains_as_under_keras():
    # Same operations, same seed: the graph of Keras and ours draw the same masks.
    against_keras(
        of(keras.optimizers.SGD, model=dropout_model), *blobs(ROWS), gear=FUSED
    )


def test_dropout_without_a_seed_is_part_of_the_state_too():
    model = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(3)])
    loop = small_loop(model=model)
    loop.fit(*blobs(ROWS), batch_size=8, verbose=0)
    assert any("seed_generator_state" in path for path in dict(loop.state))


def noisy(gear, seed):
    loop = small_loop(gear)

    @loop.train_step
    def train_step(x, y):
        noise = keras.random.normal(x.shape, seed=seed)
        return Loop.train_step(loop, x + noise, y)

    return loop


def assert_noise_is_part_of_the_state(gear, seed):
    states = []
    for _ in range(2):
        loop = fresh(lambda gear: noisy(gear, seed()), gear)
        loop.fit(*blobs(ROWS), batch_size=8, verbose=0)
        states.append(loop.state.sha256())
        assert any("seed" in path for path in dict(loop.state))
    assert states[0] == states[1]


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_the_seed_generator_of_an_own_step_is_part_of_the_state(gear):
    assert_noise_is_part_of_the_state(gear, lambda: keras.random.SeedGenerator(1))


@pytest.mark.skipif(not TENSORFLOW, reason="Keras refuses to trace it on JAX")
@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_random_numbers_without_a_seed_are_part_of_the_state(gear):
    assert_noise_is_part_of_the_state(gear, lambda: None)


# Losses.


def test_regularization_losses_are_part_of_the_loss():
    def model():
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.5)),
                layers.Dense(3, activity_regularizer=keras.regularizers.L1(0.1)),
            ]
        )

    make = of(lambda: keras.optimizers.SGD(0.1), model=model)
    against_keras(make, *blobs(ROWS))
    plain = of(lambda: keras.optimizers.SGD(0.0), model=model)
    loop = fresh(plain, FUSED)
    x, y = blobs(8)
    penalty = 0.5 * np.square(loop.model.layers[0].get_weights()[0]).sum()
    penalty += 0.1 * np.abs(loop.model.predict(x, verbose=0)).sum() / 8
    found = loop.fit(x, y, verbose=0).history["loss"][0]
    bare = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
        y, loop.model.predict(x, verbose=0)
    )
    assert found == pytest.approx(float(bare) + penalty, rel=1e-5)


def test_a_loss_added_in_call_counts():
    class Penalty(layers.Layer):
        def call(self, x):
            self.add_loss(10.0 + keras.ops.mean(x))
            return x

    def model():
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(8), Penalty(), layers.Dense(3)]
        )

    loop = against_keras(of(keras.optimizers.SGD, model=model), *blobs(ROWS))
    assert loop.evaluate(*blobs(ROWS), verbose=0)[0] > 9


def test_regularization_losses_count_once_a_step_not_once_a_chunk():
    def model():
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(3, kernel_regularizer="l2")]
        )

    loop = fresh(of(lambda: keras.optimizers.SGD(0.0), model=model), FUSED)
    losses = []
    loop.subscribe(lambda e: losses.extend(getattr(e, "outputs", {}).get("loss", ())))
    x, y = blobs(8)
    loop.fit(np.tile(x, (9, 1)), np.tile(y, 9), batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


# What is trained.


def test_a_frozen_layer_stays_as_it_is():
    def model():
        made = small_model()
        made.layers[0].trainable = False
        return made

    make = of(lambda: keras.optimizers.Adam(0.1), model=model)
    start = fresh(make, FUSED).model.layers[0].get_weights()
    loop = against_keras(make, *blobs(ROWS))
    for was, now in zip(start, loop.model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_freezing_between_two_trainings_is_obeyed():
    loop = fresh(of(lambda: keras.optimizers.SGD(0.1)), FUSED)
    loop.fit(*blobs(ROWS), verbose=0)
    loop.model.layers[0].trainable = False
    loop.model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    first, second = (layer.get_weights()[0] for layer in loop.model.layers)
    loop.fit(*blobs(ROWS), verbose=0)
    np.testing.assert_array_equal(first, loop.model.layers[0].get_weights()[0])
    assert not np.array_equal(second, loop.model.layers[1].get_weights()[0])


def test_compiling_a_model_anew_is_obeyed():
    loop = fresh(of(lambda: keras.optimizers.SGD(0.1)), FUSED)
    loop.fit(*blobs(ROWS), verbose=0)
    loop.model.compile(
        "sgd",
        "sparse_categorical_crossentropy",
        metrics=["sparse_categorical_accuracy"],
    )
    history = loop.fit(*blobs(ROWS), verbose=0).history
    assert set(history) == {"loss", "sparse_categorical_accuracy"}


# Precision.


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_as_under_keras(policy):
    def model():
        keras.config.set_dtype_policy(policy)
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, activation="relu"),
                layers.Dense(3, dtype="float32"),
            ]
        )

    make = of(lambda: keras.optimizers.SGD(0.1), model=model)
    # The half-precision products of two graphs may be rounded apart by one bit.
    loop = against_keras(make, *blobs(ROWS), rtol=1e-2)
    scaled = isinstance(loop.model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert loop.model.layers[0].compute_dtype == policy.removeprefix("mixed_")
    assert loop.model.layers[0].kernel.dtype == "float32"


@pytest.mark.parametrize("gear", ["eager", FUSED])
@pytest.mark.parametrize("own", [False, True])
def test_loss_scaling_skips_a_step_that_is_not_finite_and_halves_the_scale(gear, own):
    def make(gear):
        keras.config.set_dtype_policy("mixed_float16")
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=2.0**10
        )
        loop = small_loop(gear, optimizer=optimizer)
        if own:
            write_the_step(loop)
        return loop

    def write_the_step(loop):
        model, optimizer = loop.model, loop.model.optimizer

        @loop.train_step
        def train_step(x, y):
            def compute_loss():
                loss = model.compute_loss(x, y, model(x, training=True))
                return optimizer.scale_loss(loss), loss

            (_, loss), gradients = loopscope.value_and_grad(
                compute_loss, model.trainable_variables, has_aux=True
            )
            optimizer.apply(gradients, model.trainable_variables)
            return loss

    loop = fresh(make, gear)
    x, y = blobs(ROWS)
    x = x.copy()
    x[8:16] = 1e30
    weights, scales = [], []
    for epoch in loop.epochs(1):
        for _ in epoch.train((x, y), batch_size=8, shuffle=False):
            weights.append(loop.model.get_weights()[0])
            scales.append(float(loop.model.optimizer.dynamic_scale))
    assert scales == [2.0**10, 2.0**9, 2.0**9]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[1], weights[2])


# Data of many kinds.


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float32"])
def test_labels_of_any_type_train_alike(dtype):
    x, y = blobs(ROWS)
    make = of(lambda: keras.optimizers.SGD(0.1))
    expected = fresh(make, FUSED)
    expected.fit(x, y, batch_size=8, verbose=0)
    loop = fresh(make, FUSED)
    loop.fit(x, y.astype(dtype), batch_size=8, verbose=0)
    for was, now in zip(
        expected.model.get_weights(), loop.model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(was, now, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float64", "bool"])
def test_inputs_of_any_type_train_as_under_keras(dtype):
    x = np.random.default_rng(0).integers(0, 2, (ROWS, 4)).astype(dtype)
    against_keras(of(lambda: keras.optimizers.SGD(0.1)), x, classes(ROWS, 3))


def test_two_dimensional_labels_and_one_hot_labels_train_as_under_keras():
    x, y = blobs(ROWS)
    sgd = lambda: keras.optimizers.SGD(0.1)  # noqa: E731
    against_keras(of(sgd), x, y[:, None])
    one_hot = np.eye(3, dtype="float32")[y]
    against_keras(
        of(sgd, loss=keras.losses.CategoricalCrossentropy(from_logits=True)), x, one_hot
    )


def test_binary_labels_train_as_under_keras():
    def model():
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(1, activation="sigmoid")]
        )

    make = of(
        lambda: keras.optimizers.SGD(0.1),
        model=model,
        loss="binary_crossentropy",
        metrics=["accuracy", "auc"],
    )
    against_keras(make, *blobs(ROWS, count=2))


def two_inputs_two_outputs(as_dicts):
    def make(gear):
        a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
        hidden = layers.Concatenate()([layers.Dense(5)(a), b])
        p = layers.Dense(3, name="p")(hidden)
        q = layers.Dense(1, name="q")(hidden)
        crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if as_dicts:
            model = keras.Model({"a": a, "b": b}, {"p": p, "q": q})
            loss = {"p": crossentropy, "q": "mse"}
            weights, metrics = {"p": 1.0, "q": 0.3}, {"p": ["accuracy"], "q": ["mae"]}
        else:
            model = keras.Model([a, b], [p, q])
            loss, weights = [crossentropy, "mse"], [1.0, 0.3]
            metrics = [["accuracy"], ["mae"]]
        return small_loop(
            gear, model=model, loss=loss, loss_weights=weights, metrics=metrics
        )

    x, y = blobs(ROWS)
    xs, ys = {"a": x, "b": numbers(ROWS, 2)}, {"p": y, "q": numbers(ROWS, 1, seed=9)}
    if not as_dicts:
        xs, ys = list(xs.values()), list(ys.values())
    return make, xs, ys


@pytest.mark.parametrize("as_dicts", [True, False], ids=["dicts", "lists"])
def test_several_inputs_and_outputs_train_as_under_keras(as_dicts):
    make, x, y = two_inputs_two_outputs(as_dicts)
    against_keras(make, x, y)


def test_sample_weights_of_each_output_train_as_under_keras():
    make, x, y = two_inputs_two_outputs(as_dicts=True)
    weights = {
        "p": np.linspace(0, 1, ROWS, dtype="float32"),
        "q": np.linspace(2, 0, ROWS, dtype="float32"),
    }
    against_keras(make, x, y, sample_weight=weights)


def test_an_example_of_weight_zero_does_not_count():
    make = of(lambda: keras.optimizers.SGD(0.1), metrics=None)
    x, y = blobs(8)
    weight = np.ones(8, "float32")
    weight[3] = 0
    weights = []
    for label in (0, 2):
        y = y.copy()
        y[3] = label
        loop = fresh(make, FUSED)
        loop.fit(x, y, sample_weight=weight, batch_size=8, shuffle=False, verbose=0)
        weights.append(loop.model.get_weights()[0])
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("layer", [layers.GRU, layers.SimpleRNN, layers.LSTM])
def test_recurrent_layers_train_as_under_keras(layer):
    def model():
        return keras.Sequential([keras.Input((5, 4)), layer(6), layers.Dense(3)])

    make = of(lambda: keras.optimizers.SGD(0.1), model=model)
    against_keras(make, numbers(16, 5, 4), classes(16, 3), epochs=1)


def test_masked_sequences_train_as_under_keras():
    def model():
        return keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                layers.Embedding(9, 4, mask_zero=True),
                layers.GRU(6),
                layers.Dense(3),
            ]
        )

    ids = np.random.default_rng(0).integers(0, 9, (16, 5)).astype("int32")
    ids[:, 3:] = 0
    make = of(lambda: keras.optimizers.SGD(0.1), model=model)
    against_keras(make, ids, classes(16, 3), epochs=1)


def test_an_unbuilt_model_is_built_from_the_data():
    def model():
        return keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(3)])

    make = of(lambda: keras.optimizers.SGD(0.1), model=model)
    loop = fresh(make, FUSED)
    assert not loop.model.built
    loop.fit(*blobs(ROWS), verbose=0)
    assert loop.model.built
    assert len(loop.model.trainable_variables) == 4


def test_the_model_learns():
    loop = small_loop(optimizer=keras.optimizers.Adam(0.05))
    x, y = blobs(96)
    loop.fit(x, y, batch_size=16, epochs=10, verbose=0)
    assert loop.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] > 0.9
