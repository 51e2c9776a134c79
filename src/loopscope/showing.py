"""The loop as code, with everything that hears of it in its place."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loopscope.gear import Gear

COLUMN = 52
"""Where remarks begin."""

BUILT_IN = {
    "train": """\
y_pred = model(x, training=True)
loss = model.compute_loss(x, y, y_pred)
gradients = gradients of optimizer.scale_loss(loss)
optimizer.apply(gradients, model.trainable_variables)
model.compute_metrics(x, y, y_pred)""",
    "test": """\
y_pred = model(x, training=False)
loss = model.compute_loss(x, y, y_pred)
model.compute_metrics(x, y, y_pred)""",
}
"""What the built-in steps do."""


def listing(
    model: Any,
    *,
    gear: Gear | None,
    steps: dict[str, Callable[..., Any] | None],
    callbacks: Sequence[Any],
    watch: int | None = None,
) -> str:
    """The loop, line by line.

    Args:
        model: The model.
        gear: In which steps run, if one is chosen.
        steps: The user's train and test step; `None` for a built-in one.
        callbacks: As `fit` would get them.
        watch: How often the signals of a step are measured, if they are.
    """
    return "\n".join(_lines(model, gear, steps, callbacks, watch)) + "\n"


def _lines(
    model: Any,
    gear: Gear | None,
    steps: dict[str, Callable[..., Any] | None],
    callbacks: Sequence[Any],
    watch: int | None,
) -> Iterator[str]:
    def hook(indent: int, name: str) -> Iterator[str]:
        who = [type(c).__name__ for c in callbacks if _has(c, name)]
        if who:
            yield _line(indent, f"callbacks.{name}(...)", ", ".join(who))

    optimizer = type(getattr(model, "optimizer", None)).__name__
    yield _line(0, f"# model {model.name!r}, optimizer {optimizer}")
    yield _line(0, "check(data, labels, shapes)", "refused before a step runs")
    yield from hook(0, "on_train_begin")
    yield _line(0, "for epoch in range(initial_epoch, epochs):")
    yield _line(1, "reset(metrics)")
    yield from hook(1, "on_epoch_begin")
    how = "chosen by measuring" if gear is None else f"gear {gear.name}"
    fused = gear is not None and gear.fused
    yield _line(
        1,
        "for x, y in train:",
        f"{how}{', many steps in one call' if fused else ''}",
    )
    yield from hook(2, "on_train_batch_begin")
    yield from _step(2, "train", steps["train"])
    if watch is not None:
        yield _line(2, f"if step % {watch} == 0:")
        yield _line(3, "measure(gradients, activations)", "inside the step")
    yield from hook(2, "on_train_batch_end")
    if watch is not None:
        yield _line(2, "judge(chunk)", "spikes, the first value not finite")
    yield _line(2, "if this is the first chunk:")
    yield _line(3, "doctor(step)", "cheap checks, once, unless doctor=False")
    yield _line(1, "if validation_data and epoch is due:")
    yield from hook(2, "on_test_begin")
    yield _line(2, "for x, y in validation_data:", "metrics of training kept aside")
    yield from hook(3, "on_test_batch_begin")
    yield from _step(3, "test", steps["test"])
    yield from hook(3, "on_test_batch_end")
    yield from hook(2, "on_test_end")
    yield from hook(1, "on_epoch_end")
    yield _line(1, "if stop_training:")
    yield _line(2, "break")
    yield from hook(0, "on_train_end")


def _step(indent: int, phase: str, own: Callable[..., Any] | None) -> Iterator[str]:
    if own is None:
        yield _line(indent, f"# the built-in {phase} step")
        source = BUILT_IN[phase]
    else:
        function = inspect.unwrap(getattr(own, "python_function", own))
        try:
            source = textwrap.dedent(inspect.getsource(function)).rstrip()
            file = inspect.getsourcefile(function)
            first = function.__code__.co_firstlineno
            yield _line(indent, "# your step", f"{file}:{first}")
        except (OSError, TypeError, AttributeError):
            source = f"{getattr(own, '__qualname__', own)}(x, y)"
    yield from (_line(indent, line) for line in source.splitlines())


def _line(indent: int, code: str, remark: str = "") -> str:
    line = "    " * indent + code
    return f"{line:<{COLUMN}}# {remark}" if remark else line


def _has(callback: Any, hook: str) -> bool:
    """Whether a callback does something in a hook."""
    import keras

    base = keras.callbacks.Callback
    # Keras calls the old names of the batch hooks too.
    names = {hook, hook.replace("on_train_batch", "on_batch")}
    return any(
        getattr(type(callback), name, None) is not getattr(base, name, None)
        or name in vars(callback)
        for name in names
    )
