"""The same seed gives the same bits; and nothing is compiled twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from loopscope.events import Compiled
from models import (
    BRIEF,
    COMPILED,
    FUSED,
    TORCH,
    Batches,
    all_kinds_loop,
    blobs,
    classes,
    fresh,
    numbers,
    small_loop,
)

HERE = Path(__file__).parent


def trained(gear, *, seed=0, rows=24):
    """State and history of two epochs with convolution, Dropout and an order."""
    loop = fresh(all_kinds_loop, gear, seed=seed)
    history = loop.fit(
        numbers(rows, 6, 6, 1), classes(rows, 3), batch_size=8, epochs=2, verbose=0
    )
    return loop.state.sha256(), history.history


def python(program, **environment):
    """Run a program in a process of its own, with the models of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("gear", BRIEF)
def test_the_same_seed_gives_the_same_bits_twice_in_a_process(gear):
    assert trained(gear) == trained(gear)


@pytest.mark.slow_on_jax
def test_the_same_seed_gives_the_same_bits_in_two_processes():
    program = (
        "import json; from test_bits import trained; from models import COMPILED;"
        "print(json.dumps({g: trained(g)[0] for g in COMPILED[:2]}))"
    )
    elsewhere = json.loads(python(program))
    assert elsewhere == {gear: trained(gear)[0] for gear in COMPILED[:2]}


def test_another_seed_of_the_loop_gives_another_order_and_other_bits():
    assert trained(FUSED, seed=0)[0] != trained(FUSED, seed=1)[0]


def test_epochs_have_orders_of_their_own():
    loop = small_loop(optimizer=keras.optimizers.SGD(0.0))
    x, y = blobs(64)
    losses = []
    for epoch in loop.epochs(2):
        steps = epoch.train((x, y), batch_size=8)
        losses.append([step.loss for step in steps])
    assert losses[0] != losses[1]
    assert np.mean(losses[0]) == pytest.approx(np.mean(losses[1]), rel=1e-5)


def test_going_on_is_the_same_as_never_having_stopped():
    x, y = numbers(32, 6, 6, 1), classes(32, 3)
    whole = fresh(all_kinds_loop, FUSED)
    whole.fit(x, y, batch_size=8, epochs=4, verbose=0)
    parts = fresh(all_kinds_loop, FUSED)
    parts.fit(x, y, batch_size=8, epochs=1, verbose=0)
    parts.fit(x, y, batch_size=8, epochs=4, initial_epoch=1, verbose=0)
    assert parts.state.sha256() == whole.state.sha256()


def compiled_events(loop, fit):
    events = []

    def listen(event):
        if isinstance(event, Compiled):
            events.append(event)

    loop.subscribe(listen)
    fit()
    loop.unsubscribe(listen)
    return events


@pytest.mark.parametrize("gear", COMPILED)
def test_a_ragged_tail_compiles_once_a_training_and_says_what_changed(gear):
    loop = fresh(small_loop, gear)
    x, y = blobs(30)
    weight = np.ones(30, "float32")
    events = compiled_events(
        loop,
        lambda: loop.fit(x, y, sample_weight=weight, batch_size=8, epochs=4, verbose=0),
    )
    assert [event.changed for event in events] == [
        (),
        (
            "x: float32[8, 4] -> float32[6, 4]",
            "y: int32[8] -> int32[6]",
            "sample_weight: float32[8] -> float32[6]",
        ),
    ]
    assert {(event.phase, event.gear) for event in events} == {("train", gear)}


def test_a_ragged_tail_of_a_stream_compiles_once_a_training():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(30)
    stream = Batches((x[i : i + 8], y[i : i + 8]) for i in range(0, 30, 8))
    events = compiled_events(loop, lambda: loop.fit(stream, epochs=4, verbose=0))
    assert [bool(event.changed) for event in events] == [False, True]


def test_named_inputs_are_named_in_the_event():
    def make(gear):
        a, b = keras.Input((2,), name="left"), keras.Input((3,), name="right")
        both = keras.layers.Concatenate()([a, b])
        model = keras.Model({"left": a, "right": b}, keras.layers.Dense(1)(both))
        return small_loop(gear, model=model, loss="mse", metrics=None)

    loop = fresh(make, FUSED)
    x = {"left": numbers(12, 2), "right": numbers(12, 3)}
    events = compiled_events(
        loop, lambda: loop.fit(x, numbers(12, 1), batch_size=8, verbose=0)
    )
    assert events[1].changed == (
        "x['left']: float32[8, 2] -> float32[4, 2]",
        "x['right']: float32[8, 3] -> float32[4, 3]",
        "y: float32[8, 1] -> float32[4, 1]",
    )


def test_another_dtype_is_named_in_the_event():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(32)
    loop.fit(x, y, batch_size=8, verbose=0)
    events = compiled_events(
        loop, lambda: loop.fit(x, y.astype("uint8"), batch_size=8, verbose=0)
    )
    assert [event.changed for event in events] == [("y: int32[8] -> uint8[8]",)]


@pytest.mark.parametrize("gear", COMPILED)
def test_chunks_of_any_length_run_on_one_program(gear):
    loop = fresh(small_loop, gear)
    x, y = blobs(96)

    def fit():
        for most in (12, 5, 1, 7):
            listener = {"train": most}, [].append
            loop.subscribe(listener[1], chunk_steps=listener[0])
            loop.fit(x, y, batch_size=8, verbose=0)
            loop.unsubscribe(listener[1], chunk_steps=listener[0])

    assert [event.changed for event in compiled_events(loop, fit)] == [()]


def test_a_second_training_and_an_evaluation_between_compile_nothing_new():
    loop = fresh(small_loop, FUSED)
    x, y = blobs(32)

    def both():
        loop.fit(x, y, batch_size=8, validation_data=(x, y), verbose=0)

    assert [e.phase for e in compiled_events(loop, both)] == ["train", "test"]
    assert compiled_events(loop, both) == []
    loop.evaluate(x, y, batch_size=8, verbose=0)
    assert compiled_events(loop, both) == []


@pytest.mark.slow
@pytest.mark.skipif(TORCH, reason="without XLA")
def test_xla_itself_compiles_nothing_after_the_first_epoch(tmp_path):
    """Counted by the files that XLA writes, one for each module it compiles."""
    program = """
import os
from pathlib import Path
import keras
from models import COMPILED, blobs, fresh, small_loop
from loopscope.gear import GEARS

def modules():
    folder = Path(os.environ["DUMP"])
    return len(list(folder.glob("*before_optimizations.txt")))

x, y = blobs(60)
counts = {}
for name in COMPILED:
    if not GEARS[name].jit_compile:
        continue
    loop = fresh(small_loop, name)
    loop.fit(x, y, batch_size=8, epochs=2, verbose=0)
    first = modules()
    for most in (7, 1, 3):
        loop.subscribe(print, chunk_steps={"train": most})
        loop.fit(x, y, batch_size=8, epochs=2, verbose=0)
        loop.unsubscribe(print, chunk_steps={"train": most})
    counts[name] = (first > 0, modules() - first)
print(sorted(counts.items()))
"""
    printed = python(
        program,
        DUMP=str(tmp_path),
        XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    )
    expected = {"fused-xla": (True, 0), "xla": (True, 0)}
    assert printed == str(sorted(expected.items()))
