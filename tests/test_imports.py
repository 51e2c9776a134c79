"""The picture of the architecture, held by a test: who may import whom."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"keras", "tensorflow", "jax", "torch"}

pytestmark = pytest.mark.once


def run_python(program):
    """Run a program in a fresh process: this one has Keras and its loggers in it."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_import_contract_in_pyproject_is_kept():
    linter = run_python(
        "import sys; from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    assert linter.returncode == 0, linter.stdout + linter.stderr


@pytest.mark.parametrize("module", ["loopscope", "loopscope.cli", "loopscope.datasets"])
def test_importing_loads_no_framework(module):
    imported = run_python(f"import sys, {module}; print(*sys.modules)")
    assert imported.returncode == 0, imported.stderr
    assert FRAMEWORKS.isdisjoint(imported.stdout.split())
