"""What the tests of the program share."""

import subprocess
import sys

FRAMEWORKS = ("keras", "tensorflow", "jax", "torch")


def loaded_by(arguments, *more):
    """Which frameworks, and which of more packages, a successful call has loaded."""
    code = (
        "import sys\n"
        "from loopscope.cli import main\n"
        "try:\n"
        f"    main({list(arguments)!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        f"print([n for n in {(*FRAMEWORKS, *more)!r} if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]
