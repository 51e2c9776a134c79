"""An opened step as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope.errors import UsageError
from loopscope.look import html

if TYPE_CHECKING:
    from loopscope.look.opened import OpenedStep

SUFFIXES = (".npz", ".safetensors", ".html")
ABOUT = "about"
"""The entry of a file that holds everything but the arrays, as JSON."""


def check(path: Path) -> None:
    """Refuse a name that says no kind of file.

    Raises:
        UsageError: Naming those there are.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"Expected a file name that ends in one of {', '.join(SUFFIXES)}. "
            f"Received: {str(path)!r}"
        )
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {str(path.parent)!r}. Make it first.")


def save(step: OpenedStep, path: Path) -> None:
    """Write a step into a file; its name says which kind.

    `.npz` and `.safetensors` hold every array by name (`layers/PATH`, `gradients/PATH`,
    `updates/PATH`, `batch/x`, `optimizer/PATH/before` and so on), and, as JSON under
    `about`, everything else. `.html` is a page to look at.

    Raises:
        UsageError: The name says no kind of file, or there is no such folder.
    """
    check(path)
    if path.suffix == ".html":
        path.write_text(html.page(step), "utf-8")
        return
    about = json.dumps(step.as_dict(), allow_nan=True)
    found = arrays(step)
    if path.suffix == ".npz":
        named: dict[str, Any] = {ABOUT: np.array(about), **found}
        with path.open("wb") as file:
            np.savez_compressed(file, **named)
        return
    from safetensors.numpy import save_file

    save_file(found, path, metadata={ABOUT: about})


def arrays(step: OpenedStep) -> dict[str, np.ndarray]:
    """Every array of a step by name; dtypes that NumPy lacks as float32, exactly."""
    import keras

    found: dict[str, Any] = {}
    for path, leaf in keras.tree.flatten_with_path(dict(step.batch)):
        found["/".join(["batch", *map(str, path)])] = leaf
    for i, (prediction, label) in enumerate(
        zip(step.predictions, step.labels, strict=True)
    ):
        found[f"predictions/{i}"], found[f"labels/{i}"] = prediction, label
    found["loss_per_example"], found["examples"] = step.loss_per_example, step.examples
    for output in step.layers:
        name = f"{output.path}@{output.call}" if output.call else output.path
        found[f"layers/{name}"] = output.values
        found[f"layer_gradients/{name}"] = output.gradient
    for gradient in step.gradients:
        found[f"gradients/{gradient.path}"] = gradient.values
    for update in step.updates:
        found[f"updates/{update.path}"] = update.values
    for kind in ("optimizer", "metrics", "seeds", "others"):
        for path, change in getattr(step, kind).items():
            found[f"{kind}/{path}/before"] = change.before
            found[f"{kind}/{path}/after"] = change.after
    return {
        name: _plain(value)
        for name, value in found.items()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufV"
    }


def _plain(value: np.ndarray) -> np.ndarray:
    plain = value.astype(np.float32) if value.dtype.kind == "V" else value
    return np.ascontiguousarray(plain).reshape(plain.shape)
