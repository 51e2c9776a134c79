"""The words of Keras's `fit`, what it refuses, and what is saved and goes on."""

import inspect
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers

import loopscope
from loopscope import Loop
from models import FUSED, TENSORFLOW, blobs, relative
from parity import assert_alike, both

X, Y = blobs(40)
OPTIONS = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}


def model(**options):
    made = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(3, activation="softmax"),
        ]
    )
    made.compile(
        keras.optimizers.Adam(0.01),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **options,
    )
    return made


@pytest.mark.once
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_arguments_defaults_and_their_order_are_those_of_keras(method):
    def words(function):
        listed = inspect.signature(function).parameters.values()
        return [
            (p.name, p.default)
            for p in listed
            if p.name not in ("self", "args", "kwargs")
        ]

    expected = words(getattr(keras.Model, method))
    # Recording is loopscope's own: by keyword only, after all that are Keras's.
    own = [("run", None), ("resume", False), ("fast_dev_run", 0), ("doctor", True)]
    own = own if method == "fit" else []
    assert words(getattr(Loop, method)) == expected + own
    for name, _ in own:
        parameter = inspect.signature(Loop.fit).parameters[name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert words(getattr(loopscope, method))[0][0] == "model"


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


class Wrong(keras.utils.PyDataset):
    num_batches = 2

    def __getitem__(self, index):
        return X[:8], Y[:8], None, 1


def uncompiled():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3)])


def two_outputs():
    x = keras.Input((4,))
    made = keras.Model(x, [layers.Dense(1)(x), layers.Dense(1)(x)])
    made.compile("sgd", ["mse", "mse"])
    return made


TWO = [X[:, :1], X[:, 1:2]]
BAD = {
    "a model that is not compiled": (uncompiled, "fit", (X, Y), {}),
    "unequal lengths": (model, "fit", (X, Y[:9]), {}),
    "data of an unknown type": (model, "fit", (object(),), {}),
    "a shape that the model does not take": (model, "fit", (X[:, :3], Y), {}),
    "y beside a dataset": (model, "fit", (dataset, Y), {}),
    "weights beside a dataset": (model, "fit", (dataset,), {"sample_weight": Y}),
    "y beside a generator": (model, "fit", (lambda: iter([(X, Y)]), Y), {}),
    "a split of a dataset": (model, "fit", (dataset,), {"validation_split": 0.5}),
    "a split that leaves nothing": (
        model,
        "fit",
        (X[:1], Y[:1]),
        {"validation_split": 0.1},
    ),
    "class_weight and sample_weight": (
        model,
        "fit",
        (X, Y),
        {"class_weight": {0: 1.0}, "sample_weight": np.ones(40)},
    ),
    "class_weight of two outputs": (
        two_outputs,
        "fit",
        (X, TWO),
        {"class_weight": {0: 1.0}},
    ),
    "weights of another structure": (
        two_outputs,
        "fit",
        (X, TWO),
        {"sample_weight": {"a": Y, "b": Y}},
    ),
    "a weight for two outputs of two axes": (
        two_outputs,
        "fit",
        (X, TWO),
        {"sample_weight": X},
    ),
    "a validation_freq of words": (
        model,
        "fit",
        (X, Y),
        {"validation_freq": "often", "validation_data": (X, Y)},
    ),
    "a batch of four parts": (model, "fit", (Wrong,), {}),
    "an unknown argument of fit": (model, "fit", (X, Y), {"speed": 9}),
    "an unknown argument of evaluate": (model, "evaluate", (X, Y), {"speed": 9}),
    "validation data of four parts": (
        model,
        "fit",
        (X, Y),
        {"validation_data": (X, Y, Y, Y)},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_keras_raises(name):
    build, method, data, options = BAD[name]

    def call(_):
        return [d() if callable(d) else d for d in data], dict(options)

    theirs, ours = both(build, call, method=method, record=False)
    assert theirs.error is not None
    assert isinstance(ours.error, type(theirs.error)), (theirs.error, ours.error)
    assert len(str(ours.error)) > 20


def trained(made, *, ours, **options):
    train = Loop(made, gear=FUSED, seed=0).fit if ours else made.fit
    return train(X, Y, **{**OPTIONS, **options})


def same(one, other, *, tolerance=0.0):
    pairs = zip(one.variables, other.variables, strict=True)
    slots = zip(one.optimizer.variables, other.optimizer.variables, strict=True)
    for a, b in (*pairs, *slots):
        a, b = keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
        assert relative(a, b) <= tolerance


def test_a_model_saved_in_the_middle_goes_on_with_its_optimizer(tmp_path):
    keras.utils.set_random_seed(0)
    whole = model()
    loop = Loop(whole, gear=FUSED, seed=0)
    loop.fit(X, Y, **OPTIONS)
    whole.save(tmp_path / "half.keras")
    loop.fit(X, Y, **OPTIONS)
    resumed = keras.saving.load_model(tmp_path / "half.keras")
    assert int(resumed.optimizer.iterations) == 10
    # A file of Keras does not hold the seed of Dropout: give it what it had.
    half = keras.saving.load_model(tmp_path / "half.keras")
    for was, now in zip(half.variables, resumed.variables, strict=True):
        now.assign(was)
    history = trained(resumed, ours=True)
    assert history.epoch == [0, 1]
    assert int(resumed.optimizer.iterations) == int(whole.optimizer.iterations) == 20


def test_what_keras_has_saved_goes_on_here_and_the_other_way_round(tmp_path):
    def without_dropout():
        made = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d")])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile(keras.optimizers.Adam(0.01), loss)
        return made

    ends = []
    for first, second in ((True, False), (False, True), (False, False)):
        keras.utils.set_random_seed(0)
        made = without_dropout()
        trained(made, ours=first)
        made.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        trained(loaded, ours=second)
        ends.append(loaded)
    same(ends[0], ends[2], tolerance=1e-5)
    same(ends[1], ends[2], tolerance=1e-5)


def test_a_model_can_be_saved_while_it_trains_and_holds_that_moment(tmp_path):
    saved = []

    def save(epoch, logs):
        loop.model.save(tmp_path / f"{epoch}.keras")
        saved.append([w.copy() for w in loop.model.get_weights()])

    keras.utils.set_random_seed(0)
    loop = Loop(model(), gear=FUSED, seed=0)
    callback = keras.callbacks.LambdaCallback(on_epoch_end=save)
    loop.fit(X, Y, **OPTIONS, callbacks=[callback])
    for epoch in (0, 1):
        loaded = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        assert int(loaded.optimizer.iterations) == 5 * (epoch + 1)
        for was, now in zip(saved[epoch], loaded.get_weights(), strict=True):
            np.testing.assert_array_equal(was, now)


def test_a_second_fit_evaluate_and_predict_go_on_as_in_keras():
    def call(made):
        return (X, Y), dict(OPTIONS)

    theirs, ours = both(lambda: without_noise(), call)
    loop = Loop(ours.model, gear=FUSED)
    for side, train in ((theirs, theirs.model.fit), (ours, loop.fit)):
        side.value = train(X, Y, **OPTIONS)
    assert_alike(theirs, ours, tolerance=1e-5)
    np.testing.assert_allclose(
        loop.evaluate(X, Y, verbose=0),
        theirs.model.evaluate(X, Y, verbose=0),
        rtol=1e-5,
    )


def without_noise():
    made = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])
    made.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return made


def test_loss_scaling_is_as_compile_asks():
    def build(scale):
        def make():
            policy = keras.config.dtype_policy()
            keras.config.set_dtype_policy("mixed_float16")
            try:
                return model(auto_scale_loss=scale)
            finally:
                keras.config.set_dtype_policy(policy)

        return make

    for scale in (True, False):
        made = build(scale)()
        assert ("LossScale" in type(made.optimizer).__name__) == scale
        theirs, ours = both(build(scale), lambda _: ((X, Y), dict(OPTIONS)))
        assert_alike(theirs, ours, tolerance=1e-3)
        inner = getattr(ours.model.optimizer, "inner_optimizer", ours.model.optimizer)
        assert int(inner.iterations) > 3


LOADER = """
    import torch  # Before TensorFlow: the other way round the process may crash.
    import keras, numpy as np, sys
    sys.path.insert(0, {tests!r})
    from parity import assert_alike, both
    from test_parity_contract import X, Y, without_noise

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            return X[index], Y[index]

    def loader(_):
        made = torch.utils.data.DataLoader(Rows(), batch_size=7)
        return (made,), {{"epochs": 2, "shuffle": False, "validation_data": made}}

    assert_alike(*both(without_noise, loader))
    tensors = (torch.tensor(X), torch.tensor(Y))
    assert_alike(*both(without_noise, lambda _: (tensors, {{"shuffle": False}})))
    print("alike")
"""


@pytest.mark.slow_on_jax
def test_a_data_loader_and_tensors_of_torch_train_as_in_keras():
    code = textwrap.dedent(LOADER.format(tests=os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["alike"], done.stderr[-2000:]


DISTRIBUTED = """
    import sys
    import keras, numpy as np, tensorflow as tf
    sys.path.insert(0, {tests!r})
    from parity import assert_alike, both
    from test_parity_contract import X, Y, without_noise

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)

    def build():
        with strategy.scope():
            made = without_noise()
        made.run_eagerly = False
        return made

    def call(_):
        data = strategy.experimental_distribute_dataset(dataset)
        return (data,), {{"epochs": 2, "steps_per_epoch": 5, "shuffle": False}}

    for gear in ("graph", "fused-graph"):
        theirs, ours = both(build, call, gear=gear, eager=False)
        assert_alike(theirs, ours, tolerance=1e-5)
        variables = [*ours.model.variables, *ours.model.optimizer.variables]
        for variable in variables:
            one, *others = [copy.numpy() for copy in variable.value.values]
            assert others and all(np.array_equal(one, other) for other in others)
    print("alike")
"""


@pytest.mark.slow
@pytest.mark.skipif(not TENSORFLOW, reason="tf.distribute is TensorFlow's")
def test_a_distributed_dataset_trains_as_in_keras_and_keeps_the_copies_equal():
    code = textwrap.dedent(DISTRIBUTED.format(tests=os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["alike"], done.stderr[-2000:]


def test_an_error_names_the_step():
    class Fails(keras.utils.PyDataset):
        num_batches = 5

        def __getitem__(self, index):
            if index == 3:
                raise OSError("no such shard")
            return X[:8], Y[:8]

    loop = Loop(without_noise(), gear=FUSED)
    with pytest.raises(OSError, match="no such shard") as caught:
        loop.fit(Fails(), shuffle=False, verbose=0)
    assert "at train step 3 of epoch 0" in caught.value.__notes__[0]
