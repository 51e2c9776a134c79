"""A model of a hundred million parameters, in every gear. How much memory it takes is
measured by `benchmarks/memory.py`."""

import gc
import shutil

import keras
import numpy as np
import pytest
from keras import layers

from loopscope import Loop, Recording
from loopscope.run import checkpoint
from models import GEARS

BATCH, STEPS = 8, 4
WIDTH = 5000

pytestmark = pytest.mark.slow


def trained(gear, path=None, *, until=STEPS, resume=False):
    """Train a new model for some steps of an epoch.

    Returns:
        What it ended in, and how many parameters it has.
    """
    keras.utils.clear_session()  # Names count from the start: the digest has them.
    keras.utils.set_random_seed(0)
    dense = [layers.Dense(WIDTH, activation="relu") for _ in range(5)]
    model = keras.Sequential([keras.Input((100,)), *dense, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, "adam", loss, gear=gear, seed=0, cache=False)
    random = np.random.default_rng(0)
    x = random.normal(size=(STEPS * BATCH, 100)).astype("float32")
    source = loop.source(x, random.integers(0, 10, len(x)), batch_size=BATCH)
    run = None if path is None else Recording(path, replay_s=1e9)
    for epoch in loop.epochs(1, run=run, resume=resume):
        for step in epoch.train(source, every=1):
            if path is not None and step.index == 0:
                loop.save()  # At the end of the next step.
            if step.index + 1 == until < STEPS:
                break
        if until < STEPS:
            break
    return loop.state.sha256(), model.count_params()


@pytest.mark.parametrize("gear", GEARS)
def test_a_hundred_million_parameters_go_on_to_the_same_bits(gear, tmp_path):
    path = tmp_path / "run"
    try:
        expected, parameters = trained(gear)
        gc.collect()
        assert parameters >= 10**8
        trained(gear, path, until=3)
        gc.collect()
        found, problems = checkpoint.entries(path / "checkpoints")
        assert not problems
        assert found[-1].step == 2
        assert found[-1].size_bytes > 3 * 4 * parameters
        assert trained(gear, path, resume=True) == (expected, parameters)
        gc.collect()
    finally:
        shutil.rmtree(path, ignore_errors=True)
