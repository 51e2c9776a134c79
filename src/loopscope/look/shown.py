"""An opened step as the page shows it, and a notebook by the page's own view.

Plain data; docs/page.md describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loopscope.figures.frame import framed
from loopscope.look.pictures import data_uri, pictures
from loopscope.run.plain import inert

if TYPE_CHECKING:
    from loopscope.look.opened import OpenedStep

SHOWN = 64
"""So many examples have a picture, the worst first."""

SIDE = 128
"""A larger picture is shown by some of its points."""

KEPT_SIDE = 64
"""The same in a notebook, whose file keeps what is shown."""


def shown(look: OpenedStep, *, side: int = SIDE) -> dict[str, Any]:
    """Everything that is shown of a step.

    Args:
        look: The step.
        side: The most pixels of a side of a picture.
    """
    return {
        **look.as_dict(),
        "step": look.step,
        "gear": look.gear,
        "learning_rate": look.learning_rate,
        "pictures": examples(look, side=side),
        "heat": heat(look),
    }


def in_notebook(document: Mapping[str, Any], otherwise: str) -> str:
    """What a notebook shows of a step: the page's own view.

    Args:
        document: As `shown` makes it.
        otherwise: HTML, shown where scripts do not run.
    """
    return framed(f"Step {document['step']}, opened", inert(document), otherwise)


def examples(look: OpenedStep, *, side: int = SIDE) -> list[dict[str, Any]]:
    """Every example, worst loss first, with a picture where it is one."""
    loss, order = look.loss_per_example, look.worst
    found = pictures(look.picture_input())
    if order is None:
        order = np.arange(len(found) if found is not None else 0)
    listed = []
    for place, i in enumerate(order.tolist()):
        picture = None
        if found is not None and i < len(found) and place < SHOWN:
            picture = small(found[i], side)
        listed.append(
            {
                "position": i,
                "example": None if look.examples is None else int(look.examples[i]),
                "loss": None if loss is None else float(loss[i]),
                "label": look.label(i),
                "predicted": look.predicted(i),
                "picture": picture,
            }
        )
    return listed


def small(picture: np.ndarray, side: int) -> str:
    """A picture as the `src` of an `<img>`, of at most so many pixels a side."""
    every = -(-max(picture.shape[:2]) // side)
    return data_uri(np.ascontiguousarray(picture[::every, ::every]))


def heat(look: OpenedStep) -> dict[str, Any]:
    """How gradients and updates are spread over the depth, from input to output."""
    ratios = {u.path: u.ratio for u in look.updates}
    return {
        "paths": [g.path for g in look.gradients],
        "gradient_norm": [
            None if g.stats is None else g.stats.norm for g in look.gradients
        ],
        "update_ratio": [ratios.get(g.path) for g in look.gradients],
    }
