"""`auto` measures on a copy, chooses by the time that remains, and remembers."""

import json

import keras
import numpy as np
import pytest

from loopscope import Loop, choose
from loopscope.choose import Trial
from loopscope.events import Compiled, GearChosen
from loopscope.gear import FUSED_GRAPH, FUSED_XLA, GRAPH, XLA
from models import (
    COMPILED,
    FUSED,
    GEARS,
    STEP,
    TENSORFLOW,
    Batches,
    all_kinds_loop,
    blobs,
    classes,
    fresh,
    numbers,
    small_loop,
)

FAST, SLOW = Trial(1e-4, 0.1), Trial(1e-2, 0.1)


def chosen_event(loop, call):
    events = []

    def listen(event):
        if isinstance(event, GearChosen):
            events.append(event)

    loop.subscribe(listen)
    call()
    loop.unsubscribe(listen)
    assert len(events) == 1
    return events[0]


def prepared(loop, *, rows=64, epochs=1, make=blobs):
    """Let `loop` choose for a training, without training."""
    source = loop.source(*make(rows), batch_size=8)
    return loop.prepare("train", source, epochs_left=epochs)


def table(loop, trials, *, rows=64):
    """Put measurements by hand where `auto` finds them."""
    source = loop.source(*blobs(rows), batch_size=8)
    loop._stage("train")
    if not loop.model.optimizer.built:
        loop.model.optimizer.build(loop.model.trainable_variables)
    loop._runner.trace("train", source.specs)
    choose._remember(choose._signature(loop._runner, source), trials)


# Trials leave nothing behind.


def test_trials_leave_state_metrics_and_random_numbers_untouched():
    loop = fresh(all_kinds_loop, "auto")
    x, y = numbers(64, 6, 6, 1), classes(64, 3)
    source = loop.source(x, y, batch_size=8)
    loop._stage("train")
    loop.model.optimizer.build(loop.model.trainable_variables)
    loop._runner.trace("train", source.specs)
    before = loop.state.sha256()
    gear = loop.prepare("train", source, epochs_left=50)
    assert gear.name in COMPILED
    assert loop.state.sha256() == before
    assert (loop.step, loop._runner.finished) == (0, 0)


def test_a_training_of_auto_ends_in_the_bits_of_the_gear_it_chose():
    x, y = numbers(60, 6, 6, 1), classes(60, 3)
    loop = fresh(all_kinds_loop, "auto")
    loop.fit(x, y, batch_size=8, epochs=2, verbose=0)
    other = fresh(all_kinds_loop, loop.gear.name)
    other.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert loop.state.sha256() == other.state.sha256()
    assert loop.step == 16


def test_a_sample_of_a_stream_is_trained_on_all_the_same():
    x, y = blobs(64)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    loop = fresh(small_loop, "auto")
    loop.fit((batch for batch in batches), verbose=0)
    other = fresh(small_loop, loop.gear.name)
    other.fit(Batches(batches), verbose=0)
    assert loop.state.sha256() == other.state.sha256()
    assert loop.step == 8


def test_auto_says_what_it_chose_and_why_in_one_line():
    loop = fresh(small_loop, "auto")
    event = chosen_event(loop, lambda: loop.fit(*blobs(64), batch_size=8, verbose=0))
    assert event.gear == loop.gear.name in COMPILED
    assert event.reason.startswith(f"{event.gear} for 8 steps (measured: ")
    assert "ms/step" in event.reason
    assert "\n" not in event.reason
    assert event.wall_s > 0
    assert event.gear in event.measured
    assert all(seconds > 0 for seconds in event.measured.values())


def test_auto_chooses_once_and_keeps_its_programs():
    loop = fresh(small_loop, "auto")
    loop.fit(*blobs(64), batch_size=8, verbose=0)
    later = []
    loop.subscribe(later.append)
    loop.fit(*blobs(64), batch_size=8, epochs=2, verbose=0)
    assert not [e for e in later if isinstance(e, (GearChosen, Compiled))]


def test_an_own_step_can_be_chosen_for():
    loop = fresh(small_loop, "auto")

    @loop.train_step
    def train_step(x, y):
        return {"loss": Loop.train_step(loop, x, y)}

    loop.fit(*blobs(64), batch_size=8, verbose=0)
    assert loop.gear.name in COMPILED
    assert int(loop.model.optimizer.iterations) == 8


@pytest.mark.skipif(not TENSORFLOW, reason="JAX has no operation that raises")
@pytest.mark.parametrize("open_loop", [False, True])
def test_a_step_that_raises_under_auto_leaves_the_steps_before_it(open_loop):
    import tensorflow as tf

    loop = fresh(small_loop, "auto")

    @loop.train_step
    def train_step(x, y):
        # On some CPUs a fused ReLU hides the NaN of x from the loss: add x.
        loss = Loop.train_step(loop, x, y) + tf.reduce_sum(x)
        return tf.debugging.check_numerics(loss, "the loss is not finite")

    x, y = blobs(64)
    x = x.copy()
    x[40] = np.nan

    def train():
        if open_loop:
            for epoch in loop.epochs(1):
                list(epoch.train((x, y), batch_size=8, shuffle=False, every=None))
        else:
            loop.fit(x, y, batch_size=8, shuffle=False, verbose=0)

    with pytest.raises(tf.errors.InvalidArgumentError, match="not finite"):
        train()
    assert loop.step == int(loop.model.optimizer.iterations) == 5


# The cache.


def cached(folder):
    return json.loads((folder / "gears.json").read_text())


def test_a_choice_is_written_and_used_by_the_next_loop(cache_folder):
    loop = fresh(small_loop, "auto")
    first = chosen_event(loop, lambda: loop.fit(*blobs(64), batch_size=8, verbose=0))
    assert len(cached(cache_folder)) == 1
    again = fresh(small_loop, "auto")
    second = chosen_event(again, lambda: again.fit(*blobs(64), batch_size=8, verbose=0))
    assert "(measured before: " in second.reason
    assert second.measured.items() >= first.measured.items()


def test_what_was_measured_before_is_not_measured_again():
    loop = fresh(small_loop, "auto")
    table(loop, {name: Trial(1e-3, 0.1) for name in COMPILED})
    compiled = []
    loop.subscribe(lambda e: compiled.append(e) if isinstance(e, Compiled) else None)
    event = chosen_event(loop, lambda: prepared(loop))
    assert compiled == []
    assert dict(event.measured) == dict.fromkeys(COMPILED, 1e-3)


def test_another_model_is_measured_by_itself(cache_folder):
    for features in (4, 5):
        model = keras.Sequential([keras.Input((features,)), keras.layers.Dense(3)])
        loop = small_loop("auto", model=model)
        x, y = blobs(64, features=features)
        loop.fit(x, y, batch_size=8, verbose=0)
    assert len(cached(cache_folder)) == 2


def test_another_batch_size_is_measured_by_itself(cache_folder):
    for size in (8, 16):
        fresh(small_loop, "auto").fit(*blobs(64), batch_size=size, verbose=0)
    assert len(cached(cache_folder)) == 2


def test_the_cache_can_be_bypassed_by_an_argument(cache_folder):
    loop = fresh(small_loop, "auto", cache=False)
    loop.fit(*blobs(64), batch_size=8, verbose=0)
    assert not list(cache_folder.iterdir())


def test_the_cache_can_be_bypassed_by_the_environment(cache_folder, monkeypatch):
    monkeypatch.setenv("LOOPSCOPE_CACHE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))
    loop = fresh(small_loop, "auto")
    event = chosen_event(loop, lambda: loop.fit(*blobs(64), batch_size=8, verbose=0))
    assert "(measured: " in event.reason
    assert not list(cache_folder.iterdir())


def test_the_cache_lies_in_the_users_cache_folder_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("LOOPSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choose._cache_file() == tmp_path / "loopscope" / "gears.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose._cache_file() == tmp_path / ".cache" / "loopscope" / "gears.json"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        '"words"',
        "\x00\xff",
        '{"KEY": 3}',
        '{"KEY": {"STEP": 3}}',
        '{"KEY": {"STEP": [1]}}',
        '{"KEY": {"warp": [1, 2]}}',
        '{"KEY": {"STEP": ["a", "b"]}}',
        '{"KEY": {"STEP": [null, 1]}}',
    ],
)
def test_a_broken_cache_is_ignored(content, cache_folder):
    loop = fresh(small_loop, "auto")
    table(loop, {})
    file = cache_folder / "gears.json"
    key = next(iter(cached(cache_folder)))
    file.write_text(content.replace("KEY", key).replace("STEP", STEP), "latin-1")
    event = chosen_event(loop, lambda: loop.fit(*blobs(64), batch_size=8, verbose=0))
    assert "(measured: " in event.reason
    assert key in cached(cache_folder)


def test_a_cache_that_cannot_be_written_is_only_slower(cache_folder, monkeypatch):
    (cache_folder / "file").write_text("in the way")
    monkeypatch.setenv("LOOPSCOPE_CACHE", str(cache_folder / "file"))
    loop = fresh(small_loop, "auto")
    loop.fit(*blobs(64), batch_size=8, verbose=0)
    assert loop.gear.name in COMPILED


# The decision, from measurements made by hand.


def test_the_gear_that_ends_first_is_chosen_compiling_included():
    # What was measured before has still to be compiled in this process.
    trials = dict.fromkeys(COMPILED, SLOW)
    trials[STEP] = Trial(1e-3, 0.1)
    trials["fused-xla"] = Trial(1e-4, 5.0)
    for epochs, expected in ((1, STEP), (100_000, "fused-xla")):
        loop = fresh(small_loop, "auto")
        table(loop, trials)
        assert prepared(loop, epochs=epochs).name == expected


def test_a_ragged_epoch_counts_compiling_twice():
    # 60 rows are 7 batches of 8 and one of 4: two programs.
    trials = dict.fromkeys(COMPILED, SLOW)
    trials[STEP] = Trial(1e-3, 0.0)
    trials["fused-xla"] = Trial(1e-4, 0.6)
    for rows, steps, expected in ((64, 1000, "fused-xla"), (60, 1000, STEP)):
        loop = fresh(small_loop, "auto")
        table(loop, trials, rows=rows)
        assert prepared(loop, rows=rows, epochs=steps // 8).name == expected


def tried(monkeypatch, trials, *, steps):
    """The gears that are tried, in order, where measuring gives these figures."""
    order = []

    def measure(runner, gear, segment, *, best_s):
        order.append(gear.name)
        if trials[gear.name] is None:
            raise RuntimeError("this gear cannot run the step")
        return trials[gear.name]

    monkeypatch.setattr(choose, "measure", measure)
    loop = fresh(small_loop, "auto")
    event = chosen_event(loop, lambda: prepared(loop, epochs=steps // 8))
    return order, event.gear


def test_the_riskiest_gear_is_tried_last(monkeypatch):
    trials = {
        "graph": Trial(1e-3, 0.1),
        "fused-graph": Trial(9e-4, 0.1),
        "xla": Trial(6e-4, 0.5),
        "fused-xla": Trial(1e-4, 0.5),
    }
    order, gear = tried(monkeypatch, trials, steps=1_000_000)
    assert order == [name for name in trials if name in COMPILED]
    assert gear == "fused-xla"


def test_a_short_training_tries_the_plain_gear_only(monkeypatch):
    trials = {name: Trial(1e-3, 0.5) for name in COMPILED}
    assert tried(monkeypatch, trials, steps=8) == ([STEP], STEP)


def test_a_gear_is_not_tried_where_compiling_it_could_cost_too_much(monkeypatch):
    # Compiling the plain gear took a minute: a fused loop may take longer still.
    trials = dict.fromkeys(COMPILED, Trial(1e-4, 60.0))
    order, gear = tried(monkeypatch, trials, steps=20_000)
    assert (order, gear) == ([STEP], STEP)


def test_a_gear_that_cannot_run_the_step_is_no_choice(monkeypatch):
    trials = dict.fromkeys(COMPILED)
    trials[STEP] = Trial(1e-3, 0.1)
    order, gear = tried(monkeypatch, trials, steps=1_000_000)
    assert len(order) > 1
    assert gear == STEP


@pytest.mark.skipif(not TENSORFLOW, reason="graphs are TensorFlow's")
def test_fused_xla_is_not_tried_where_xla_has_lost(monkeypatch):
    trials = {
        "graph": Trial(1e-2, 0.5),
        "fused-graph": Trial(9.9e-3, 0.5),
        "xla": Trial(5e-2, 2.0),
        "fused-xla": Trial(1.0, 20.0),
    }
    order, gear = tried(monkeypatch, trials, steps=1_000_000)
    assert order == ["graph", "fused-graph", "xla"]
    assert gear == "fused-graph"


def test_a_trial_that_is_losing_ends_early():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(64)
    source = loop.source(x, y, batch_size=8)
    loop.prepare("train", source)
    gear = loop.gear
    segment = source.sample()
    choose.measure(loop._runner, gear, segment, best_s=None)
    calls = []
    run = loop._runner.run

    def counting(phase, gear, part):
        calls.append(part.steps)
        return run(phase, gear, part)

    loop._runner.run = counting
    choose.measure(loop._runner, gear, segment, best_s=1e-12)
    losing = len(calls)
    calls.clear()
    choose.measure(loop._runner, gear, segment, best_s=None)
    assert losing < len(calls)


def test_what_xla_hopes_for_is_half_and_what_fusing_saves_is_a_call():
    trials = {"graph": Trial(2e-3, 0.4)}
    assert choose._forecast(XLA, trials) == (1e-3, pytest.approx(4.4))
    assert choose._forecast(FUSED_GRAPH, trials) == (
        pytest.approx(5e-4),
        pytest.approx(0.6),
    )
    assert choose._forecast(FUSED_XLA, trials) == (float("inf"), 0.0)
    trials |= {"fused-graph": Trial(1.5e-3, 0.4), "xla": Trial(1e-3, 2.0)}
    assert choose._forecast(XLA, trials) == (pytest.approx(5e-4), pytest.approx(4.4))
    assert choose._forecast(FUSED_XLA, trials) == (pytest.approx(2e-4), 4.0)
    alone = {"xla": Trial(1e-3, 2.0)}
    assert choose._forecast(FUSED_XLA, alone) == (pytest.approx(5e-4), 4.0)


def test_tests_run_without_xla_where_it_pays_only_just():
    trials = {"graph": Trial(1e-3, 0.2), "fused-xla": Trial(1e-4, 2.0)}
    assert choose._test_gear("fused-xla", trials, 5_000) == GRAPH
    assert choose._test_gear("fused-xla", trials, 1_000_000) == FUSED_XLA
    trials["fused-graph"] = Trial(5e-4, 0.2)
    assert choose._test_gear("fused-xla", trials, 5_000) == FUSED_GRAPH
    assert choose._test_gear("graph", trials, 5_000) == GRAPH
    assert choose._test_gear("fused-xla", {"xla": SLOW, "fused-xla": FAST}, 9) == (
        FUSED_XLA
    )


def test_the_reason_says_when_compiling_with_xla_does_not_pay():
    trials = {"graph": Trial(1e-3, 0.2), "xla": Trial(2e-3, 2.0)}

    def reason(*given, **more):
        return choose._in_a_line(choose._because(*given, **more))

    assert reason("graph", trials, 1500, False) == (
        "graph for 1,500 steps (measured: graph 1 ms/step, xla 2 ms/step), about 1.7 s;"
        " compiling with XLA does not pay here"
    )
    faster = {"graph": Trial(1e-3, 0.2), "fused-xla": Trial(2e-4, 1.0)}
    assert reason("fused-xla", faster, 10_000, False, copies=2) == (
        "fused-xla for 10,000 steps (measured: graph 1 ms/step, fused-xla 0.2 ms/step),"
        " about 4 s, ahead of graph after 2,000 steps"
    )
    assert reason("xla", {"xla": FAST}, None, True) == (
        "xla for an unknown number of steps (measured before: xla 0.1 ms/step)"
    )


def test_a_stream_of_unknown_length_can_be_chosen_for():
    loop = fresh(small_loop, "auto")
    batches = Batches([blobs(8)] * 12)
    event = chosen_event(loop, lambda: loop.fit(batches, verbose=0))
    assert "for an unknown number of steps" in event.reason


def test_auto_is_never_eager_where_a_step_can_be_traced():
    loop = fresh(small_loop, "auto")
    loop.fit(*blobs(8), batch_size=8, verbose=0)
    assert loop.gear.name in COMPILED
    assert "eager" in GEARS
