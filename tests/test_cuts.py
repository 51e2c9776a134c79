"""Where chunks are cut changes no bit, in any gear.

The model has convolution, BatchNorm and Dropout. Hypothesis draws the cuts; programs
are kept from one example to the next, so that only the steps have to run.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loopscope.data.feed import Segment
from loopscope.events import ChunkEnd
from loopscope.gear import GEARS as ALL_GEARS
from models import FUSED, GEARS, Batches, all_kinds_loop, classes, fresh, numbers

FUSED_GEARS = [name for name in GEARS if ALL_GEARS[name].fused]
STEPWISE_GEARS = [name for name in GEARS if not ALL_GEARS[name].fused]
STEPS = 12
KEPT = {}

examples = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Trainer:
    """A loop in one gear that can train the same steps again and again."""

    def __init__(self, name, *, streamed=False):
        self.loop = fresh(all_kinds_loop, name)
        self.name = name
        x, y = numbers(STEPS * 4, 6, 6, 1), classes(STEPS * 4, 3)
        data = (x, y)
        if streamed:
            data = (Batches((x[i : i + 4], y[i : i + 4]) for i in range(0, len(x), 4)),)
        self.source = self.loop.source(*data, batch_size=None if streamed else 4)
        self.loop.prepare("train", self.source)
        self.start = self.loop.state.snapshot()
        self.whole = self.train([STEPS])

    def train(self, lengths):
        """Every bit of `STEPS` steps in chunks of these lengths."""
        self.loop.state.restore(self.start)
        data = self.source.open(0)
        outputs = []
        try:
            for length in lengths:
                while length:
                    segment = data.take(length)
                    done = self.loop._runner.run("train", ALL_GEARS[self.name], segment)
                    outputs.append(done.outputs)
                    length -= segment.steps
        finally:
            data.close()
        joined = {k: np.concatenate([o[k] for o in outputs]) for k in outputs[0]}
        return {
            "state": self.loop.state.sha256(),
            **{k: v.tobytes() for k, v in joined.items()},
        }


def trainer(name):
    if name not in KEPT:
        KEPT.clear()
        KEPT[name] = Trainer(name)
    return KEPT[name]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    yield
    KEPT.clear()


@st.composite
def cuts(draw):
    places = draw(st.sets(st.integers(1, STEPS - 1)))
    edges = [0, *sorted(places), STEPS]
    return [b - a for a, b in pairwise(edges)]


@pytest.mark.parametrize("name", FUSED_GEARS)
@examples
@given(lengths=cuts())
@example(lengths=[1] * STEPS)
@example(lengths=[1, STEPS - 1])
@example(lengths=[STEPS - 1, 1])
def test_state_and_every_output_do_not_depend_on_the_cuts(name, lengths):
    kept = trainer(name)
    assert kept.train(lengths) == kept.whole


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow_on_jax) if name == "eager" else name
        for name in STEPWISE_GEARS
    ],
)
@settings(examples, max_examples=4)
@given(lengths=cuts())
def test_gears_that_run_single_steps_do_not_depend_on_them_either(name, lengths):
    kept = trainer(name)
    assert kept.train(lengths) == kept.whole


@pytest.mark.parametrize("name", FUSED_GEARS)
def test_any_segment_of_a_feed_can_be_run_by_itself(name):
    kept = trainer(name)
    segment = kept.source.open(0).take(STEPS)
    gear = ALL_GEARS[name]
    kept.loop.state.restore(kept.start)
    losses, states = [], [kept.start]
    for index in range(STEPS):
        part = Segment(segment.feed, index, index + 1)
        losses.append(kept.loop._runner.run("train", gear, part).outputs["loss"][0])
        states.append(kept.loop.state.snapshot())
    assert np.array(losses).tobytes() == kept.whole["loss"]
    kept.loop.state.restore(states[7])
    part = Segment(segment.feed, 7, 10)
    again = kept.loop._runner.run("train", gear, part).outputs["loss"]
    np.testing.assert_array_equal(again, losses[7:10])


def test_dropout_and_batchnorm_have_moved_in_what_is_compared():
    kept = trainer(FUSED)
    kept.loop.state.restore(kept.start)
    before = kept.loop.state.numpy()
    kept.train([STEPS])
    after = kept.loop.state.numpy()
    for word in ("seed_generator", "moving_variance", "conv2d/kernel"):
        paths = [path for path in before if word in path]
        assert paths
        assert all(not np.array_equal(before[p], after[p]) for p in paths)


@settings(examples, max_examples=10)
@given(most=st.integers(1, STEPS), every=st.one_of(st.none(), st.integers(1, STEPS)))
def test_listeners_and_the_body_of_an_open_loop_cut_without_changing_a_bit(most, every):
    kept = trainer(FUSED)
    kept.loop.state.restore(kept.start)
    seen = []
    kept.loop.subscribe(seen.append, chunk_steps={"train": most})
    try:
        for epoch in kept.loop.epochs(1):
            for _ in epoch.train(kept.source, every=every):
                pass
    finally:
        kept.loop.unsubscribe(seen.append, chunk_steps={"train": most})
    chunks = [event for event in seen if isinstance(event, ChunkEnd)]
    assert sum(chunk.steps for chunk in chunks) == STEPS
    assert max(chunk.steps for chunk in chunks) <= most
    if every is not None:
        last_steps = {chunk.index + chunk.steps - 1 for chunk in chunks}
        assert set(range(0, STEPS, every)) <= last_steps
    losses = np.concatenate([chunk.outputs["loss"] for chunk in chunks])
    assert losses.tobytes() == kept.whole["loss"]
    assert kept.loop.state.sha256() == kept.whole["state"]


@pytest.mark.parametrize("name", [FUSED])
def test_a_stream_of_the_same_batches_cut_anywhere_gives_the_same_bits(name):
    kept = Trainer(name, streamed=True)
    for lengths in ([1] * STEPS, [5, 7], [2, 3, 4, 3]):
        assert kept.train(lengths) == kept.whole
