"""`make test`: the suite on TensorFlow, JAX and PyTorch, two processes at a time.

What TensorFlow's says is shown as it comes, what the others say after it. A shell would
start the second one with Ctrl-C ignored, which some tests are about. What runs show of
themselves (the page, figures, the tutorial, programs) is the same on every backend, and
a suite of its own: so two processes are busy until the end.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m"]
SHOWING = (
    "cli/test_view.py",
    "figures",
    "run/test_control.py",
    "test_docs.py",
    "test_programs.py",
    "test_site.py",
    "test_tutorial.py",
    "view",
)
"""What shows runs, and what explains them."""

SUITES = {
    "TensorFlow": (
        "tensorflow",
        ["not slow", *(f"--ignore={HERE / path}" for path in SHOWING)],
    ),
    "JAX": ("jax", ["not slow and not once"]),
    "PyTorch": ("torch", ["not slow and not once"]),
    "TensorFlow: what runs show": (
        "tensorflow",
        ["not slow", *(str(HERE / path) for path in SHOWING)],
    ),
}


def environment(backend):
    # PyTorch's threads would wait for a core that another suite has.
    threads = {"OMP_NUM_THREADS": "1"} if backend == "torch" else {}
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**os.environ, **quiet, **threads}


def main():
    with contextlib.ExitStack() as stack:
        running, held = [], {}
        stack.callback(lambda: [process.kill() for process in running])
        for name, (backend, arguments) in SUITES.items():
            while sum(process.poll() is None for process in running) > 1:
                time.sleep(0.2)
            out = None
            if running:
                out = held[name] = stack.enter_context(tempfile.TemporaryFile("w+"))
            else:
                print(f"== tests on {name} (the others run beside)", flush=True)
            running.append(
                subprocess.Popen(
                    [*PYTEST, *arguments],
                    env=environment(backend),
                    stdout=out,
                    stderr=None if out is None else subprocess.STDOUT,
                )
            )
        codes = [process.wait() for process in running]
        for name, out in held.items():
            out.seek(0)
            print(f"== tests on {name}\n{out.read()}", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
