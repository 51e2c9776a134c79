"""What kind of loss a Keras loss object is, and what it was given."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from loopscope.doctor.facts import Facts
from loopscope.look.probe import Judged

Kind = Literal["sparse", "categorical", "binary"]


def kind_of(loss: Any) -> Kind | None:
    """Which cross-entropy a loss is; `None` for any other."""
    name = getattr(getattr(loss, "fn", None), "__name__", type(loss).__name__)
    name = name.lower().replace("_", "")
    if "crossentropy" not in name:
        return None
    if name.startswith("sparse"):
        return "sparse"
    return "binary" if name.startswith("binary") else "categorical"


def option(loss: Any, name: str, default: Any) -> Any:
    """An argument that a loss was made with."""
    return loss.get_config().get(name, default)


def values(facts: Facts, judged: Judged) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels and predictions as arrays; `None` where they are nested."""
    try:
        pair = (facts.host(judged.y_true), facts.host(judged.y_pred))
    except (TypeError, ValueError, AttributeError):
        return None
    if any(a.dtype.kind not in "biufV" for a in pair):
        return None
    return pair
