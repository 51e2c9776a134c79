"""The rooms where a framework may be named, and the door to the right one.

Keras decides which framework is in use (`KERAS_BACKEND`, `keras.json`); this
package only follows it.
"""

from __future__ import annotations

import importlib
from functools import cache

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
