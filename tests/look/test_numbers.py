"""Each number of an opened step, against the same number from NumPy."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from looking import by_path

from models import FUSED, JAX, blobs, fresh, small_loop

X, Y = blobs(8)


@pytest.fixture
def opened():
    """A step of a small network, and its weights before it."""
    loop = fresh(small_loop, FUSED)
    loop.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    weights = [np.array(w, "float64") for w in loop.model.get_weights()]
    return loop, loop.look(X, Y), weights


def forward(weights):
    hidden = np.maximum(X @ weights[0] + weights[1], 0)
    logits = hidden @ weights[2] + weights[3]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, logits, scores / scores.sum(axis=1, keepdims=True)


def test_layers_have_their_values_and_statistics(opened):
    loop, step, weights = opened
    hidden, logits, _ = forward(weights)
    layer = by_path(step.layers)
    name = loop.model.name
    assert list(layer) == [f"{name}/dense", f"{name}/dense_1", name]
    first = layer[f"{name}/dense"]
    assert (first.kind, first.shape, first.dtype) == ("Dense", (8, 8), "float32")
    np.testing.assert_allclose(first.values, hidden, rtol=1e-5, atol=1e-6)
    assert first.stats.mean == pytest.approx(hidden.mean(), rel=1e-5)
    assert first.stats.std == pytest.approx(hidden.std(), rel=1e-5)
    assert first.stats.max == pytest.approx(hidden.max(), rel=1e-5)
    assert first.stats.zeros == (hidden == 0).mean() > 0
    assert first.stats.finite
    np.testing.assert_allclose(layer[name].values, logits, rtol=1e-4, atol=1e-5)


def test_the_loss_of_each_example_comes_with_its_label_and_prediction(opened):
    _, step, weights = opened
    _, logits, scores = forward(weights)
    losses = -np.log(scores[np.arange(8), Y])
    np.testing.assert_allclose(step.loss_per_example, losses, rtol=1e-4, atol=1e-6)
    assert step.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert step.worst.tolist() == np.argsort(-step.loss_per_example).tolist()
    assert [step.label(i) for i in range(8)] == Y.tolist()
    assert [step.predicted(i) for i in range(8)] == logits.argmax(axis=1).tolist()


def test_gradients_are_those_of_the_loss(opened):
    _, step, weights = opened
    hidden, _, scores = forward(weights)
    error = (scores - np.eye(3)[Y]) / 8
    expected = [
        X.T @ (error @ weights[2].T * (hidden > 0)),
        (error @ weights[2].T * (hidden > 0)).sum(axis=0),
        hidden.T @ error,
        error.sum(axis=0),
    ]
    for gradient, values in zip(step.gradients, expected, strict=True):
        np.testing.assert_allclose(gradient.values, values, rtol=1e-3, atol=1e-6)
        assert gradient.stats.norm == pytest.approx(np.linalg.norm(values), rel=1e-3)
        counts, edges = gradient.histogram()
        assert counts.sum() == values.size
        assert len(edges) == len(counts) + 1


@pytest.mark.skipif(JAX, reason="JAX does not tell them; it says so")
def test_the_error_flows_back_through_every_layer(opened):
    loop, step, weights = opened
    _, _, scores = forward(weights)
    error = (scores - np.eye(3)[Y]) / 8
    layer = by_path(step.layers)
    name = loop.model.name
    assert not step.missing
    np.testing.assert_allclose(layer[name].gradient, error, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        layer[f"{name}/dense"].gradient, error @ weights[2].T, rtol=1e-3, atol=1e-6
    )


@pytest.mark.skipif(not JAX, reason="the others tell them")
def test_what_the_backend_does_not_tell_is_named(opened):
    _, step, _ = opened
    assert all(o.gradient is None for o in step.layers)
    assert any("gradients with respect to layers' outputs" in m for m in step.missing)


def test_optimizer_metrics_and_rate_are_there_before_and_after(opened):
    _, step, weights = opened
    assert step.learning_rate == pytest.approx(0.1)
    slots = {p: c for p, c in step.optimizer.items() if "momentum" in p}
    assert len(slots) == 4
    for (path, slot), gradient, update in zip(
        slots.items(), step.gradients, step.updates, strict=True
    ):
        # SGD with momentum 0.9 at a rate of 0.1.
        moved = 0.9 * slot.before - 0.1 * gradient.values
        np.testing.assert_allclose(slot.after, moved, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(update.values, moved, rtol=1e-2, atol=1e-6)
        assert path.endswith("momentum")
    (iterations,) = (c for p, c in step.optimizer.items() if p.endswith("iteration"))
    assert (iterations.before, iterations.after) == (2, 3)
    count = step.metrics["accuracy/count"]
    assert count.after - count.before == 8
    for update, weight in zip(step.updates, weights, strict=True):
        assert update.weight_norm == pytest.approx(np.linalg.norm(weight), rel=1e-5)


def test_clipping_of_the_optimizer_shows_in_the_update_only():
    def make(gear):
        return small_loop(gear, optimizer=keras.optimizers.SGD(1.0, clipnorm=1e-3))

    step = fresh(make, FUSED).look(X, Y)
    for gradient, update in zip(step.gradients, step.updates, strict=True):
        assert gradient.stats.norm > 1e-2
        assert update.norm == pytest.approx(1e-3, rel=1e-2)


def test_a_variable_that_nothing_reaches_has_no_gradient():
    class Deaf(layers.Layer):
        def build(self, shape):
            self.unused = self.add_weight(shape=(2,), name="unused")

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((4,)), Deaf(), layers.Dense(3)])
    loop = fresh(lambda gear: small_loop(gear, model=model), FUSED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        step = loop.look(X, Y)
    unused = step.gradients[0]
    assert unused.path.endswith("unused")
    if not JAX:
        assert unused.values is None
        assert unused.stats is None
    else:
        assert unused.stats.norm == 0
    assert step.updates[0].norm == 0


def test_moving_statistics_are_among_what_else_has_changed():
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3)]
    )
    step = fresh(lambda gear: small_loop(gear, model=model), FUSED).look(X, Y)
    assert {p.rpartition("/")[2] for p in step.others} == {
        "moving_mean",
        "moving_variance",
    }


def test_the_time_of_every_phase_is_there(opened):
    _, step, _ = opened
    assert set(step.phases) == {
        "data",
        "forward",
        "backward",
        "apply",
        "metrics",
        "other",
    }
    assert all(ms >= 0 for ms in step.phases.values())
