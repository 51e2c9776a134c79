"""Which checkpoints stay: enough to replay any step from, within the disk."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopscope.run.keep import Kept, superfluous

# Numbers alone.
pytestmark = pytest.mark.once


@st.composite
def checkpoints(draw, largest_gap=50):
    gaps = draw(st.lists(st.integers(0, largest_gap), max_size=25))
    step, kept = 0, []
    for number, gap in enumerate(gaps):
        step += gap
        size = draw(st.integers(1, 100))
        pinned = draw(st.sampled_from([False, False, False, True]))
        kept.append(Kept(f"{step}-{number}", step, size, pinned))
    return kept


def size_of(kept):
    return sum(k.size_bytes for k in kept)


def gaps_of(kept):
    return [b.step - a.step for a, b in itertools.pairwise(kept)]


def stays(kept, always):
    """Those that may not go."""
    ends = {0, len(kept) - 2, len(kept) - 1}
    return [k for i, k in enumerate(kept) if i in ends or k.pinned or k.name in always]


@given(
    checkpoints(),
    st.integers(1, 120),
    st.integers(0, 1500),
    st.sets(st.integers(0, 24), max_size=3),
)
def test_what_may_go_is_what_the_steps_and_the_disk_allow(kept, steps, disk, best):
    always = [kept[i].name for i in best if i < len(kept)]
    gone = superfluous(kept, replay_steps=steps, disk_bytes=disk, always=always)
    left = [k for k in kept if k.name not in gone]
    assert len(gone) == len(set(gone)) == len(kept) - len(left)
    assert set(stays(kept, always)) <= set(left)
    # The disk is not exceeded where it need not be.
    if size_of(stays(kept, always)) <= disk:
        assert size_of(left) <= disk
    # A gap too large to replay is made only because the disk forces it.
    made = {*gaps_of(left)} - {*gaps_of(kept)}
    if any(gap > steps for gap in made):
        last = next(k for k in kept if k.name == gone[-1])
        assert size_of(left) + last.size_bytes > disk
    # Nothing stays that nobody needs.
    for i in range(1, len(left) - 2):
        if not left[i].pinned and left[i].name not in always:
            assert left[i + 1].step - left[i - 1].step > steps


@given(checkpoints(), st.integers(1, 120))
def test_on_a_large_disk_every_step_can_be_had_again_within_the_limit(kept, steps):
    gone = superfluous(kept, replay_steps=steps, disk_bytes=10**9)
    left = [k for k in kept if k.name not in gone]
    assert {gap for gap in gaps_of(left) if gap > steps} <= {*gaps_of(kept)}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(20, 100))
def test_thinned_after_each_one_no_gap_grows_too_large_and_few_stay(added, steps):
    kept = [Kept("0", 0, 1)]
    for gap in added:
        step = kept[-1].step + gap
        kept.append(Kept(str(step), step, 1))
        gone = superfluous(kept, replay_steps=steps, disk_bytes=10**9)
        kept = [k for k in kept if k.name not in gone]
        assert max(gaps_of(kept)) <= steps
        assert len(kept) <= 4 + 2 * kept[-1].step / steps


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(4, 12))
def test_on_a_small_disk_those_that_stay_are_spread_over_the_run(added, room):
    kept = [Kept("0", 0, 1)]
    for gap in added:
        step = kept[-1].step + gap
        kept.append(Kept(str(step), step, 1))
        gone = superfluous(kept, replay_steps=1, disk_bytes=room)
        kept = [k for k in kept if k.name not in gone]
        assert len(kept) <= room
        assert kept[0].step == 0
        if len(kept) == room:
            fair = kept[-1].step / (room - 3) + 20
            assert max(gaps_of(kept)) <= 2 * fair


def test_the_smallest_gap_goes_first():
    kept = [Kept(str(step), step, 10) for step in (0, 10, 12, 30, 60, 70)]
    assert superfluous(kept, replay_steps=5, disk_bytes=50) == ["10"]
    assert superfluous(kept, replay_steps=5, disk_bytes=45) == ["10", "12"]
    assert superfluous(kept, replay_steps=12, disk_bytes=99) == ["10"]
    assert superfluous(kept, replay_steps=11, disk_bytes=99) == []
    best = superfluous(kept, replay_steps=5, disk_bytes=50, always=["10"])
    assert best == ["12"]


@pytest.mark.parametrize("count", range(4))
def test_of_three_or_fewer_none_goes(count):
    kept = [Kept(str(i), i, 10) for i in range(count)]
    assert superfluous(kept, replay_steps=100, disk_bytes=1) == []
