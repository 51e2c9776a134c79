"""Keras objects are found where a step names them."""

import functools

import keras
import numpy as np
import pytest

from loopscope import Loop
from loopscope.discover import discover
from models import FUSED, blobs, fresh, small_loop, small_model

GLOBAL_METRIC = keras.metrics.Mean(name="global_metric")


def test_closed_over_objects_are_found():
    model, optimizer = small_model(), keras.optimizers.SGD()
    metric, variable = keras.metrics.Mean(), keras.Variable(0.0)

    def step(x):
        optimizer.apply([model(x)])
        metric.update_state(variable)

    found = discover(step)
    assert (found.models, found.optimizers) == ([model], [optimizer])
    assert (found.metrics, found.variables) == ([metric], [variable])
    assert "update_state" in found.names


def test_globals_that_a_step_names_are_found_and_others_are_not():
    def naming(x):
        GLOBAL_METRIC.update_state(x)

    def silent(x):
        return x

    assert discover(naming).metrics == [GLOBAL_METRIC]
    assert discover(silent).metrics == []


def test_a_global_named_in_an_inner_function_is_found():
    def step(x):
        def inner():
            return GLOBAL_METRIC.result()

        return inner()

    assert discover(step).metrics == [GLOBAL_METRIC]


def test_functions_that_a_step_calls_are_looked_into():
    model = small_model()

    def helper(x):
        return model(x)

    def step(x):
        return helper(x)

    assert discover(step).models == [model]


def test_containers_defaults_and_keyword_defaults_are_looked_into():
    first, second, third = (keras.metrics.Mean(name=n) for n in "abc")
    both = {"a": [first]}

    def step(x, metric=second, *, other=(third,)):
        both["a"][0].update_state(x)

    found = {metric.name for metric in discover(step).metrics}
    assert found == {"a", "b", "c"}


def test_attributes_of_self_are_found():
    class Trainer:
        def __init__(self):
            self.model = small_model()
            self.parts = {"metric": keras.metrics.Mean()}

        def step(self, x):
            self.parts["metric"].update_state(self.model(x))

    trainer = Trainer()
    found = discover(trainer.step)
    assert found.models == [trainer.model]
    assert found.metrics == [trainer.parts["metric"]]


def test_a_seed_generator_counts_by_its_state():
    seed = keras.random.SeedGenerator(1)

    def step(x):
        return x + keras.random.normal(x.shape, seed=seed)

    assert discover(step).variables == [seed.state]


def test_an_object_named_twice_is_found_once():
    metric = keras.metrics.Mean()
    also = metric

    def step(x):
        metric.update_state(x)
        also.update_state(x)

    assert discover(step).metrics == [metric]


def test_objects_that_refer_to_each_other_end_the_search():
    class Node:
        def __init__(self):
            self.other = None
            self.metric = keras.metrics.Mean()

    a, b = Node(), Node()
    a.other, b.other = b, a

    def step(x):
        return a

    assert {id(m) for m in discover(step).metrics} == {id(a.metric), id(b.metric)}


def test_metrics_of_a_partial_step_are_found():
    metric = keras.metrics.Mean()

    def step(metric, x):
        metric.update_state(x)

    assert discover(functools.partial(step, metric)).metrics == [metric]


@pytest.mark.parametrize("gear", ["eager", FUSED])
def test_metrics_found_in_a_step_are_reset_and_reported_each_epoch(gear):
    loop = fresh(small_loop, gear)
    seen = keras.metrics.Sum(name="seen")

    @loop.train_step
    def train_step(x, y):
        seen.update_state(keras.ops.ones((x.shape[0],)))
        return Loop.train_step(loop, x, y)

    history = loop.fit(*blobs(24), batch_size=8, epochs=2, verbose=0).history
    np.testing.assert_array_equal(history["seen"], [24, 24])
    assert any(v is seen.variables[0] for v in loop.state.variables)


def test_two_metrics_of_one_name_are_both_reported():
    loop = fresh(small_loop, FUSED)
    one, two = (keras.metrics.Sum(name="seen") for _ in range(2))

    @loop.train_step
    def train_step(x, y):
        one.update_state(1.0)
        two.update_state(2.0)
        return Loop.train_step(loop, x, y)

    history = loop.fit(*blobs(24), batch_size=8, verbose=0).history
    assert (history["seen"], history["seen_2"]) == ([3.0], [6.0])
