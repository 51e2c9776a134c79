"""MNIST is the real one, whole, and goes wherever the package goes."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder

from loopscope.datasets import mnist

ROOT = Path(__file__).parents[1]
ARRAYS = ["x_train", "y_train", "x_test", "y_test"]

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def arrays():
    (x_train, y_train), (x_test, y_test) = mnist()
    return dict(zip(ARRAYS, (x_train, y_train, x_test, y_test), strict=True))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x_train", (60000, 28, 28)),
        ("y_train", (60000,)),
        ("x_test", (10000, 28, 28)),
        ("y_test", (10000,)),
    ],
)
def test_mnist_has_the_shapes_and_dtypes_of_keras_load_data(arrays, name, shape):
    assert arrays[name].shape == shape
    assert arrays[name].dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("x_train", "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"),
        ("y_train", "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"),
        ("x_test", "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"),
        ("y_test", "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"),
    ],
)
def test_mnist_is_the_original_byte_for_byte(arrays, name, sha256):
    assert hashlib.sha256(arrays[name].tobytes()).hexdigest() == sha256


def test_mnist_gives_each_caller_arrays_of_their_own(arrays):
    (x_train, _), _ = mnist()
    x_train[0] = 0
    assert arrays["x_train"][0].any()


def test_a_built_wheel_holds_what_is_no_code():
    """What the build backend would pack, asked without building."""
    files = {
        file.distribution_path
        for file in WheelBuilder(str(ROOT)).recurse_included_files()
    }
    assert {"loopscope/datasets/mnist.npz", "loopscope/py.typed"} <= files
    assert {f"loopscope/figures/static/{n}" for n in ("alone.js", "style.css")} <= files
