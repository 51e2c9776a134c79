"""A part of a benchmark in a process of its own: one backend, nothing else at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def in_process(
    script: str, *words: str, backend: str, failed: Callable[[str], None]
) -> dict[str, Any]:
    """What a script of this folder prints, one JSON document; or its `"error"`.

    Args:
        script: Its name.
        words: Its arguments.
        backend: Of Keras.
        failed: Told the error.
    """
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "LOOPSCOPE_CACHE": "0",
        },
    )
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no word"])[-1]
        failed(error)
        return {"error": error}
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed
