"""Keras beside loopscope: the same model, data and call, and everything compared.

`both(build, call)` makes a model twice from the same seed, lets Keras's own method
run on the one and loopscope's on the other, and gives back what each has left
behind: the return value, weights, optimizer, and what callbacks were told.
"""

import warnings
from dataclasses import dataclass, field

import keras
import numpy as np

from loopscope import Loop
from models import STEP, TENSORFLOW, relative

TOLERANCE = 1e-6

HOOKS = [
    f"on_{phase}{part}_{moment}"
    for phase, part in [
        ("train", ""),
        ("epoch", ""),
        ("train", "_batch"),
        ("test", ""),
        ("test", "_batch"),
        ("predict", ""),
        ("predict", "_batch"),
    ]
    for moment in ("begin", "end")
]


class Recorder(keras.callbacks.Callback):
    """Everything that a callback is told, in order, with what it could read then."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def set_params(self, params):
        super().set_params(params)
        self.heard.append(("params", dict(params)))


def _hook(name):
    def hook(self, *args, logs=None):
        *position, last = (*args, logs) if len(args) < 2 else args
        if isinstance(last, dict) or last is None:
            logs = last
        if position and isinstance(position[0], dict):
            logs, position = position[0], []
        told = {k: v for k, v in (logs or {}).items() if k != "outputs"}
        iterations = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        self.heard.append((name, *[p for p in position if p is not None], told))
        self.heard.append(("iterations", iterations))

    return hook


for _name in HOOKS:
    setattr(Recorder, _name, _hook(_name))


@dataclass
class Side:
    """What one of the two has left behind."""

    value: object = None
    model: object = None
    heard: list = field(default_factory=list)
    warned: list = field(default_factory=list)
    error: BaseException | None = None


def both(
    build,
    call,
    *,
    gear=STEP,
    method="fit",
    record=True,
    ignore=("shuffle",),
    eager=TENSORFLOW,
):
    """`(Keras's side, ours)` of one call."""
    sides = []
    for ours in (False, True):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        side, recorder = Side(), Recorder()
        side.model = build()
        # Eager and graph give the same bits on TensorFlow, and eager starts at once.
        if not ours and eager and side.model.steps_per_execution == 1:
            side.model.run_eagerly = True
        args, options = call(side.model)
        options.setdefault("verbose", 0)
        if record:
            options["callbacks"] = [*options.get("callbacks", ()), recorder]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                if ours:
                    loop = Loop(side.model, gear=gear, seed=0)
                    side.value = getattr(loop, method)(*args, **options)
                else:
                    side.value = getattr(side.model, method)(*args, **options)
            except Exception as error:
                side.error = error
        texts = [str(w.message) for w in warned if w.category is UserWarning]
        told = [t for t in texts if not any(word in t for word in ignore)]
        # How often a step is traced is not for the comparison.
        side.warned = list(dict.fromkeys(told)) if "Gradients" in str(told) else told
        side.heard = recorder.heard
        sides.append(side)
    return sides


def assert_alike(theirs, ours, *, tolerance=TOLERANCE):
    """Every number, name and order of the two sides is the same."""
    if theirs.error is not None or ours.error is not None:
        raise AssertionError(f"{theirs.error!r} / {ours.error!r}") from (
            ours.error or theirs.error
        )
    assert ours.warned == theirs.warned, (ours.warned, theirs.warned)
    assert_same(ours.value, theirs.value, tolerance)
    told = [[h[0] for h in side.heard] for side in (ours, theirs)]
    assert told[0] == told[1], (ours.heard, theirs.heard)
    batches = 0
    for mine, keras_own in zip(ours.heard, theirs.heard, strict=True):
        batches += mine[0] == "on_train_batch_end"
        # The first steps are the same but for rounding; that grows.
        first = batches <= 3 and tolerance == TOLERANCE
        assert_same(mine, keras_own, tolerance / 10 if first else tolerance)
    trained = isinstance(theirs.value, keras.callbacks.History)
    for variable, other in zip(
        _variables(ours.model, trained), _variables(theirs.model, trained), strict=True
    ):
        # Whoever builds an optimizer first names its scope; the rest is the same.
        assert variable.path.split("/")[-1] == other.path.split("/")[-1]
        a, b = (keras.ops.convert_to_numpy(v) for v in (other, variable))
        assert relative(a, b) < 10 * tolerance, variable.path


def _variables(model, trained):
    # Whether `evaluate` builds the optimizer too is left to the backend by Keras.
    slots = model.optimizer.variables if trained and model.optimizer else ()
    return [*model.variables, *slots]


def assert_same(mine, other, tolerance):
    if isinstance(other, keras.callbacks.History):
        assert isinstance(mine, keras.callbacks.History)
        assert mine.epoch == other.epoch
        assert_same(mine.params, other.params, tolerance)
        return assert_same(mine.history, other.history, tolerance)
    if isinstance(other, dict):
        assert list(mine) == list(other), (list(mine), list(other))
        for name in other:
            assert_same(mine[name], other[name], tolerance)
    elif isinstance(other, (list, tuple)):
        assert type(mine) is type(other)
        assert len(mine) == len(other), (mine, other)
        for a, b in zip(mine, other, strict=True):
            assert_same(a, b, tolerance)
    elif isinstance(other, (str, bool, int)) or other is None:
        assert mine == other
    else:
        assert isinstance(mine, type(other)) or not isinstance(other, float)
        np.testing.assert_allclose(
            np.asarray(mine), np.asarray(other), rtol=10 * tolerance, atol=TOLERANCE
        )
    return None
