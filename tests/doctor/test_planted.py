"""Every planted bug is found and named."""

import keras
import pytest
from planted import BUGS, FAMILIES

from loopscope.doctor.checks import ALL
from models import thinned


def examined(name, family):
    _, plant = BUGS[name]
    loop, data = plant(family)
    options = data[-1] if isinstance(data[-1], dict) else {}
    arrays = data[:-1] if options else data
    if len(arrays) > 1:
        options = {"batch_size": 32, **options}
    return loop.doctor(*arrays, **options)


MEASURED = list(ALL)[list(ALL).index("dropped_state") :]
"""Checks that run and compile more; in the quick suite they are seen by their pages."""


def quick_names():
    later = [n for n, (check, _) in BUGS.items() if check in MEASURED]
    slow = [pytest.param(name, id=name, marks=pytest.mark.slow) for name in later]
    return [*thinned([n for n in BUGS if n not in later], 3), *slow]


# The dense ones in the quick suite; docs/doctor-results.md has all, on both backends.
@pytest.mark.parametrize("name", quick_names())
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=[] if f is FAMILIES[0] else pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_a_planted_bug_is_found_and_named(name, family):
    keras.utils.set_random_seed(0)
    check, _ = BUGS[name]
    examination = examined(name, family)
    found = [f.check for f in examination.findings]
    assert check in found, str(examination)
    assert not examination.failed, examination.failed


def test_there_are_enough_of_them():
    assert len(BUGS) * len(FAMILIES) >= 40
    # One that several devices show is planted in tests/replicas.py.
    elsewhere = {"resuming", "replicas"}
    assert {check for check, _ in BUGS.values()} == set(ALL) - elsewhere
