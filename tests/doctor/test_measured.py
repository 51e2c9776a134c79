"""Checks that measure time, memory and what Python does: where they stay silent."""

import time

import keras
import numpy as np
import pytest
from keras import layers, ops

import loopscope
from loopscope import Loop
from loopscope.data.adapters import shuffles
from loopscope.doctor.rebound import rebound
from loopscope.doctor.surroundings import changes, surroundings
from models import FUSED, STEP, TENSORFLOW, Batches, blobs, numbers, small_loop

once = pytest.mark.once


def model_of(*rest):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, activation="relu"), *rest, layers.Dense(1)]
    )


def own(body=lambda x, y, loss: loss, *, gear=STEP, before=lambda x: None):
    """A loop whose step also does what `before` and `body` do."""
    model, optimizer = model_of(), keras.optimizers.Adam(1e-2)
    loop = Loop(model, gear=gear, seed=0)

    @loop.train_step
    def train_step(x, y):
        before(x)
        loss, grads = loopscope.value_and_grad(
            lambda: ops.mean(ops.square(model(x, training=True) - y)),
            model.trainable_variables,
        )
        optimizer.apply(grads, model.trainable_variables)
        return body(x, y, loss)

    return loop


def names_found(loop, *data, **options):
    examination = loop.doctor(*data, **options)
    assert not examination.failed, examination.failed
    return [f.check for f in examination.findings]


X, Y = numbers(64, 4), numbers(64, 1)
EPOCH = WIDTH = TOTAL = 0


# side_effects


@pytest.mark.slow
def test_a_text_that_shows_when_a_step_is_traced_is_no_side_effect():
    def body(x, y, loss):
        print("traced")
        return loss

    assert names_found(own(body), X, Y, batch_size=16) == []


@pytest.mark.slow_on_jax
def test_a_cache_that_is_filled_once_is_no_side_effect():
    cache = {}

    def body(x, y, loss):
        if "weight" not in cache:
            cache["weight"] = 1.0
        return loss * cache["weight"]

    assert names_found(own(body), X, Y, batch_size=16) == []


@once
def test_a_list_that_is_emptied_in_each_step_does_not_change():
    seen = []

    def step(x):
        seen.clear()
        seen.append(x)

    step("one")
    before = surroundings(step)
    step("two")
    assert list(changes(before, surroundings(step))) == ["seen"]  # Text is compared,
    step(np.ones(2))
    before = surroundings(step)
    step(np.zeros(2))
    assert not changes(before, surroundings(step))  # arrays are not.


class Counting(Loop):
    def train_step(self, x, y):
        self.count = getattr(self, "count", 0) + 1
        return super().train_step(x, y)


@pytest.mark.slow_on_jax
def test_an_attribute_of_a_subclass_is_found_by_its_name():
    loop = Counting(model_of(), "adam", "mse", gear=STEP, seed=0)
    loop.count = 0
    (finding,) = loop.doctor(X, Y, batch_size=16).findings
    assert finding.check == "side_effects"
    assert "'self.count'" in finding.message
    assert "test_measured.py:" in finding.where


@once
def test_numpys_global_generator_is_watched_only_where_it_is_named():
    def draws(x):
        return x + np.random.normal()

    def does_not(x):
        return np.sqrt(x) + keras.random.normal((1,))

    assert "numpy.random" in surroundings(draws)
    assert "numpy.random" not in surroundings(does_not)


def reads_epoch(x):
    return x * EPOCH


def reads_width(x):
    return x * WIDTH


def reads_total(x):
    return x * TOTAL


def trains(loop):
    global WIDTH
    for EPOCH in loop.epochs(3):  # Another one: a local name.
        EPOCH.train(None)
        WIDTH += 1


def prepares(values):
    global TOTAL
    for value in values:
        TOTAL += value


@once
def test_a_number_is_read_once_where_a_training_loop_changes_it():
    (found,) = rebound(reads_width)
    assert (found.name, found.value) == ("WIDTH", 0)
    assert "test_measured.py:" in found.changed
    assert not list(rebound(reads_epoch))
    assert not list(rebound(reads_total))


# memory


@pytest.mark.slow
def test_a_number_for_each_step_is_no_growing_memory():
    history = []

    def body(x, y, loss):
        history.append(float(loss))
        return loss

    loop = own(body, gear="eager")
    assert names_found(loop, X, Y, batch_size=16, checks=["memory"]) == []


@pytest.mark.slow
def test_a_step_that_can_only_run_eagerly_is_looked_at_as_well():
    kept = []

    def body(x, y, loss):
        kept.append(ops.zeros((100, 10)) + loss)
        return loss

    def before(x):
        np.asarray(ops.convert_to_numpy(x))  # There must be numbers.

    found = own(body, gear="auto", before=before).doctor(X, Y, batch_size=16)
    finding = next(f for f in found.findings if f.check == "memory")
    assert "'kept'" in finding.where
    assert finding.measured["bytes_per_step"] >= 4000


# waiting


class Slow(Batches):
    def __iter__(self):
        for batch in self.batches:
            time.sleep(0.02)
            yield batch


@pytest.mark.slow
def test_a_slow_step_does_not_wait_for_slow_data():
    def body(x, y, loss):
        time.sleep(0.03)
        return loss

    batches = Slow((X[:8], Y[:8]) for _ in range(6))
    loop = own(body, gear="eager")
    assert names_found(loop, batches, checks=["waiting"]) == []


@pytest.mark.slow
@once
def test_a_pipeline_that_caches_is_slow_in_its_first_epoch_only():
    import tensorflow as tf

    def slow(x):
        time.sleep(0.02)
        return x

    data = tf.data.Dataset.from_tensor_slices((X, Y))
    data = data.map(lambda x, y: (tf.numpy_function(slow, [x], tf.float32), y))
    data = data.map(lambda x, y: (tf.ensure_shape(x, (4,)), y))
    loop = own()
    assert names_found(loop, data.batch(4), checks=["waiting"]) == ["waiting"]
    assert names_found(loop, data.cache().batch(4), checks=["waiting"]) == []


@once
def test_a_file_that_is_read_quickly_is_not_waited_for(tmp_path):
    np.save(tmp_path / "x.npy", X)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = own().source(x, Y, batch_size=8)
    assert 0 < source.fetch_s() < 1
    assert names_found(own(), x, Y, batch_size=8, checks=["waiting"]) == []


# retracing


@pytest.mark.slow
def test_some_buckets_and_a_ragged_last_batch_are_not_many_shapes():
    sizes = [8, 8, 16, 12, 8, 16, 16, 12, 12, 8, 16, 8, 12, 16, 8, 3]
    batches = [(X[:n], Y[:n]) for n in sizes]
    assert names_found(own(gear="xla"), batches, checks=["retracing"]) == []


@once
def test_new_shapes_share_a_program_where_axes_can_be_left_open():
    batches = [(X[:n], Y[:n]) for n in range(4, 24)]
    assert names_found(own(gear="graph"), batches, checks=["retracing"]) == []


# order


def pipeline():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(blobs(64))


@once
def test_sequences_that_are_cut_shuffled_and_batched_are_not_shuffled_batches():
    (cut,) = shuffles(pipeline().batch(4).shuffle(16).batch(8))
    assert not cut.of_batches
    assert (cut.buffer, cut.size) == (16, 16)


@once
@pytest.mark.parametrize(
    "shuffled",
    [
        lambda data: data.shuffle(64).batch(8),
        lambda data: data.shuffle(64).batch(8).shuffle(4),
        lambda data: data.shuffle(32).map(lambda x, y: (x, y)).batch(8).prefetch(2),
        lambda data: data.repeat(None).shuffle(8).batch(8).take(8),
    ],
)
def test_examples_that_meet_are_well_shuffled(shuffled):
    found = names_found(small_loop(), shuffled(pipeline()), checks=["order"])
    assert found == []


@once
def test_what_keras_has_shuffled_as_a_whole_needs_no_large_buffer(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text("text")
    data = keras.utils.text_dataset_from_directory(
        tmp_path, batch_size=4, shuffle=True, seed=1, verbose=False
    )
    assert not shuffles(data.prefetch(1))
    series = keras.utils.timeseries_dataset_from_array(
        np.arange(900.0), np.arange(900), sequence_length=3, shuffle=True, batch_size=4
    )
    assert not shuffles(series)


# dropped_state


if not TENSORFLOW:

    class Stateless(keras.Model):
        """A model with JAX's own kind of `train_step`."""

        keeps = True

        def __init__(self):
            super().__init__()
            self.inner = model_of(layers.BatchNormalization(), layers.Dropout(0.5))

        def call(self, x, training=False):
            return self.inner(x, training=training)

        def train_step(self, state, data):
            import jax

            trainable, others, slots, metrics = state
            x, y = data

            def compute_loss(trainable):
                outputs, new = self.stateless_call(trainable, others, x, training=True)
                return self.compute_loss(x, y, outputs), new

            (loss, new), grads = jax.value_and_grad(compute_loss, has_aux=True)(
                trainable
            )
            trainable, slots = self.optimizer.stateless_apply(slots, grads, trainable)
            others = new if self.keeps else others
            return {"loss": loss}, (trainable, others, slots, metrics)

    class Dropping(Stateless):
        keeps = False

    @pytest.mark.parametrize(("kind", "found"), [(Stateless, 0), (Dropping, 1)])
    def test_a_models_own_train_step_that_drops_its_state_is_found(kind, found):
        model = kind()
        model.build((None, 4))
        loop = Loop(model, "adam", "mse", gear=STEP, seed=0)
        findings = loop.doctor(X, Y, batch_size=16).findings
        assert [f.check for f in findings] == ["dropped_state"] * found
        if found:
            assert findings[0].measured["variables"] == 3  # A seed among them.


# accumulating


def by_hand(update):
    """Slots of one's own, which `update` turns into what is applied."""
    model, optimizer = model_of(), keras.optimizers.Adam(1e-3)
    slots = [keras.Variable(ops.zeros(v.shape)) for v in model.trainable_variables]
    loop = Loop(model, gear=STEP, seed=0)

    @loop.train_step
    def train_step(x, y):
        loss, grads = loopscope.value_and_grad(
            lambda: ops.mean(ops.square(model(x, training=True) - y)),
            model.trainable_variables,
        )
        update(optimizer, slots, grads, model.trainable_variables)
        return loss

    return loop


def momentum(optimizer, slots, grads, variables):
    for slot, grad in zip(slots, grads, strict=True):
        slot.assign(0.9 * slot + grad)
    optimizer.apply([slot + 0 for slot in slots], variables)


def sums_that_begin_anew(optimizer, slots, grads, variables):
    begins = ops.cast(optimizer.iterations % 2 > 0, "float32")
    for slot, grad in zip(slots, grads, strict=True):
        slot.assign(begins * slot + grad)
    optimizer.apply([slot + 0 for slot in slots], variables)


@pytest.mark.slow
@pytest.mark.parametrize("update", [momentum, sums_that_begin_anew])
def test_slots_that_forget_are_no_gradients_that_add_up(update):
    assert names_found(by_hand(update), X, Y, batch_size=16) == []


# overfit: none of these may be taken for a loop that does not learn.


def tiny_rate():
    return Loop(model_of(), keras.optimizers.SGD(1e-4), "mse", gear=FUSED, seed=0)


def much_dropout():
    model = model_of(layers.Dropout(0.8))
    return Loop(model, keras.optimizers.SGD(1e-3), "mse", gear=FUSED, seed=0)


def slow_warmup():
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, 100_000, warmup_target=1e-3, warmup_steps=50_000
    )
    return Loop(model_of(), keras.optimizers.Adam(schedule), "mse", gear=FUSED, seed=0)


def moving_target():
    """A teacher that follows its student, as in BYOL."""
    model, teacher = model_of(), model_of()
    optimizer = keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=FUSED, seed=0)

    @loop.train_step
    def train_step(x, y):
        target = teacher(x, training=False)
        loss, grads = loopscope.value_and_grad(
            lambda: ops.mean(ops.square(model(x, training=True) - target)),
            model.trainable_variables,
        )
        optimizer.apply(grads, model.trainable_variables)
        for slow, fast in zip(teacher.variables, model.variables, strict=True):
            slow.assign(0.99 * slow + 0.01 * fast)
        return loss

    return loop


def annealed():
    """A part of the loss that grows with the steps, as in a variational model."""
    model, optimizer = model_of(), keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=FUSED, seed=0)

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            outputs = model(x, training=True)
            grown = ops.cast(optimizer.iterations, "float32") / 1000
            return ops.mean(ops.square(outputs - y)) + grown * ops.mean(outputs**2)

        loss, grads = loopscope.value_and_grad(compute_loss, model.trainable_variables)
        optimizer.apply(grads, model.trainable_variables)
        return loss

    return loop


def adversarial():
    """Trained on inputs that are moved to where the loss is larger."""
    model, optimizer = model_of(), keras.optimizers.Adam(1e-3)
    loop = Loop(model, gear=FUSED, seed=0)
    moved = keras.Variable(ops.zeros((16, 4)), name="moved")

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            return ops.mean(ops.square(model(x + moved, training=True) - y))

        _, (direction,) = loopscope.value_and_grad(compute_loss, [moved])
        moved.assign(0.1 * ops.sign(direction))
        loss, grads = loopscope.value_and_grad(compute_loss, model.trainable_variables)
        optimizer.apply(grads, model.trainable_variables)
        return loss

    return loop


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [tiny_rate, much_dropout, slow_warmup, moving_target, annealed, adversarial],
    ids=lambda make: make.__name__,
)
def test_a_loop_that_learns_slowly_does_learn(make):
    assert names_found(make(), X, Y, batch_size=16, checks=["overfit"]) == []


@pytest.mark.slow
def test_a_trained_model_is_not_asked_to_learn_more():
    loop = Loop(model_of(), "adam", "mse", gear=FUSED, seed=0)
    loop.fit(X, 0 * Y, batch_size=16, epochs=50, verbose=0)
    assert names_found(loop, X, Y, batch_size=16, checks=["overfit"]) == []


@pytest.mark.slow_on_jax
def test_it_is_not_tried_where_something_else_was_found():
    examination = small_loop().doctor(*blobs(64), batch_size=16, shuffle=False)
    assert [f.check for f in examination.findings] == ["order"]
    assert "overfit" not in examination.seconds
