"""What a checkpoint says of where training stands, and what it stands for again.

The two directions side by side: what one writes, the other reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from loopscope.run.checkpoint import Checkpoint
from loopscope.run.plain import Arrays, NotPlain, decode, encode, encode_specs
from loopscope.standing import Cursor, Standing


def content_of(at: Standing, arrays: Arrays) -> dict[str, Any]:
    """A standing but for its step and variables, as JSON; arrays go into `arrays`."""
    return {
        "cursor": asdict(at.cursor),
        "seed": at.seed,
        "gear": at.gear,
        "test_gear": at.test_gear,
        "stopped": at.stopped,
        "passes": [list(p) for p in at.passes],
        "tests": at.tests,
        "specs": {
            phase: encode_specs(specs)
            for phase, specs in at.specs.items()
            if phase != "predict"
        },
        "meters": encode_logs(at.meters, arrays, "meters"),
        "logs": encode_logs(at.logs, arrays, "logs"),
    }


def standing_of(read: Checkpoint) -> Standing:
    """A checkpoint as a loop takes it."""
    content, extra = read.content, dict(read.extra)
    return Standing(
        step=read.step,
        cursor=Cursor(**content["cursor"]),
        seed=content["seed"],
        gear=content["gear"],
        test_gear=content["test_gear"],
        stopped=content["stopped"],
        state=read.state,
        meters=decode(content["meters"], extra),
        logs=decode(content["logs"], extra),
        passes=[(epoch, steps) for epoch, steps in content["passes"]],
        specs={
            phase: decode(specs, {})
            for phase, specs in content["specs"].items()
            if specs is not None
        },
        tests=content["tests"],
    )


def encode_logs(value: Mapping[str, Any], arrays: Arrays, name: str) -> Any:
    """As `plain.encode`; what is not plain data as an array, or by its text."""
    try:
        return encode(dict(value), arrays, name)
    except NotPlain:
        return {
            k: encode_logs(v, arrays, f"{name}/{k}")
            if isinstance(v, Mapping)
            else _one(v, arrays, f"{name}/{k}")
            for k, v in value.items()
        }


def _one(value: Any, arrays: Arrays, name: str) -> Any:
    try:
        return encode(value, arrays, name)
    except NotPlain:
        array = np.asarray(value)
        numbers = array.dtype.kind in "biuf"
        return encode(array, arrays, name) if numbers else str(value)
