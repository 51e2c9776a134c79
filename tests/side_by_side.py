"""`make test`: the suite on TensorFlow and on JAX, in two processes side by side.

What TensorFlow's says is shown as it comes, what JAX's says after it. A shell would
start the second one with Ctrl-C ignored, which some tests are about.
"""

import os
import subprocess
import sys
import tempfile

PYTEST = [sys.executable, "-m", "pytest", "-m"]


def environment(backend):
    return {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}


def main():
    with tempfile.TemporaryFile("w+") as held:
        print("== tests on TensorFlow (those on JAX run beside them)", flush=True)
        beside = subprocess.Popen(
            [*PYTEST, "not slow and not once", "-p", "no:cacheprovider"],
            env=environment("jax"),
            stdout=held,
            stderr=subprocess.STDOUT,
        )
        try:
            first = subprocess.run(
                [*PYTEST, "not slow"], env=environment("tensorflow"), check=False
            )
            beside.wait()
        finally:
            beside.kill()
        held.seek(0)
        print(f"== tests on JAX\n{held.read()}", flush=True)
    return first.returncode or beside.returncode


if __name__ == "__main__":
    sys.exit(main())
