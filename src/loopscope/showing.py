"""The loop as code, with everything that hears of it in its place."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

NOTES = {
    "checked": "refused before a step runs",
    "measured": "chosen by measuring",
    "gear": "gear {gear}",
    "fused": "gear {gear}, many steps in one call",
    "inside": "inside the step",
    "judged": "spikes, the first value not finite",
    "doctor": "cheap checks, once, unless doctor=False",
    "kept": "metrics of training kept aside",
}
"""Remarks; a view may have other words for them."""

ROLES = {
    "apply": r"\.(stateless_)?apply(_gradients)?\(|\.step\(\)|\.minimize\(",
    "backward": r"\bgradients?\b|value_and_grad|\.backward\(|scale_loss",
    "metrics": r"update_state\(|compute_metrics\(|\bmetrics?\b",
    "loss": r"loss\w*\s*[(=]",
    "forward": r"\b(model|self|generator|discriminator|teacher|student)\w*\(|training=",
}
"""By what a statement of a step is taken for a part of it, the surest sign first."""


@dataclass(frozen=True)
class Line:
    """A line of the loop.

    Attributes:
        text: The code.
        role: The part of the loop that it belongs to: `"epoch"`, `"data"`, `"step"`,
            `"forward"`, `"loss"`, `"backward"`, `"apply"`, `"metrics"`,
            `"validation"`, `"callbacks"`; `None` for what is none of these.
        note: A remark.
        about: What the remark is, where it is one of `NOTES`: `note`, its name there,
            and what stands in its braces.
    """

    text: str
    role: str | None = None
    note: str = ""
    about: Mapping[str, str] = field(default_factory=dict)


def listing(lines: Sequence[Line]) -> str:
    """The loop as text."""
    return "".join(
        (f"{line.text:<{COLUMN}}# {line.note}" if line.note else line.text) + "\n"
        for line in lines
    )


def lines(
    model: Any,
    *,
    gear: Gear | None,
    steps: dict[str, Callable[..., Any] | None],
    callbacks: Sequence[Any],
    watch: int | None = None,
) -> list[Line]:
    """The loop, line by line.

    Args:
        model: The model.
        gear: In which steps run, if one is chosen.
        steps: The user's train and test step; `None` for a built-in one.
        callbacks: As `fit` would get them.
        watch: How often the signals of a step are measured, if they are.
    """
    return list(_lines(model, gear, steps, callbacks, watch))


def _lines(
    model: Any,
    gear: Gear | None,
    steps: dict[str, Callable[..., Any] | None],
    callbacks: Sequence[Any],
    watch: int | None,
) -> Iterator[Line]:
    def hook(indent: int, name: str) -> Iterator[Line]:
        who = [type(c).__name__ for c in callbacks if _has(c, name)]
        if who:
            code = f"callbacks.{name}(...)"
            yield _line(indent, code, "callbacks", ", ".join(who))

    optimizer = type(getattr(model, "optimizer", None)).__name__
    yield _line(0, f"# model {model.name!r}, optimizer {optimizer}")
    yield _noted(0, "check(data, labels, shapes)", None, "checked")
    yield from hook(0, "on_train_begin")
    yield _line(0, "for epoch in range(initial_epoch, epochs):", "epoch")
    yield _line(1, "reset(metrics)", "epoch")
    yield from hook(1, "on_epoch_begin")
    how = "measured" if gear is None else "fused" if gear.fused else "gear"
    about = {} if gear is None else {"gear": gear.name}
    yield _noted(1, "for x, y in train:", "data", how, **about)
    yield from hook(2, "on_train_batch_begin")
    yield from _step(2, "train", steps["train"])
    if watch is not None:
        yield _line(2, f"if step % {watch} == 0:", "step")
        yield _noted(3, "measure(gradients, activations)", "step", "inside")
    yield from hook(2, "on_train_batch_end")
    if watch is not None:
        yield _noted(2, "judge(chunk)", None, "judged")
    yield _line(2, "if this is the first chunk:")
    yield _noted(3, "doctor(step)", None, "doctor")
    yield _line(1, "if validation_data and epoch is due:", "validation")
    yield from hook(2, "on_test_begin")
    yield _noted(2, "for x, y in validation_data:", "validation", "kept")
    yield from hook(3, "on_test_batch_begin")
    yield from _step(3, "test", steps["test"])
    yield from hook(3, "on_test_batch_end")
    yield from hook(2, "on_test_end")
    yield from hook(1, "on_epoch_end")
    yield _line(1, "if stop_training:", "epoch")
    yield _line(2, "break", "epoch")
    yield from hook(0, "on_train_end")


def _step(indent: int, phase: str, own: Callable[..., Any] | None) -> Iterator[Line]:
    of = "step" if phase == "train" else "validation"
    if own is None:
        yield _line(indent, f"# the built-in {phase} step", of)
        source = BUILT_IN[phase]
    else:
        function = inspect.unwrap(getattr(own, "python_function", own))
        try:
            source = textwrap.dedent(inspect.getsource(function)).rstrip()
            file = inspect.getsourcefile(function)
            first = function.__code__.co_firstlineno
            yield _line(indent, "# your step", of, f"{file}:{first}")
        except (OSError, TypeError, AttributeError):
            source = f"{getattr(own, '__qualname__', own)}(x, y)"
    roles = roles_of(source) if phase == "train" else {}
    for number, text in enumerate(source.splitlines(), 1):
        yield _line(indent, text, roles.get(number, of))


def roles_of(source: str) -> dict[int, str]:
    """Which part of a step its lines are, by number from 1; no entry for the rest.

    A statement over several lines is one part. It goes by names, as a reader would.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:  # The built-in step says one of its lines in words.
        texts = enumerate(source.splitlines(), 1)
        return {n: role for n, text in texts if (role := _role(text))}
    found: dict[int, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or hasattr(node, "body"):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # A docstring may speak of anything.
        role = _role(ast.get_source_segment(source, node) or "")
        if role is not None:
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found |= dict.fromkeys(span, role)
    return found


def _role(statement: str) -> str | None:
    return next((r for r, sign in ROLES.items() if re.search(sign, statement)), None)


def _line(indent: int, code: str, role: str | None = None, note: str = "") -> Line:
    return Line("    " * indent + code, role, note)


def _noted(indent: int, code: str, role: str | None, note: str, **about: str) -> Line:
    """A line with one of `NOTES`."""
    remark = NOTES[note].format(**about)
    return Line("    " * indent + code, role, remark, {"note": note, **about})


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
