"""`make test`: the suite on TensorFlow, JAX and PyTorch, two processes at a time.

What TensorFlow's says is shown as it comes, what the others say after it. A shell would
start the second one with Ctrl-C ignored, which some tests are about.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time

PYTEST = [sys.executable, "-m", "pytest", "-m"]
OTHERS = {"jax": "JAX", "torch": "PyTorch"}


def environment(backend):
    # PyTorch's threads would wait for a core that another suite has.
    threads = {"OMP_NUM_THREADS": "1"} if backend == "torch" else {}
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**os.environ, **quiet, **threads}


def main():
    with contextlib.ExitStack() as stack:
        print("== tests on TensorFlow (the others run beside them)", flush=True)
        first = subprocess.Popen([*PYTEST, "not slow"], env=environment("tensorflow"))
        running, codes, held = [first], [], {}
        stack.callback(lambda: [process.kill() for process in running])
        for backend in OTHERS:
            while sum(process.poll() is None for process in running) > 1:
                time.sleep(0.2)
            held[backend] = stack.enter_context(tempfile.TemporaryFile("w+"))
            running.append(
                subprocess.Popen(
                    [*PYTEST, "not slow and not once", "-p", "no:cacheprovider"],
                    env=environment(backend),
                    stdout=held[backend],
                    stderr=subprocess.STDOUT,
                )
            )
        codes = [process.wait() for process in running]
        for backend, name in OTHERS.items():
            held[backend].seek(0)
            print(f"== tests on {name}\n{held[backend].read()}", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
