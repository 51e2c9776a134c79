"""Each page of the doctor: its first example has the finding, its second one none."""

import re
import warnings
from pathlib import Path

import pytest

from loopscope.doctor.checks import ALL
from models import TENSORFLOW, halved

PAGES = Path(__file__).parents[2] / "docs" / "doctor"
slow = pytest.mark.slow
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def examples(name):
    return BLOCK.findall((PAGES / f"{name}.md").read_text("utf-8"))


def examined(code, path):
    # A file, since AutoGraph reads a step's source.
    path.write_text(code, "utf-8")
    found = {"__name__": "page"}
    exec(compile(code, str(path), "exec"), found)
    loop, arguments = found["loop"], {"validation_data": found.get("validation_data")}
    if found["y"] is not None:
        arguments["batch_size"] = 32
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist|The output")
        examination = loop.doctor(found["x"], found["y"], **arguments)
    assert not examination.failed
    return examination


def test_every_check_has_a_page_and_every_page_a_check():
    assert {p.stem for p in PAGES.glob("*.md")} == set(ALL)


MEASURED = list(ALL)[list(ALL).index("dropped_state") :]
"""Checks that run and compile more: in the quick suite on TensorFlow, where that is
cheap, and what takes seconds there in the slow one."""


def _measured(*quick):
    return [
        name if TENSORFLOW and name in quick else pytest.param(name, marks=slow)
        for name in MEASURED
    ]


DIVIDED = ("replicas",)
"""Examples that divide the device: tests/doctor/test_script.py runs them."""

OTHERS = [name for name in ALL if name not in (*MEASURED, *DIVIDED)]
QUICK = [name for name in MEASURED if name not in ("compiling", "memory")]


@pytest.mark.parametrize("name", [*halved(OTHERS), *_measured(*QUICK)])
def test_the_first_example_is_found_and_named(name, tmp_path):
    broken, _ = examples(name)
    examination = examined(broken, tmp_path / "broken.py")
    finding = next(f for f in examination.findings if f.check == name)
    assert finding.link == f"docs/doctor/{name}.md"
    assert finding.message
    assert finding.where
    assert finding.change.endswith(".")
    assert name == "resuming" or finding.measured


@pytest.mark.parametrize("name", [*halved(OTHERS), *_measured("overfit")])
def test_in_the_second_example_nothing_is_found(name, tmp_path):
    _, mended = examples(name)
    examination = examined(mended, tmp_path / "mended.py")
    assert not examination.findings, str(examination)
