"""docs/compatibility.md, written from the parity tests that ran.

    python tests/compatibility.py tensorflow.xml jax.xml > docs/compatibility.md

`make compatibility` runs the tests on each backend with pytest's `--junitxml` and then
this. What stands in the page has been compared with Keras's own `fit`, in this run.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

BACKENDS = ("TensorFlow", "JAX")

ARGUMENTS = {
    "fit": {
        "x, y": "data numpy",
        "batch_size": "data no batch size",
        "epochs": "data numpy",
        "verbose": "bar 1",
        "callbacks": "callback EarlyStopping",
        "validation_split": "data weights and split",
        "validation_data": "data validation_data with weights",
        "shuffle": "shuffle",
        "class_weight": "data class_weight",
        "sample_weight": "data numpy with weights",
        "initial_epoch": "data initial_epoch",
        "steps_per_epoch": "data steps below the length",
        "validation_steps": "data validation_steps",
        "validation_batch_size": "data validation_batch_size",
        "validation_freq": "data validation_freq in a list",
    },
    "evaluate": {
        "x, y, sample_weight": "evaluate weighted metrics",
        "batch_size": "evaluate strings",
        "verbose": "bar 1",
        "steps": "evaluate data 2",
        "callbacks": "evaluate strings",
        "return_dict": "evaluate strings",
    },
    "predict": {
        "x": "predict strings",
        "batch_size": "predict strings",
        "verbose": "bar 1",
        "steps": "predict data 2",
        "callbacks": "predict strings",
    },
}
"""By method: each argument, and the test that would fail without it."""

HEAD = """# Compatibility

What Keras users have in `fit`, `evaluate` and `predict`, compared with loopscope side
by side: the same model, weights and data, trained once by Keras and once by loopscope,
and the return value, weights, optimizer and every call of a callback compared, to 1e-5
(relative) or 1e-6 (absolute), in the gear in which Keras itself runs. Written by
`make compatibility` from the tests that ran, in the folder `tests`: **yes** passed,
**-** cannot be compared on this backend: Keras does not have it there, or not in an
order that can be repeated, or it is the other backend's own.

Where loopscope differs on purpose: [differences.md](differences.md).
"""

SECTIONS = [
    ("Models and what `compile` takes", "model"),
    ("Data", "data"),
    ("Other inputs", "input"),
    ("Callbacks", "callback"),
    ("What is refused, by an exception of Keras's type", "bad"),
    ("More", "more"),
]

PATTERNS = [
    (r"test_parity_models.*test_fit_with_validation_is_that_of_keras\[(.*)\]", "model"),
    (r"test_parity_data.*test_fit_is_that_of_keras_on\[(.*)\]", "data"),
    (r"test_parity_callbacks.*of_keras\[(.*)-recorded\]", "callback"),
    (r"test_parity_contract.*test_bad_input_raises_what_keras_raises\[(.*)\]", "bad"),
    (r"test_parity_models.*test_evaluate_is_that_of_keras\[(.*)\]", "evaluate"),
    (r"test_parity_models.*test_predict_is_that_of_keras\[(.*)\]", "predict"),
    (r"test_parity_data.*(evaluate)-(2)-numpy\]", "evaluate data 2"),
    (r"test_parity_data.*(predict)-(2)-numpy\]", "predict data 2"),
    (r"test_the_lines_of_the_bar_are_those_of_keras\[(.*)\]", "bar"),
    (r"test_a_pydataset_is_shuffled_batch_by_batch()", "shuffle"),
    (r"test_parity_data.*test_(several_inputs|sparse_inputs).*\[(.*)\]", "input"),
    (r"test_parity_\w+.*test_(\w+)$", "more"),
]


def case(name: str) -> tuple[str, str]:
    """(section, row) of a test's name."""
    for pattern, section in PATTERNS:
        match = re.search(pattern, name)
        if match:
            words = [w.replace("_are_those_of_keras", "") for w in match.groups() if w]
            row = " ".join(words) if section in ("more", "input") else match[1]
            row = row.replace("_", " ") if section in ("more", "input") else row
            return section, row
    return "", name


def outcomes(path: Path) -> dict[tuple[str, str], str]:
    """What became of each case of one run."""
    found = {}
    for test in ET.parse(path).iter("testcase"):
        key = case(f"{test.get('classname')}.{test.get('name')}")
        # An element without children is false: ask for its being there.
        tags = {element.tag for element in test.iter()}
        failed = tags & {"failure", "error"}
        found[key] = "NO" if failed else "-" if "skipped" in tags else "yes"
    return found


def page(runs: list[dict[tuple[str, str], str]]) -> str:
    """The page."""
    lines = [HEAD]
    header = ["", *BACKENDS]
    for method, arguments in ARGUMENTS.items():
        rows = []
        for argument, test in arguments.items():
            section, _, row = test.partition(" ")
            keys = [(section, row), (test, method), (section, "")]
            rows.append(
                [
                    f"`{argument}`",
                    *(next((r[k] for k in keys if k in r), "NO") for r in runs),
                ]
            )
        lines += [f"## Arguments of `{method}`\n", table(header, rows)]
    for title, section in SECTIONS:
        names = dict.fromkeys(r for run in runs for s, r in run if s == section)
        rows = [[n, *(run.get((section, n), "-") for run in runs)] for n in names]
        lines += [f"## {title}\n", table(header, rows)]
    return "\n".join(lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    bar = ["---"] + ["---"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, bar, *rows]) + "\n"


if __name__ == "__main__":
    print(page([outcomes(Path(name)) for name in sys.argv[1:]]), end="")
