"""Bugs to be found: each planted in a dense, a convolutional and a recurrent model."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
from keras import layers, ops

import loopscope
from loopscope import Loop
from models import FUSED, STEP, Batches, classes, numbers

ROWS = 128
LOGITS = keras.losses.SparseCategoricalCrossentropy


class Family:
    """A kind of model with data for it.

    Args:
        name: Of the kind.
        shape: Of an example.
        body: Makes the layers between the input and the last one; takes options of the
            first layer with weights.
    """

    def __init__(self, name, shape, body):
        self.name, self.shape, self._body = name, shape, body

    def x(self, rows=ROWS):
        return numbers(rows, *self.shape)

    def y(self, rows=ROWS, count=3):
        return classes(rows, count)

    def model(self, *rest, **options):
        return keras.Sequential(
            [keras.Input(self.shape), *self._body(**options), *rest]
        )


def _dense(**options):
    return [layers.Dense(16, **{"activation": "relu", **options})]


def _conv(**options):
    return [
        layers.Conv2D(16, 3, **{"activation": "relu", **options}),
        layers.GlobalAveragePooling2D(),
    ]


def _recurrent(**options):
    return [
        layers.Conv1D(16, 2, **{"activation": "relu", **options}),
        layers.LSTM(8),
    ]


FAMILIES = [
    Family("dense", (8,), _dense),
    Family("conv", (8, 8, 1), _conv),
    Family("recurrent", (5, 4), _recurrent),
]


def built_in(model, loss=None, optimizer="adam", **options):
    loss = loss or LOGITS(from_logits=True)
    return Loop(
        model, optimizer, loss, gear=options.pop("gear", FUSED), seed=0, **options
    )


def mean_square(y, outputs):
    return ops.mean(ops.square(outputs - y))


def own(
    model,
    loss=mean_square,
    *,
    optimizer=None,
    training=True,
    variables=None,
    call=None,
    times=1,
    metric=None,
    updates=1,
):
    """A loop with a step of its own, which does what the arguments say."""
    optimizer = optimizer or keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=STEP, seed=0)
    variables = variables or model.trainable_variables

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            outputs = (call or model)(x, training=training)
            return loss(y, outputs), outputs

        (value, outputs), grads = loopscope.value_and_grad(
            compute_loss, variables, has_aux=True
        )
        for _ in range(times):
            optimizer.apply(grads, variables)
        if metric is not None:
            for _ in range(updates):
                metric.update_state(y, outputs)
        return value

    return loop


BUGS = {}


def bug(check):
    """Register a bug: a function of a family that gives a loop and its data."""

    def register(function):
        BUGS[function.__name__] = (check, function)
        return function

    return register


@bug("from_logits")
def softmax_under_from_logits(f):
    model = f.model(layers.Dense(3, activation="softmax"))
    return built_in(model), (f.x(), f.y())


@bug("from_logits")
def softmax_layer_under_from_logits(f):
    model = f.model(layers.Dense(3), layers.Softmax())
    return built_in(model), (f.x(), f.y())


@bug("from_logits")
def softmax_of_an_own_step_under_from_logits(f):
    loop = own(f.model(layers.Dense(3)), lambda y, o: LOGITS(True)(y, ops.softmax(o)))
    return loop, (f.x(), f.y())


@bug("from_logits")
def logits_without_from_logits(f):
    return built_in(f.model(layers.Dense(3)), LOGITS()), (4 * f.x(), f.y())


@bug("from_logits")
def sigmoid_under_from_logits(f):
    model = f.model(layers.Dense(1, activation="sigmoid"))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return built_in(model, loss), (f.x(), f.y(count=2)[:, None])


@bug("from_logits")
def binary_logits_without_from_logits(f):
    far = keras.initializers.Constant(5)
    model = f.model(layers.Dense(1, bias_initializer=far))
    loss = keras.losses.BinaryCrossentropy()
    return built_in(model, loss), (4 * f.x(), f.y(count=2)[:, None])


@bug("labels")
def labels_from_one(f):
    return built_in(f.model(layers.Dense(3))), (f.x(), f.y() + 1)


@bug("labels")
def labels_from_minus_one(f):
    return built_in(f.model(layers.Dense(3))), (f.x(), f.y() - 1)


@bug("labels")
def binary_labels_of_one_and_two(f):
    model = f.model(layers.Dense(1, activation="sigmoid"))
    loss = keras.losses.BinaryCrossentropy()
    return built_in(model, loss), (f.x(), f.y(count=2)[:, None] + 1)


@bug("broadcast")
def labels_without_the_axis_of_outputs(f):
    return own(f.model(layers.Dense(1))), (f.x(), numbers(ROWS, seed=5))


@bug("inputs")
def unscaled_inputs(f):
    x = 255 * np.random.default_rng(0).uniform(size=(ROWS, *f.shape))
    return built_in(f.model(layers.Dense(3))), (x.astype("float32"), f.y())


@bug("inputs")
def constant_inputs(f):
    return built_in(f.model(layers.Dense(3))), (0 * f.x() + 0.5, f.y())


@bug("inputs")
def inputs_with_nan(f):
    x = f.x()
    x[::7] = np.nan
    return built_in(f.model(layers.Dense(3))), (x, f.y())


@bug("order")
def sorted_data(f):
    y = np.sort(f.y())
    batches = [(f.x(16), part) for part in np.split(y, 8)]
    return built_in(f.model(layers.Dense(3))), (batches,)


@bug("order")
def the_same_batches_every_epoch(f):
    return built_in(f.model(layers.Dense(3))), (f.x(), f.y(), {"shuffle": False})


@bug("training_flag")
def dropout_that_drops_nothing(f):
    model = f.model(layers.Dropout(0.5), layers.Dense(1))
    return own(model, training=False), (f.x(), numbers(ROWS, 1))


@bug("training_flag")
def batchnorm_that_learns_nothing(f):
    model = f.model(layers.BatchNormalization(), layers.Dense(1))
    return own(model, training=False), (f.x(), numbers(ROWS, 1))


def tested(f, training, *rest):
    model = f.model(*rest, layers.Dense(1))
    loop = built_in(model, "mse")

    @loop.test_step
    def test_step(x, y):
        return mean_square(y, model(x, training=training))

    data = {"validation_data": (f.x(32), numbers(32, 1, seed=7))}
    return loop, (f.x(), numbers(ROWS, 1), data)


@bug("test_step")
def dropout_in_the_test_step(f):
    return tested(f, True, layers.Dropout(0.5))


@bug("test_step")
def batchnorm_that_learns_in_the_test_step(f):
    return tested(f, True, layers.BatchNormalization())


@bug("regularization")
def regularizers_left_out(f):
    model = f.model(layers.Dense(1), kernel_regularizer="l2")
    return own(model, keras.losses.MeanSquaredError()), (f.x(), numbers(ROWS, 1))


@bug("metrics")
def a_metric_updated_twice(f):
    metric = keras.metrics.MeanSquaredError()
    loop = own(f.model(layers.Dense(1)), metric=metric, updates=2)
    return loop, (f.x(), numbers(ROWS, 1))


@bug("variables")
def a_gradient_that_is_stopped(f):
    model = f.model(layers.Dense(1))

    def call(x, training):
        for layer in model.layers[:-1]:
            x = layer(x)
        return model.layers[-1](ops.stop_gradient(x))

    return own(model, call=call), (f.x(), numbers(ROWS, 1))


@bug("variables")
def variables_left_out(f):
    model = f.model(layers.Dense(1))
    variables = model.layers[-1].trainable_variables
    return own(model, variables=variables), (f.x(), numbers(ROWS, 1))


@bug("variables")
def an_optimizer_applied_twice(f):
    return own(f.model(layers.Dense(1)), times=2), (f.x(), numbers(ROWS, 1))


@bug("variables")
def a_learning_rate_of_zero(f):
    optimizer = keras.optimizers.SGD(0.0)
    return built_in(f.model(layers.Dense(3)), optimizer=optimizer), (f.x(), f.y())


@bug("float16")
def half_precision_without_scaling(f):
    keras.config.set_dtype_policy("mixed_float16")
    loop = own(
        f.model(layers.Dense(1, dtype="float32")), optimizer=keras.optimizers.SGD(1e-3)
    )
    return loop, (f.x(), numbers(ROWS, 1))


@bug("nonfinite")
def a_logarithm_of_what_is_negative(f):
    loop = own(f.model(layers.Dense(1)), lambda y, o: ops.mean(ops.log(o)))
    return loop, (f.x(), numbers(ROWS, 1))


@bug("nonfinite")
def a_division_by_zero(f):
    loop = own(
        f.model(layers.Dense(1)), lambda y, o: ops.mean((o - y) / (0 * ops.sum(y)))
    )
    return loop, (f.x(), numbers(ROWS, 1))


@bug("gradient_sizes")
def gradients_that_vanish(f):
    deep = [layers.Dense(8, activation="sigmoid") for _ in range(12)]
    return built_in(f.model(*deep, layers.Dense(3))), (f.x(), f.y())


@bug("gradient_sizes")
def gradients_that_explode(f):
    model = f.model(layers.Dense(1))
    loop = own(
        model,
        lambda y, o: 1e6 * mean_square(y, o),
        optimizer=keras.optimizers.Adam(1e-3),
    )
    return loop, (f.x(), numbers(ROWS, 1))


@bug("dead_units")
def units_that_are_dead(f):
    model = f.model(layers.Dense(3), bias_initializer=keras.initializers.Constant(-99))
    return built_in(model), (f.x(), f.y())


@bug("saturation")
def large_initial_weights(f):
    large = keras.initializers.RandomNormal(stddev=10_000)
    # Of ten classes few are hit by chance.
    model = f.model(layers.Dense(10, kernel_initializer=large))
    return built_in(model), (f.x(), f.y(count=10))


@bug("update_ratio")
def a_learning_rate_that_is_too_large(f):
    optimizer = keras.optimizers.Adam(1.0)
    return built_in(f.model(layers.Dense(3)), optimizer=optimizer), (f.x(), f.y())


@bug("update_ratio")
def a_learning_rate_that_is_too_small(f):
    optimizer = keras.optimizers.Adam(1e-8)
    return built_in(f.model(layers.Dense(3)), optimizer=optimizer), (f.x(), f.y())


@bug("overlap")
def validation_data_from_the_training_data(f):
    x, y = f.x(), f.y()
    return built_in(f.model(layers.Dense(3))), (
        x,
        y,
        {"validation_data": (x[:32], y[:32])},
    )


def pipeline(f, rows=ROWS):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((f.x(rows), f.y(rows)))


@bug("order")
def a_small_shuffle_buffer(f):
    data = pipeline(f).shuffle(16, seed=0).batch(32)
    return built_in(f.model(layers.Dense(3))), (data,)


@bug("order")
def shuffled_batches(f):
    data = pipeline(f).batch(32).shuffle(4, seed=0)
    return built_in(f.model(layers.Dense(3))), (data,)


class Slow(Batches):
    """Batches that take a while to come."""

    def __iter__(self):
        for batch in self.batches:
            time.sleep(0.06)
            yield batch


@bug("waiting")
def batches_that_come_slowly(f):
    batches = Slow((f.x(16), f.y(16)) for _ in range(6))
    return built_in(f.model(layers.Dense(3)), gear=STEP), (batches,)


@bug("uncompiled")
def a_step_that_runs_eagerly(f):
    return built_in(f.model(layers.Dense(3)), gear="eager"), (f.x(), f.y())


@bug("compiling")
def convolutions_in_a_compiled_loop(f):
    # TensorFlow's XLA refuses an LSTM in a loop: without the body of the family.
    model = keras.Sequential(
        [
            keras.Input(f.shape),
            layers.Flatten(),
            layers.Dense(16 * 16 * 4),
            layers.Reshape((16, 16, 4)),
            layers.Conv2D(16, 3),
            layers.Conv2D(16, 3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    return built_in(model, gear="fused-xla"), (f.x(64), f.y(64))


@bug("retracing")
def batches_of_ever_new_shapes(f):
    batches = [(f.x(rows), f.y(rows)) for rows in range(8, 22)]
    return built_in(f.model(layers.Dense(3)), gear="xla"), (batches,)


def written(f, compute_loss, *, gear=STEP, after=lambda loss, outputs: None):
    """A loop whose step takes its loss from a function of model, x and y."""
    model, optimizer = f.model(layers.Dense(1)), keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=gear, seed=0)

    @loop.train_step
    def train_step(x, y):
        (loss, outputs), grads = loopscope.value_and_grad(
            lambda: compute_loss(model, x, y), model.trainable_variables, has_aux=True
        )
        optimizer.apply(grads, model.trainable_variables)
        after(loss, outputs)
        return loss

    return loop, (f.x(), numbers(ROWS, 1))


def plain_loss(model, x, y):
    outputs = model(x, training=True)
    return mean_square(y, outputs), outputs


@bug("side_effects")
def a_counter_in_python(f):
    count = 0

    def compute_loss(model, x, y):
        nonlocal count
        count += 1
        loss, outputs = plain_loss(model, x, y)
        return loss * min(1.0, count / 100), outputs

    return written(f, compute_loss)


@bug("side_effects")
def noise_from_numpy(f):
    rng = np.random.default_rng(0)

    def compute_loss(model, x, y):
        noise = rng.normal(size=tuple(x.shape)).astype("float32")
        return plain_loss(model, x + 0.1 * noise, y)

    return written(f, compute_loss)


@bug("side_effects")
def a_learning_rate_that_is_a_number(f):
    rate = 0.01
    model = f.model(layers.Dense(1))
    loop = Loop(model, gear=STEP, seed=0)

    @loop.train_step
    def train_step(x, y):
        variables = model.trainable_variables
        loss, grads = loopscope.value_and_grad(
            lambda: plain_loss(model, x, y)[0], variables
        )
        for variable, grad in zip(variables, grads, strict=True):
            variable.assign_sub(rate * grad)
        return loss

    def train(x, y):
        nonlocal rate
        for epoch in loop.epochs(3):
            epoch.train(loop.source(x, y))
            rate *= 0.5

    loop.training = train
    return loop, (f.x(), numbers(ROWS, 1))


@bug("side_effects")
def numbers_that_are_printed(f):
    def after(loss, outputs):
        print(loss)

    return written(f, plain_loss, after=after)


@bug("memory")
def outputs_that_are_kept(f):
    kept = []

    def compute_loss(model, x, y):
        loss, outputs = plain_loss(model, x, y)
        kept.append(x * outputs[0, 0])
        return loss, outputs

    return written(f, compute_loss, gear="eager")


@bug("dropped_state")
def statistics_that_are_dropped(f):
    model = f.model(layers.BatchNormalization(), layers.Dense(1))

    def call(x, training):
        states = model.trainable_variables, model.non_trainable_variables
        values = [[v.value for v in state] for state in states]
        outputs, _ = model.stateless_call(*values, x, training=training)
        return outputs

    return own(model, call=call), (f.x(), numbers(ROWS, 1))


@bug("accumulating")
def gradients_that_add_up(f):
    model, optimizer = f.model(layers.Dense(1)), keras.optimizers.Adam(1e-3)
    sums = [keras.Variable(ops.zeros(v.shape)) for v in model.trainable_variables]
    loop = Loop(model, gear=STEP, seed=0)

    @loop.train_step
    def train_step(x, y):
        loss, grads = loopscope.value_and_grad(
            lambda: plain_loss(model, x, y)[0], model.trainable_variables
        )
        for total, grad in zip(sums, grads, strict=True):
            total.assign_add(grad)
        optimizer.apply([total + 0 for total in sums], model.trainable_variables)
        return loss

    return loop, (f.x(), numbers(ROWS, 1))


@bug("overfit")
def gradients_of_the_wrong_sign(f):
    model, optimizer = f.model(layers.Dense(1)), keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=STEP, seed=0)

    @loop.train_step
    def train_step(x, y):
        loss, grads = loopscope.value_and_grad(
            lambda: mean_square(y, model(x, training=True)), model.trainable_variables
        )
        optimizer.apply([-grad for grad in grads], model.trainable_variables)
        return loss

    return loop, (f.x(), numbers(ROWS, 1))
