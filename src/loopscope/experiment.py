"""An experiment: a loop and its data, which a command can import and run."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from loopscope import keras_methods
from loopscope.doctor.examine import Examination
from loopscope.errors import ExperimentError
from loopscope.estimate import Estimate
from loopscope.loop import Loop

BUILT_IN = {"mnist": "loopscope.experiments.mnist:mnist"}


class Experiment:
    """A loop, and the arguments of its `fit`.

    Example:
        ```python
        def experiment():
            loop = Loop(build_model(), "adam", "mse", seed=0)
            return loopscope.Experiment(loop, x=x, y=y, epochs=10, batch_size=64)
        ```

    Args:
        loop: The loop.
        **arguments: Arguments of `Loop.fit`, by name.

    Raises:
        ExperimentError: No loop, or an argument that `fit` does not have.
    """

    def __init__(self, loop: Loop, **arguments: Any) -> None:
        if not isinstance(loop, Loop):
            raise ExperimentError(
                "An Experiment needs a `loopscope.Loop` first. "
                f"Received: loop of type {type(loop).__name__}"
            )
        known = list(inspect.signature(Loop.fit).parameters)[1:]
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ExperimentError(
                f"`Loop.fit` has no argument {unknown[0]!r}. "
                f"It has: {', '.join(known)}. Received: {sorted(arguments)}"
            )
        self.loop = loop
        self.arguments = arguments

    def fit(self, **changes: Any) -> Any:
        """Train; `changes` win over the experiment's own arguments."""
        return self.loop.fit(**{**self.arguments, **changes})

    def sources(self, hold: ExitStack) -> tuple[Any, Any]:
        """What `fit` trains on and validates with; `hold` closes them."""
        return keras_methods.sources(self.loop, **self.arguments, hold=hold)

    def doctor(
        self,
        *,
        checks: Collection[str] | None = None,
        progress: Callable[[str], None] = lambda check: None,
    ) -> Examination:
        """As `Loop.doctor`, on the data of the experiment."""
        with ExitStack() as hold:
            train, validation = self.sources(hold)
            return self.loop.examine(
                train, validation, checks=checks, progress=progress
            )

    def estimate(self, **changes: Any) -> Estimate:
        """As `Loop.estimate`, on the data of the experiment."""
        epochs = {**self.arguments, **changes}.get("epochs", 1)
        with ExitStack() as hold:
            train, validation = self.sources(hold)
            return self.loop.forecast(train, validation, epochs=epochs)

    def train_source(self) -> Any:
        """The training data as a source."""
        names = ("x", "y", "sample_weight", "batch_size", "shuffle", "steps_per_epoch")
        given = {n: v for n, v in self.arguments.items() if n in names}
        return self.loop.source(**given)


def load(
    name: str, *, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Experiment:
    """Import an experiment by name and make it.

    Seeds Python, NumPy and the backend first, so that the same name gives the
    same initial weights.

    Args:
        name: `package.module:function`, `file.py:function`, or a built-in name.
        seed: For `keras.utils.set_random_seed`.
        options: Arguments of the function, if any.

    Raises:
        ExperimentError: It cannot be imported, raises, or returns something else.
    """
    function = _function(BUILT_IN.get(name, name))
    import keras

    keras.utils.set_random_seed(seed)
    try:
        experiment = function(**(options or {}))
    except Exception as error:
        raise ExperimentError(
            f"Experiment {name!r} could not be made: its function raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(experiment, Experiment):
        raise ExperimentError(
            f"Experiment {name!r} must return a `loopscope.Experiment(loop, ...)`. "
            f"Received: {type(experiment).__name__}"
        )
    experiment.loop.origin = {
        "experiment": name,
        "function": _absolute(BUILT_IN.get(name, name)),
        "seed": seed,
        "options": dict(options or {}),
    }
    experiment.loop.function = function
    return experiment


def _absolute(name: str) -> str:
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).resolve()}:{attribute}" if place.endswith(".py") else name


def _function(name: str) -> Callable[[], Any]:
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ExperimentError(
            "An experiment is named `package.module:function`, `file.py:function`, or "
            f"one of {', '.join(map(repr, BUILT_IN))}. Received: {name!r}"
        )
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ExperimentError(
            f"{place!r} has no function {attribute!r}. It has: "
            f"{', '.join(n for n in vars(module) if not n.startswith('_'))}"
        )
    return function  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _failed(name, error) from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExperimentError(
            f"There is no file {str(path)!r}. Expected the path of a Python file that "
            "holds the experiment's function."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(str(path), error) from error
    return module


def _failed(name: str, error: Exception) -> ExperimentError:
    return ExperimentError(
        f"{name!r} could not be imported: {type(error).__name__}: {error}"
    )
