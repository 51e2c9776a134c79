"""`fit`, `evaluate` and `predict` beside Keras's own, for every kind of data."""

import keras
import numpy as np
import pytest
from keras import layers

from models import TENSORFLOW, blobs, halved, numbers
from parity import assert_alike, both

ROWS, SIZE = 22, 8
X, Y = blobs(ROWS)
WEIGHT = np.linspace(0.1, 2, ROWS, dtype="float32")


def model():
    made = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="relu"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    made.compile(
        keras.optimizers.SGD(0.1),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
    )
    return made


def two_inputs():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    hidden = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(3)(b)])
    made = keras.Model([a, b], layers.Dense(3, activation="softmax")(hidden))
    made.compile("sgd", "sparse_categorical_crossentropy")
    return made


def sparse_model():
    made = keras.Sequential(
        [
            keras.Input((4,), sparse=True),
            layers.Dense(3, activation="softmax"),
        ]
    )
    made.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return made


def parts(weights=False):
    return (X, Y, WEIGHT) if weights else (X, Y)


def batches(weights=False):
    return [
        tuple(part[i : i + SIZE] for part in parts(weights))
        for i in range(0, ROWS, SIZE)
    ]


class Indexed(keras.utils.PyDataset):
    def __init__(self, weights=False, endless=False, **options):
        super().__init__(**options)
        self.batches, self.endless = batches(weights), endless

    @property
    def num_batches(self):
        return None if self.endless else len(self.batches)

    def __getitem__(self, index):
        return self.batches[index % len(self.batches)]


def generator(times=1, weights=False):
    for _ in range(times):
        yield from batches(weights)


def dataset(weights=False, known=True):
    import tensorflow as tf

    made = tf.data.Dataset.from_tensor_slices(parts(weights)).batch(SIZE)
    return made if known else made.filter(lambda *_: True)


def as_pandas():
    import pandas as pd

    return pd.DataFrame(X, columns=list("abcd")), pd.Series(Y)


def as_tensorflow():
    import tensorflow as tf

    return tf.constant(X), tf.constant(Y)


def as_jax():
    import jax.numpy as jnp

    return jnp.asarray(X), jnp.asarray(Y)


def as_grain():
    import grain

    rows = [(X[i], Y[i]) for i in range(ROWS)]
    made = grain.MapDataset.source(rows).to_iter_dataset()
    return (made.batch(SIZE),)


def as_scipy():
    import scipy.sparse

    kept = np.where(np.abs(X) > 1, X, 0).astype("float32")
    return scipy.sparse.csr_matrix(kept), Y


def as_sparse_stream():
    import scipy.sparse

    return [
        (scipy.sparse.csr_matrix(np.where(np.abs(x) > 1, x, 0).astype("float32")), y)
        for x, y in batches()
    ]


def sparse_generator():
    yield from as_sparse_stream()


KINDS = {
    "numpy": lambda: ((X, Y), {"batch_size": SIZE}),
    "float64 and int64": lambda: (
        (X.astype("float64"), Y.astype("int64")),
        {"batch_size": SIZE},
    ),
    "numpy with weights": lambda: (
        (X, Y),
        {"batch_size": SIZE, "sample_weight": WEIGHT},
    ),
    "class_weight": lambda: (
        (X, Y),
        {"batch_size": SIZE, "class_weight": {0: 0.5, 2: 3.0}},
    ),
    "labels of shape (rows, 1)": lambda: (
        (X, Y[:, None]),
        {"batch_size": SIZE, "class_weight": {0: 0.5, 2: 3.0}},
    ),
    "no batch size": lambda: ((X, Y), {}),
    "no batch size but steps": lambda: ((X, Y), {"steps_per_epoch": 4}),
    "pandas": lambda: (as_pandas(), {"batch_size": SIZE}),
    "tensors of TensorFlow": lambda: (as_tensorflow(), {"batch_size": SIZE}),
    "arrays of JAX": lambda: (as_jax(), {"batch_size": SIZE}),
    "tf.data": lambda: ((dataset(),), {}),
    "tf.data with weights": lambda: ((dataset(weights=True),), {}),
    "tf.data with class_weight": lambda: (
        (dataset(),),
        {"class_weight": {0: 0.5, 1: 3.0, 2: 1.0}},
    ),
    "tf.data of some steps": lambda: ((dataset(),), {"steps_per_epoch": 2}),
    "tf.data of too many steps": lambda: ((dataset(),), {"steps_per_epoch": 5}),
    "a PyDataset": lambda: ((Indexed(),), {}),
    "a PyDataset with weights": lambda: ((Indexed(weights=True),), {}),
    "a PyDataset with class_weight": lambda: ((Indexed(),), {"class_weight": {1: 3.0}}),
    "a PyDataset with workers": lambda: ((Indexed(workers=2),), {}),
    "a PyDataset with workers, of some steps": lambda: (
        (Indexed(workers=2),),
        {"steps_per_epoch": 2},
    ),
    "an endless PyDataset": lambda: ((Indexed(endless=True),), {"steps_per_epoch": 2}),
    "an endless generator": lambda: (
        (generator(times=99),),
        {"steps_per_epoch": 2},
    ),
    "a generator with weights": lambda: (
        (generator(times=99, weights=True),),
        {"steps_per_epoch": 4},
    ),
    "Grain": lambda: (as_grain(), {}),
    "initial_epoch": lambda: ((X, Y), {"initial_epoch": 1}),
    "steps below the length": lambda: (
        (X, Y),
        {"batch_size": SIZE, "steps_per_epoch": 2},
    ),
    "validation_data": lambda: (
        (X, Y),
        {"batch_size": SIZE, "validation_data": (X[:9], Y[:9])},
    ),
    "validation_data with weights": lambda: (
        (X, Y),
        {"batch_size": SIZE, "validation_data": (X[:9], Y[:9], WEIGHT[:9])},
    ),
    "validation_batch_size": lambda: (
        (X, Y),
        {
            "batch_size": SIZE,
            "validation_data": (X[:9], Y[:9]),
            "validation_batch_size": 4,
        },
    ),
    "validation_steps": lambda: (
        (X, Y),
        {
            "batch_size": SIZE,
            "validation_data": (X, Y),
            "validation_steps": 2,
        },
    ),
    "validation_freq": lambda: (
        (X, Y),
        {"batch_size": SIZE, "validation_data": (X, Y), "validation_freq": 2},
    ),
    "validation_freq in a list": lambda: (
        (X, Y),
        {"batch_size": SIZE, "validation_data": (X, Y), "validation_freq": [1, 3]},
    ),
    "validation of another kind": lambda: (
        (dataset(),),
        {"validation_data": dataset(), "validation_steps": 2},
    ),
    "weights and split": lambda: (
        (X, Y),
        {"batch_size": SIZE, "sample_weight": WEIGHT, "validation_split": 0.3},
    ),
}
"""How the data of a call to `fit` are made, anew for each side."""


UNKNOWN = {"Grain"}
"""Data whose length nobody knows: at the end of each epoch Keras warns."""

ONLY_TENSORFLOW = {
    "a PyDataset with workers",
    "a PyDataset with workers, of some steps",
}
"""On JAX, Keras's workers keep what they had prefetched: its order is another."""


@pytest.mark.parametrize("name", halved(KINDS))
def test_fit_is_that_of_keras_on(name):
    if name in ONLY_TENSORFLOW and not TENSORFLOW:
        pytest.skip("Keras itself does not keep the order here")

    def call(_):
        args, options = KINDS[name]()
        return args, {"epochs": 3, "shuffle": False, **options}

    theirs, ours = both(model, call)
    if name in UNKNOWN:
        without_what_the_end_brings(theirs)
    assert_alike(theirs, ours)


def without_what_the_end_brings(theirs):
    """Leave out what Keras says and calls when it finds the end of unknown data.

    A warning for each epoch, and a hook for the beginning of a batch that is not there.
    """
    assert theirs.warned
    assert {text[:27] for text in theirs.warned} == {"Your input ran out of data;"}
    theirs.warned = []
    calls = theirs.heard
    kept = []
    for call in calls:
        last = kept[-2][0] if len(kept) > 1 else ""
        if last == "on_train_batch_begin" and not call[0].startswith("on_train_batch"):
            del kept[-2:]
        kept.append(call)
    theirs.heard = kept


@pytest.mark.parametrize("kind", ["numpy", "pandas", "tf.data", "a PyDataset"])
@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_evaluate_and_predict_are_those_of_keras_on(kind, steps, method):
    def call(_):
        args, options = KINDS[kind]()
        if method == "predict":
            args = args[:1]
        return args, {**options, "steps": steps}

    assert_alike(*both(model, call, method=method))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(lambda: [X[:, :2], X[:, 2:]], id="a list"),
        pytest.param(lambda: (X[:, :2], X[:, 2:]), id="a tuple"),
        pytest.param(lambda: {"a": X[:, :2], "b": X[:, 2:]}, id="a dict"),
    ],
)
def test_several_inputs_are_those_of_keras(x):
    def call(_):
        return (x(), Y), {"epochs": 2, "shuffle": False, "batch_size": SIZE}

    assert_alike(*both(two_inputs, call))
    assert_alike(*both(two_inputs, lambda _: ((x(),), {}), method="predict"))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(as_scipy, {"batch_size": SIZE}, id="SciPy"),
        pytest.param(as_scipy, {"validation_split": 0.4}, id="SciPy, split"),
        pytest.param(lambda: (sparse_generator(),), {"epochs": 1}, id="a generator"),
    ],
)
def test_sparse_inputs_are_those_of_keras(make, options):
    def call(_):
        return make(), {"epochs": 2, "shuffle": False, **options}

    theirs, ours = both(sparse_model, call)
    if options == {"epochs": 1}:
        without_what_the_end_brings(theirs)
    assert_alike(theirs, ours)


def native_sparse():
    dense = np.where(np.abs(X) > 1, X, 0).astype("float32")
    if TENSORFLOW:
        import tensorflow as tf

        return tf.sparse.from_dense(dense)
    import jax.experimental.sparse as sparse

    return sparse.BCOO.fromdense(dense)


def test_sparse_arrays_of_the_backend_are_those_of_keras():
    def call(_):
        return (native_sparse(), Y), {"epochs": 2, "shuffle": False, "batch_size": SIZE}

    assert_alike(*both(sparse_model, call))


@pytest.mark.skipif(not TENSORFLOW, reason="ragged arrays and text are TensorFlow's")
def test_ragged_inputs_are_those_of_keras():
    import tensorflow as tf

    rows = [list(range(1 + i % 3)) for i in range(ROWS)]

    def build():
        class Ragged(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(3, activation="softmax")

            def call(self, x):
                total = tf.reduce_sum(tf.cast(x, "float32"), axis=1, keepdims=True)
                return self.dense(tf.ensure_shape(total, (None, 1)))

        made = Ragged()
        made.compile("sgd", "sparse_categorical_crossentropy")
        return made

    def call(_):
        data = tf.ragged.constant(rows)
        return (data, Y), {"epochs": 2, "shuffle": False, "batch_size": SIZE}

    assert_alike(*both(build, call))


@pytest.mark.skipif(not TENSORFLOW, reason="ragged arrays and text are TensorFlow's")
def test_text_is_taken_by_a_model_that_reads_text():
    words = np.array(["a", "b", "c", "a"] * 5 + ["b", "c"])

    def build():
        made = keras.Sequential(
            [
                keras.Input((), dtype="string"),
                layers.StringLookup(vocabulary=["a", "b", "c"]),
                layers.Embedding(5, 3),
                layers.Dense(3, activation="softmax"),
            ]
        )
        made.compile("sgd", "sparse_categorical_crossentropy")
        return made

    def call(_):
        import tensorflow as tf

        data = tf.constant(words), Y
        return data, {"epochs": 2, "shuffle": False, "batch_size": SIZE}

    assert_alike(*both(build, call))


def test_unknown_length_is_learned_in_the_first_epoch_without_a_warning():
    def call(_):
        return (dataset(known=False),), {"epochs": 3, "shuffle": False}

    theirs, ours = both(model, call)
    without_what_the_end_brings(theirs)
    assert ours.warned == []
    assert_alike(theirs, ours)


def test_a_pydataset_is_shuffled_batch_by_batch():
    def order(shuffle):
        seen = []

        class Told(Indexed):
            def __getitem__(self, index):
                seen.append(index)
                return super().__getitem__(index)

        both(model, lambda _: ((Told(),), {"epochs": 9, "shuffle": shuffle}))
        return seen[-27:]

    assert order(False) == [0, 1, 2] * 9
    assert order(True) != [0, 1, 2] * 9


def test_the_numbers_of_epochs_and_steps_can_be_capped():
    before = keras.config.max_epochs(), keras.config.max_steps_per_epoch()

    def call(_):
        return (X, Y), {"epochs": 5, "batch_size": 4, "shuffle": False}

    keras.config.set_max_epochs(2)
    keras.config.set_max_steps_per_epoch(3)
    try:
        theirs, ours = both(model, call)
    finally:
        keras.config.set_max_epochs(before[0])
        keras.config.set_max_steps_per_epoch(before[1])
    assert ours.value.epoch == [0, 1]
    assert "Limiting epochs to 2" in ours.warned
    assert_alike(theirs, ours)


def test_data_on_a_single_axis_train_as_in_keras():
    def build():
        made = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        made.compile("sgd", "mse", metrics=["mae"])
        return made

    x = numbers(ROWS)

    def call(_):
        return (x, 2 * x), {"epochs": 2, "batch_size": SIZE, "shuffle": False}

    theirs, ours = both(build, call)
    assert (theirs.error is None) == (ours.error is None)
    if theirs.error is None:
        assert_alike(theirs, ours)


def test_shuffling_data_that_are_not_shuffled_here_is_no_news():
    theirs, ours = both(model, lambda _: ((dataset(),), {"epochs": 1}), ignore=())
    assert any("`shuffle=True` was passed" in text for text in theirs.warned)
    assert ours.warned == []


def test_a_list_of_tuples_is_a_list_of_batches():
    def call(_):
        return (batches(),), {"epochs": 1}

    _, ours = both(model, call)
    assert ours.error is None
    assert int(ours.model.optimizer.iterations) == len(batches())


def test_batches_of_a_pydataset_with_workers_come_in_order():
    def losses(workers):
        def call(_):
            return (Indexed(workers=workers),), {"epochs": 2, "shuffle": False}

        _, ours = both(model, call)
        return ours.value.history["loss"]

    assert losses(3) == losses(1)


def test_predict_tells_callbacks_the_rows_of_a_batch():
    told = []

    class Looks(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            told.append((batch, np.asarray(logs["outputs"])))

    def call(_):
        return (X,), {"batch_size": SIZE, "callbacks": [Looks()]}

    theirs, ours = both(model, call, method="predict")
    assert_alike(theirs, ours)
    assert [batch for batch, _ in told] == [0, 1, 2, 0, 1, 2]
    for (_, other), (_, mine) in zip(told[:3], told[3:], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)
