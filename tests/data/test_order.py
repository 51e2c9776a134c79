"""The order of an epoch is a function of the seed and the epoch, of nothing else."""

import numpy as np
import pytest

from loopscope.data.order import permutation

pytestmark = pytest.mark.once

FIRST = [5, 0, 6, 1, 7, 2, 4, 3]
SECOND = [4, 0, 2, 3, 6, 1, 7, 5]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_every_row_comes_once(size):
    rows = permutation(size, seed=3, epoch=5)
    assert rows.dtype == np.int32
    assert rows.shape == (size,)
    np.testing.assert_array_equal(np.sort(rows), np.arange(size))


def test_no_row_gives_no_order():
    assert permutation(0, seed=0, epoch=0).shape == (0,)


def test_seed_and_epoch_alone_say_the_order():
    first = permutation(50, seed=1, epoch=2)
    np.random.default_rng().permutation(50)
    np.random.seed(9)
    np.testing.assert_array_equal(first, permutation(50, seed=1, epoch=2))


def test_other_epochs_and_other_seeds_have_other_orders():
    orders = {
        tuple(permutation(50, seed=seed, epoch=epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_an_order_does_not_depend_on_the_epochs_before_it():
    late = permutation(50, seed=1, epoch=1_000_000)
    for epoch in range(3):
        permutation(50, seed=1, epoch=epoch)
    np.testing.assert_array_equal(late, permutation(50, seed=1, epoch=1_000_000))


def test_the_order_is_the_one_of_philox_with_the_epoch_in_its_counter():
    bits = np.random.Philox(key=7, counter=3 << 64)
    expected = np.random.Generator(bits).permutation(20)
    np.testing.assert_array_equal(permutation(20, seed=7, epoch=3), expected)


def test_the_order_of_a_seed_is_the_same_for_ever():
    # A recorded run names a seed: this order may never change.
    np.testing.assert_array_equal(permutation(8, seed=0, epoch=0), FIRST)
    np.testing.assert_array_equal(permutation(8, seed=1, epoch=2), SECOND)
