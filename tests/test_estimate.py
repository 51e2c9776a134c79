"""How long a training will take is said before it begins, and nothing is trained."""

import keras
import pytest

from loopscope import Loop, estimate
from loopscope.choose import Trial, break_even, in_words
from loopscope.errors import DataError, GearError, UsageError
from models import FUSED, STEP, Batches, blobs, fresh, small_loop

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

TRIALS = {
    "eager": Trial(1e-2, 0.0),
    "graph": Trial(1e-3, 0.2),
    "fused-graph": Trial(5e-4, 0.3),
    "xla": Trial(2e-3, 1.0),
    "fused-xla": Trial(2e-4, 1.5),
}


@pytest.fixture
def by_hand(monkeypatch):
    """Each gear takes what `TRIALS` says; gives the calls of `measure`."""
    calls = []

    def measure(runner, gear, segment, *, best_s=None, phase="train"):
        calls.append((phase, gear.name))
        return Trial(1e-3, 0.5) if phase == "test" else TRIALS[gear.name]

    monkeypatch.setattr(estimate, "measure", measure)
    monkeypatch.setattr("loopscope.choose.measure", measure)
    return calls


def gears(found):
    return {g.gear: g for g in found.gears}


def test_the_times_add_up(by_hand):
    loop = fresh(small_loop, FUSED)
    x, y = blobs(60)
    found = loop.estimate(x, y, batch_size=8, epochs=100, validation_data=blobs(8))
    assert (found.steps, found.epochs, found.chosen) == (800, 100, FUSED)
    # The ragged last batch is compiled as well.
    fused, plain = TRIALS[FUSED], TRIALS[STEP]
    assert gears(found)[FUSED].compile_s == 2 * fused.compile_s
    assert found.validation_s == pytest.approx(0.5 + 100 * 1e-3)
    assert found.total_s == pytest.approx(
        2 * fused.compile_s + 800 * fused.step_s + found.validation_s
    )
    assert list(gears(found)) == [STEP, FUSED]
    paid = gears(found)[FUSED].break_even_steps
    behind = 2 * (fused.compile_s - plain.compile_s)
    assert paid == pytest.approx(behind / (plain.step_s - fused.step_s), abs=1)
    assert gears(found)[STEP].break_even_steps == 0
    assert by_hand == [("train", STEP), ("train", FUSED), ("test", FUSED)]


def test_whether_compiling_pays_at_all_can_be_asked(by_hand):
    loop = fresh(small_loop, "auto")
    found = loop.estimate(
        *blobs(64), batch_size=8, epochs=9, gears=["fused-xla", "eager"]
    )
    assert list(gears(found)) == ["eager", "fused-xla"]
    assert gears(found)["fused-xla"].break_even_steps == 154
    assert found.chosen == "eager"
    assert loop.gear is None


def test_auto_says_what_it_would_take_and_does_not_take_it_yet(by_hand):
    loop = fresh(small_loop, "auto")
    found = loop.estimate(*blobs(64), batch_size=8, epochs=5000)
    assert found.total_s == min(g.total_s for g in found.gears)
    assert found.reason.startswith(f"{found.chosen} for 40,000 steps (measured: ")
    assert f"ahead of {STEP} after" in found.reason
    assert loop.gear is None
    assert loop.choice is None


def test_a_stream_of_unknown_length_has_a_break_even_and_no_total(by_hand):
    loop = fresh(small_loop, FUSED)
    found = loop.estimate(Batches([blobs(8)] * 6))
    assert (found.steps, found.total_s) == (None, None)
    assert gears(found)[FUSED].break_even_steps > 0
    assert "an unknown number of steps" in str(found)


def test_it_prints_as_a_table(by_hand):
    loop = fresh(small_loop, FUSED)
    found = loop.estimate(
        *blobs(64), batch_size=8, epochs=1000, validation_data=blobs(8)
    )
    first, head, plain, fused = str(found).splitlines()
    assert first.startswith("8,000 steps in 1,000 epochs: about ")
    assert f"in {FUSED}, 1.5 s of it validation" in first
    assert head.split()[:3] == ["gear", "compile", "s"]
    assert head.endswith(f"ahead of {STEP} after")
    assert plain.split()[0] == STEP
    assert fused.startswith(f"{FUSED} *")
    assert fused.endswith(" steps")
    assert found.as_dict()["gears"][1]["gear"] == FUSED


def test_measuring_leaves_the_loop_as_it_was():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(64)
    data = {"batch_size": 8, "verbose": 0, "validation_data": blobs(16)}
    loop.fit(x, y, **data)
    before = loop.standing()
    state = loop.state.sha256()
    found = loop.estimate(x, y, batch_size=8, epochs=3, validation_data=blobs(16))
    assert found.total_s > 0
    assert all(g.step_s > 0 and g.compile_s > 0 for g in found.gears)
    assert loop.state.sha256() == state
    after = loop.standing()
    assert (after.step, after.cursor, after.gear) == (8, before.cursor, FUSED)
    loop.fit(x, y, **data)
    other = fresh(small_loop, FUSED)
    for _ in range(2):
        other.fit(x, y, **data)
    assert loop.state.sha256() == other.state.sha256()


def test_what_a_generator_gives_is_trained_on_all_the_same():
    x, y = blobs(64)
    batches = ((x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8))
    loop = fresh(small_loop, FUSED)
    source = loop.source(batches)
    loop.estimate(source)
    loop.fit(source, verbose=0)
    assert loop.step == 8


def test_what_cannot_be_estimated_is_refused():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(16)
    with pytest.raises(GearError, match="Unknown gear"):
        loop.estimate(x, y, gears=["warp"])
    with pytest.raises(GearError, match="names of gears"):
        loop.estimate(x, y, gears=["auto"])
    with pytest.raises(UsageError, match="epochs"):
        loop.estimate(x, y, epochs=0)
    with pytest.raises(DataError):
        loop.estimate(x[:, :2], y)
    assert isinstance(loop, Loop)
    assert isinstance(loop.model, keras.Model)


def test_a_gear_is_ahead_from_where_its_compiling_has_paid():
    slow, fast = Trial(1e-3, 0.0), Trial(5e-4, 1.0)
    assert break_even(fast, slow, 1) == 2000
    assert break_even(fast, slow, 2) == 4000
    assert break_even(slow, fast, 1) is None
    assert break_even(fast, fast, 1) == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "0.012 s"), (2.74, "2.7 s"), (45.6, "46 s"), (600, "10 min"),
     (7300, "2.0 h")],
)  # fmt: skip
def test_times_are_said_in_words(seconds, words):
    assert in_words(seconds) == words
