"""On healthy loops nothing is found."""

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
    Batches,
    blobs,
    classes,
    convnet_with_batchnorm,
    dropout_mlp,
    embedding_with_mixed_outputs,
    fresh,
    gan,
    lstm,
    numbers,
    small_loop,
    some_of,
    subclassed,
    transformer_block,
)

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def of(model, *, optimizer="adam", loss=LOGITS, gear=FUSED, **options):
    return Loop(model, optimizer, loss, gear=gear, seed=0, **options)


def dense(*rest, features=4, units=16, activation="relu", **options):
    return keras.Sequential(
        [keras.Input((features,)), layers.Dense(units, activation=activation), *rest],
        **options,
    )


def classifier(**options):
    return of(dense(layers.Dense(3)), **options)


def softmax():
    return of(
        dense(layers.Dense(3, activation="softmax")),
        loss="sparse_categorical_crossentropy",
    ), blobs(128)


def one_hot():
    x, y = blobs(128)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    return of(dense(layers.Dense(3)), loss=loss), (x, np.eye(3, dtype="float32")[y])


def sigmoid():
    x, y = blobs(128, count=2)
    return of(
        dense(layers.Dense(1, activation="sigmoid")), loss="binary_crossentropy"
    ), (x, y)


def binary_logits():
    x, y = blobs(128, count=2)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return of(dense(layers.Dense(1)), loss=loss), (x, y[:, None])


def several_labels():
    x, _ = blobs(128)
    y = (numbers(128, 5) > 0.5).astype("float32")
    return of(
        dense(layers.Dense(5, activation="sigmoid")), loss="binary_crossentropy"
    ), (x, y)


def regression():
    x = numbers(128, 4)
    return of(dense(layers.Dense(1)), loss="mse"), (x, x.sum(axis=1, keepdims=True))


def flat_labels():
    x = numbers(128, 4)
    return of(dense(layers.Dense(1)), loss="mae"), (x, x.sum(axis=1))


def regularized():
    return of(dense(layers.Dense(3, kernel_regularizer="l2"))), blobs(128)


def batchnorm():
    return of(dense(layers.BatchNormalization(), layers.Dense(3))), blobs(128)


def dropout():
    return of(dense(layers.Dropout(0.3), layers.Dense(3))), blobs(128)


def noise():
    return of(dense(layers.GaussianNoise(0.1), layers.Dense(3))), blobs(128)


def attention():
    """The bias of an attention's keys has no gradient, by what attention is."""
    x = np.random.default_rng(0).integers(0, 50, (128, 16))
    inputs = keras.Input((16,), dtype="int32")
    hidden = layers.Embedding(50, 32)(inputs)
    hidden = layers.LayerNormalization()(
        hidden + layers.MultiHeadAttention(4, 8)(hidden, hidden)
    )
    outputs = layers.Dense(3)(layers.GlobalAveragePooling1D()(hidden))
    return of(keras.Model(inputs, outputs)), (x, x.sum(axis=1) % 3)


def layernorm():
    return of(dense(layers.LayerNormalization(), layers.Dense(3))), blobs(128)


def rescaled_pictures():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).integers(0, 256, (128, 8, 8, 1)).astype("uint8")
    return of(model), (x, classes(128, 3))


def augmented():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomFlip(seed=1),
            layers.Conv2D(8, 3, activation="gelu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    return of(model), (numbers(128, 8, 8, 1), classes(128, 3))


def unscaled_under_batchnorm():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.BatchNormalization(),
            layers.Dense(16, activation="relu"),
            layers.Dense(3),
        ]
    )
    x, y = blobs(128)
    return of(model), (100 * x, y)


def transfer():
    """A frozen body with BatchNorm, a new head."""
    body = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(16, activation="relu"),
            layers.BatchNormalization(),
        ],
        name="body",
    )
    body.trainable = False
    return of(keras.Sequential([body, layers.Dense(3)])), blobs(128)


def accumulation():
    optimizer = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=4)
    return classifier(optimizer=optimizer), blobs(128)


def ema():
    return classifier(optimizer=keras.optimizers.Adam(1e-3, use_ema=True)), blobs(128)


def clipped():
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=0.1)
    return classifier(optimizer=optimizer), blobs(128)


def warming_up():
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, 1000, warmup_target=1e-3, warmup_steps=500
    )
    return classifier(optimizer=keras.optimizers.Adam(schedule)), blobs(128)


def sgd():
    return classifier(optimizer=keras.optimizers.SGD(0.05, momentum=0.9)), blobs(128)


def adamw():
    return classifier(optimizer=keras.optimizers.AdamW(1e-3, weight_decay=1e-2)), blobs(
        128
    )


def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    return classifier(), blobs(128)


def mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    return classifier(), blobs(128)


def weighted():
    x, y = blobs(128)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, 128).astype("float32")
    return classifier(), (x, y, weights)


def a_stream():
    x, y = blobs(128)
    return classifier(), (
        Batches(zip(x.reshape(8, 16, 4), y.reshape(8, 16), strict=True)),
    )


def texts():
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(50, 8, mask_zero=True),
            layers.GRU(8),
            layers.Dense(3),
        ]
    )
    return of(model), (classes(128 * 6, 50).reshape(128, 6), classes(128, 3))


def sequences():
    """A class for each place of a sequence, some of which do not count."""
    model = keras.Sequential(
        [keras.Input((5, 4)), layers.Conv1D(8, 3, padding="same"), layers.Dense(3)]
    )
    y = classes(128 * 5, 4).reshape(128, 5) - 1
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    return of(model, loss=loss), (numbers(128, 5, 4), y)


def autoencoder():
    x = numbers(128, 4)
    return of(dense(layers.Dense(4)), loss="mse"), (x, x)


def two_heads():
    x = keras.Input((4,))
    hidden = layers.Dense(16, activation="relu")(x)
    outputs = [
        layers.Dense(3, name="kind")(hidden),
        layers.Dense(1, name="size")(hidden),
    ]
    data, y = blobs(128)
    model = keras.Model(x, outputs)
    return of(model, loss=[LOGITS, "mse"], loss_weights=[1.0, 0.1]), (
        data,
        [y, numbers(128, 1)],
    )


def residual():
    x = keras.Input((4,))
    hidden = layers.Dense(16)(x)
    for _ in range(6):
        hidden = hidden + layers.Dense(16, activation="relu")(
            layers.LayerNormalization()(hidden)
        )
    return of(keras.Model(x, layers.Dense(3)(hidden))), blobs(128)


def zero_last_layer():
    return of(dense(layers.Dense(3, kernel_initializer="zeros"))), blobs(128)


def own_step():
    model, optimizer = (
        dense(layers.Dropout(0.2), layers.Dense(3)),
        keras.optimizers.Adam(),
    )
    metric = keras.metrics.SparseCategoricalAccuracy()
    loop = Loop(model, gear=FUSED, seed=0)

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            logits = model(x, training=True)
            return LOGITS(y, logits), logits

        (loss, logits), grads = loopscope.value_and_grad(
            compute_loss, model.trainable_variables, has_aux=True
        )
        optimizer.apply(grads, model.trainable_variables)
        metric.update_state(y, logits)
        return loss

    @loop.test_step
    def test_step(x, y):
        return LOGITS(y, model(x, training=False))

    return loop, blobs(128)


def distillation():
    teacher, student = dense(layers.Dense(3), units=32), dense(layers.Dense(3))
    optimizer = keras.optimizers.Adam(1e-3)
    loop = Loop(student, gear=FUSED, seed=0)
    soft = keras.losses.KLDivergence()

    @loop.train_step
    def train_step(x, y):
        target = keras.ops.softmax(teacher(x, training=False) / 2)

        def compute_loss():
            logits = student(x, training=True)
            hard = LOGITS(y, logits)
            return 0.5 * hard + 0.5 * soft(target, keras.ops.softmax(logits / 2))

        loss, grads = loopscope.value_and_grad(
            compute_loss, student.trainable_variables
        )
        optimizer.apply(grads, student.trainable_variables)
        return loss

    return loop, blobs(128)


def contrastive():
    model, optimizer = dense(layers.Dense(8)), keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=FUSED, seed=0)

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            a, b = model(x, training=True), model(y, training=True)
            scores = keras.ops.matmul(a, keras.ops.transpose(b))
            labels = keras.ops.arange(x.shape[0])
            return LOGITS(labels, scores)

        loss, grads = loopscope.value_and_grad(compute_loss, model.trainable_variables)
        optimizer.apply(grads, model.trainable_variables)
        return loss

    x = numbers(128, 4)
    return loop, (x, x + 0.1 * numbers(128, 4, seed=4))


def batches_of(build):
    """One of the models of the other tests, with data of more than one batch."""

    def healthy():
        make, data = build()
        loop = make(FUSED)
        grown = keras.tree.map_structure(lambda a: np.concatenate([a] * 8), data)
        return loop, grown

    healthy.__name__ = build.__name__
    return healthy


SMALL = [
    softmax,
    one_hot,
    sigmoid,
    binary_logits,
    several_labels,
    regression,
    flat_labels,
    regularized,
    batchnorm,
    dropout,
    noise,
    layernorm,
    rescaled_pictures,
    augmented,
    unscaled_under_batchnorm,
    transfer,
    accumulation,
    ema,
    clipped,
    warming_up,
    sgd,
    adamw,
    mixed_float16,
    mixed_bfloat16,
    weighted,
    a_stream,
    texts,
    sequences,
    autoencoder,
    two_heads,
    residual,
    zero_last_layer,
    own_step,
    distillation,
    contrastive,
    *(
        batches_of(build)
        for build in (
            convnet_with_batchnorm,
            dropout_mlp,
            transformer_block,
            lstm,
            embedding_with_mixed_outputs,
            gan,
            subclassed,
        )
    ),
    attention,
]


@pytest.mark.parametrize("healthy", some_of(SMALL, 0, 1, every=2 if TENSORFLOW else 4))
def test_nothing_is_found_in_a_healthy_loop(healthy):
    keras.utils.set_random_seed(0)
    loop, data = healthy()
    examination = loop.doctor(*data, **({} if len(data) == 1 else {"batch_size": 32}))
    assert not examination.failed, examination.failed
    assert not examination.findings, str(examination)


def test_there_are_forty_of_them():
    assert len(SMALL) >= 40
    assert len(ALL) == 8
    assert BATCH == 8


def test_an_examination_leaves_the_loop_as_it_was():
    loop = fresh(small_loop, "auto")
    x, y = blobs(64)
    loop.doctor(x, y, batch_size=16)
    before, gear = loop.state.sha256(), loop.gear
    loop.doctor(x, y, batch_size=16, validation_data=blobs(16, seed=9))
    assert loop.state.sha256() == before
    assert loop.gear is gear is None
    assert loop.step == 0
