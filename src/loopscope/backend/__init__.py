"""The rooms where a framework may be named, and the door to the right one.

Keras decides which framework is in use (`KERAS_BACKEND`, `keras.json`); this
package only follows it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from loopscope import cluster
from loopscope.backend.base import Backend
from loopscope.errors import BackendError

ROOMS = {
    "tensorflow": "TensorFlowBackend",
    "jax": "JaxBackend",
    "torch": "TorchBackend",
}


@cache
def current() -> Backend:
    """The backend that Keras runs on in this process.

    Imports Keras and its framework on the first call (seconds); Keras cannot
    change its backend within a process, so neither can this.

    Raises:
        BackendError: Keras runs on a backend that has no room here, or the
            framework is not installed.
    """
    try:
        import keras
    except ImportError as error:
        raise BackendError(
            f"Keras could not import its backend ({error}). Install one of the "
            "extras: `pip install 'loopscope[tensorflow]'`, "
            "`pip install 'loopscope[jax]'` or `pip install 'loopscope[torch]'`; "
            "choose with the environment variable KERAS_BACKEND."
        ) from error
    name = keras.backend.backend()
    if name not in ROOMS:
        raise BackendError(
            f"loopscope has no room for Keras's {name!r} backend. It has: "
            f"{', '.join(map(repr, ROOMS))}. Set KERAS_BACKEND to one of these "
            "before Keras is imported."
        )
    module = importlib.import_module(f"loopscope.backend.{name}")
    backend: Backend = getattr(module, ROOMS[name])()
    return backend


@contextmanager
def join() -> Iterator[None]:
    """Join the workers that a launcher has started, in a block that makes the loop.

    Where the environment names a place among several processes (by `TF_CONFIG`,
    torchrun's variables, or SLURM's), all of them divide each batch of a loop that is
    made in here. Elsewhere nothing happens, so that one script runs on one machine and
    on many. Waits for the others.

    Example:
        ```python
        with loopscope.join():
            made = experiment()
        made.fit()
        ```

    Returns:
        A context manager.

    Raises:
        UsageError: The environment contradicts itself, or it is too late to join.
        BackendError: As `current`.
    """
    here = cluster.place(os.environ)
    if here is None:
        yield
        return
    with current().join(here):
        yield
