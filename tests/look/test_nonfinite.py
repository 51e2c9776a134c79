"""The first place where numbers stop being finite is named, and no other."""

import keras
import numpy as np
from keras import layers, ops

import loopscope
from models import FUSED, JAX, TENSORFLOW, blobs, fresh, small_loop

X, Y = blobs(16)


def looked(model, x=X, y=Y, **options):
    return fresh(lambda gear: small_loop(gear, model=model, **options), FUSED).look(
        x, y
    )


class Log(layers.Layer):
    def call(self, x):
        # What follows hides it: the loss may stay finite.
        return ops.relu(ops.log(x))


class Root(layers.Layer):
    def call(self, x):
        return ops.sqrt(x)


def test_an_operation_is_named_with_its_layer_and_inputs():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8), Log(name="log"), layers.Dense(3)]
    )
    first = looked(model).first_nonfinite
    assert (first.what, first.name.lower()) == ("operation", "log")
    assert first.layer == f"{model.name}/log"
    assert first.phase == "forward"
    (given,), (made,) = first.inputs, first.outputs
    assert np.isfinite(given).all()
    assert (given <= 0).any()
    np.testing.assert_array_equal(
        first.examples, np.flatnonzero(~np.isfinite(made).all(axis=1))
    )
    assert "log" in str(first).lower()


def test_a_batch_that_was_not_finite_is_named_with_its_examples():
    x = X.copy()
    x[5, 1], x[9, 0] = np.nan, np.inf
    first = looked(keras.Sequential([keras.Input((4,)), layers.Dense(3)]), x)
    first = first.first_nonfinite
    assert (first.what, first.name, list(first.examples)) == ("batch", "x", [5, 9])


def test_a_nan_that_the_loss_does_not_show_is_found_all_the_same():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3)])
    loop = fresh(lambda gear: small_loop(gear, model=model), FUSED)

    @loop.train_step
    def train_step(x, y):
        def loss():
            hidden = model.layers[0](x, training=True)
            # Comparisons with NaN are false: what is not positive counts as 0.
            shown = ops.where(hidden > 0, hidden, ops.zeros_like(hidden))
            return ops.mean(ops.square(model.layers[1](shown)))

        variables = model.trainable_variables
        value, grads = loopscope.value_and_grad(loss, variables)
        model.optimizer.apply(grads, variables)
        return value

    x = X.copy()
    x[3] = np.nan
    step = loop.look(x, Y)
    assert np.isfinite(step.loss)
    assert step.first_nonfinite is not None
    assert list(step.first_nonfinite.examples) == [3]


def test_a_variable_that_was_not_finite_before_is_named():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3)])
    kernel = model.trainable_variables[2]
    spoilt = np.array(kernel.numpy())
    spoilt[0, 0] = np.nan
    loop = fresh(lambda gear: small_loop(gear, model=model), FUSED)
    kernel.assign(spoilt)
    first = loop.look(X, Y).first_nonfinite
    assert (first.what, first.name) == ("variable", kernel.path)


def test_an_operation_of_the_way_back_is_named():
    frozen = layers.Dense(4, use_bias=False, kernel_initializer="zeros", name="zeros")
    model = keras.Sequential(
        [keras.Input((4,)), frozen, Root(name="root"), layers.Dense(3)]
    )
    step = looked(model)
    # The root of 0 is 0; its slope is infinite.
    assert np.isfinite(step.loss)
    assert step.first_nonfinite.what == "operation"
    # JAX computes the slope on the way forward, where its layer is known.
    assert step.first_nonfinite.layer.endswith("root" if JAX else "")
    assert step.first_nonfinite.phase == ("forward" if JAX else "backward")


def test_an_overflow_of_the_optimizer_is_named():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    step = looked(model, 1e3 * X, optimizer=keras.optimizers.SGD(3e38))
    assert np.isfinite(step.loss)
    assert step.first_nonfinite.what == "operation"
    if TENSORFLOW:
        assert step.first_nonfinite.phase == "apply"


def test_a_mask_of_minus_infinity_is_no_finding():
    class Masked(layers.Layer):
        def call(self, x):
            far = ops.full_like(x, -np.inf)
            return ops.softmax(ops.where(x > x[:, :1], far, x))

    model = keras.Sequential([keras.Input((4,)), Masked(), layers.Dense(3)])
    assert looked(model).first_nonfinite is None


def test_a_healthy_step_has_none():
    assert fresh(small_loop, FUSED).look(X, Y).first_nonfinite is None
