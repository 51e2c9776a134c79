"""Data that travels with loopscope.

Holds MNIST, so that the built-in experiment runs without a network. Reads arrays and
nothing more: no split, no scaling, no batches, no framework.
"""

from importlib import resources
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["mnist"]

Images: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.uint8]


def mnist() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Return the MNIST handwritten digits, 28x28 grey images of ten classes.

    The same arrays as `keras.datasets.mnist.load_data()` returns, value for value, but
    read from a file inside the package: no download, no cache folder, no framework.

    Example:

    ```python
    from loopscope.datasets import mnist

    (x_train, y_train), (x_test, y_test) = mnist()
    assert x_train.shape == (60000, 28, 28)
    assert y_test.shape == (10000,)
    ```

    Returns:
        `(x_train, y_train), (x_test, y_test)`, every array `uint8` and the caller's
        own: `x_train` `(60000, 28, 28)` and `x_test` `(10000, 28, 28)` with pixels
        from 0 (background) to 255; `y_train` `(60000,)` and `y_test` `(10000,)` with
        digits from 0 to 9. Each call unpacks the file again: 55 MB, about half a
        second.

    Source and licence: made by Yann LeCun and Corinna Cortes, who hold the copyright,
    from NIST's databases; licensed under Creative Commons Attribution-ShareAlike 3.0,
    https://creativecommons.org/licenses/by-sa/3.0/. Shipped unmodified.
    """
    file = resources.files(__name__).joinpath("mnist.npz")
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return (
            (arrays["x_train"], arrays["y_train"]),
            (arrays["x_test"], arrays["y_test"]),
        )
