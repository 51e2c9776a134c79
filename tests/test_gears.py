"""One step from one state is the same step in every gear; and the words for gears."""

import keras
import numpy as np
import pytest

from loopscope import backend, gear
from loopscope.errors import GearError, LoopscopeError
from loopscope.gear import EAGER, FUSED_GRAPH, FUSED_XLA, GRAPH, XLA, resolve
from models import (
    ALL,
    BATCH,
    COMPILED,
    GEARS,
    TENSORFLOW,
    TORCH,
    all_kinds_loop,
    blobs,
    classes,
    differences,
    fresh,
    gan,
    halved,
    numbers,
    record_gradients,
    relative,
    small_loop,
)

TOLERANCE = 1e-5
TF_GEARS = (GRAPH, FUSED_GRAPH, XLA, FUSED_XLA, EAGER)
TORCH_GEARS = (EAGER, GRAPH)
JAX_GEARS = (XLA, FUSED_XLA, EAGER)


def one_step_in_each_gear(loop, x, y, names=GEARS):
    """`{gear: (outputs, state)}`, each from the same state, in one loop."""
    source = loop.source(x, y, batch_size=BATCH, shuffle=False)
    loop.prepare("train", source)
    before = loop.state.snapshot()
    taken = {}
    for name in names:
        loop.state.restore(before)
        segment = source.open(0).take(1)
        done = loop._runner.run("train", gear.GEARS[name], segment)
        taken[name] = done.outputs, loop.state.numpy()
    return taken


def worst(reference, taken):
    outputs, state = reference
    found = {f"output {k}": relative(outputs[k], taken[0][k]) for k in outputs}
    found.update(differences(state, taken[1]))
    return {path: value for path, value in found.items() if value > TOLERANCE}


@pytest.mark.parametrize("builder", halved(ALL, ids=lambda builder: builder.__name__))
def test_loss_gradients_and_variables_of_a_step_are_those_of_eager(builder):
    make, (x, y) = builder()
    loop = fresh(make, COMPILED[0])
    if builder is not gan:
        record_gradients(loop, x)
    taken = one_step_in_each_gear(loop, x, y)
    gradients = {p: v for p, v in taken["eager"][1].items() if p.startswith("gradient")}
    assert len(gradients) >= 2
    assert all(np.abs(v).max() > 0 for v in gradients.values())
    apart = {name: worst(taken["eager"], taken[name]) for name in COMPILED}
    assert apart == {name: {} for name in COMPILED}


def test_the_built_in_step_is_the_same_in_every_gear_with_weights_and_metrics():
    x, y = blobs(BATCH)
    weights = np.linspace(0.1, 2, BATCH, dtype="float32")
    states = {}
    for name in GEARS:
        loop = fresh(small_loop, name)
        logs = loop.fit(
            x, y, sample_weight=weights, batch_size=BATCH, shuffle=False, verbose=0
        ).history
        assert loop.gear.name == name
        states[name] = {k: v[0] for k, v in logs.items()}, loop.state.numpy()
    apart = {name: worst(states["eager"], states[name]) for name in COMPILED}
    assert apart == {name: {} for name in COMPILED}


def test_gears_that_draw_the_same_random_numbers_agree_on_real_dropout():
    # TensorFlow's XLA draws other Dropout masks than its graph: two families.
    graphs = ["eager", "graph", "fused-graph"]
    families = [graphs, ["xla", "fused-xla"]] if TENSORFLOW else [GEARS]
    x, y = numbers(BATCH, 6, 6, 1), classes(BATCH, 3)
    taken = one_step_in_each_gear(fresh(all_kinds_loop, COMPILED[0]), x, y)
    for first, *others in families:
        assert [worst(taken[first], taken[name]) for name in others] == [{}] * len(
            others
        )


def test_every_gear_of_the_backend_can_be_asked_for_by_name_and_by_object():
    for name in GEARS:
        assert small_loop(name).gear.name == name
        assert small_loop(gear.GEARS[name]).gear.name == name


def test_the_gear_is_unknown_until_auto_has_chosen():
    assert small_loop("auto").gear is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, None),
        ({"jit_compile": "auto"}, None),
        ({"run_eagerly": True}, EAGER),
        ({"run_eagerly": True, "jit_compile": "auto"}, EAGER),
        ({"jit_compile": True}, XLA),
        ({"jit_compile": False}, GRAPH),
        ({"run_eagerly": False}, GRAPH),
        ({"steps_per_execution": 1}, GRAPH),
        ({"steps_per_execution": 8}, FUSED_GRAPH),
        ({"steps_per_execution": 8, "jit_compile": False}, FUSED_GRAPH),
        ({"steps_per_execution": 8, "jit_compile": True}, FUSED_XLA),
    ],
)
def test_a_gear_can_be_said_in_the_words_of_keras(words, expected):
    assert resolve("auto", TF_GEARS, backend="tensorflow", **words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, None),
        ({"run_eagerly": True}, EAGER),
        ({"jit_compile": True}, XLA),
        ({"run_eagerly": False}, XLA),
        ({"steps_per_execution": 8}, FUSED_XLA),
    ],
)
def test_without_graphs_the_words_of_keras_mean_xla(words, expected):
    assert resolve("auto", JAX_GEARS, backend="jax", **words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"run_eagerly": True}, EAGER),
        ({"jit_compile": True}, GRAPH),
        ({"jit_compile": False}, EAGER),
        ({"run_eagerly": False}, GRAPH),
        ({"steps_per_execution": 1}, GRAPH),
    ],
)
def test_without_xla_the_words_of_keras_mean_the_only_compiler(words, expected):
    assert resolve("auto", TORCH_GEARS, backend="torch", **words) == expected
    words.pop("steps_per_execution", None)
    assert expected == resolve(expected, TORCH_GEARS, backend="torch", **words)


@pytest.mark.parametrize("name", list(gear.GEARS))
def test_a_name_and_its_own_triple_do_not_contradict_each_other(name):
    wanted = gear.GEARS[name]
    assert wanted == resolve(
        name,
        TF_GEARS,
        backend="tensorflow",
        run_eagerly=wanted.run_eagerly,
        jit_compile=wanted.jit_compile,
    )


@pytest.mark.parametrize("unknown", ["turbo", "", None, 3, "Eager", ["graph"]])
def test_an_unknown_gear_is_refused_with_the_list(unknown):
    with pytest.raises(GearError) as caught:
        resolve(unknown, JAX_GEARS, backend="jax")
    assert str(caught.value) == (
        "Unknown gear. Expected 'auto' or one of 'xla', 'fused-xla', 'eager' "
        f"(backend 'jax'). Received: gear={unknown!r}"
    )
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LoopscopeError)


@pytest.mark.parametrize("name", ["graph", "fused-graph"])
def test_a_gear_that_the_backend_lacks_is_refused_with_those_it_has(name):
    with pytest.raises(GearError) as caught:
        resolve(name, JAX_GEARS, backend="jax")
    assert str(caught.value) == (
        f"The 'jax' backend has no gear {name!r}. It has: 'xla', 'fused-xla', "
        f"'eager'. Choose one of these, or 'auto'. Received: gear={name!r}"
    )


def test_a_loop_refuses_a_gear_of_another_backend_and_leaves_the_model_uncompiled():
    missing = [name for name in gear.GEARS if name not in GEARS]
    for name in missing:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        why = backend.current().lacking[name]
        with pytest.raises(GearError, match=f"has no gear '{name}': {why}. It has"):
            small_loop(name, model=model)
        assert not model.compiled
    assert bool(missing) != TENSORFLOW


@pytest.mark.parametrize(
    ("name", "words", "text"),
    [
        (
            "xla",
            {"run_eagerly": True},
            "Gear 'xla' means run_eagerly=False, but run_eagerly=True was given too. "
            "Leave one of the two out.",
        ),
        (
            "graph",
            {"jit_compile": True},
            "Gear 'graph' means jit_compile=False, but jit_compile=True was given too. "
            "Leave one of the two out.",
        ),
        (
            "fused-xla",
            {"jit_compile": False},
            "Gear 'fused-xla' means jit_compile=True, but jit_compile=False was given "
            "too. Leave one of the two out.",
        ),
        (
            "auto",
            {"run_eagerly": True, "jit_compile": True},
            "`run_eagerly=True` and `jit_compile=True` exclude each other. Leave one "
            "of them out.",
        ),
        (
            "auto",
            {"steps_per_execution": 0},
            "`steps_per_execution` must be a whole number of at least 1. Received: "
            "steps_per_execution=0",
        ),
    ],
)
def test_words_that_contradict_each_other_are_refused(name, words, text):
    with pytest.raises(GearError) as caught:
        resolve(name, TF_GEARS, backend="tensorflow", **words)
    assert str(caught.value) == text


@pytest.mark.parametrize("steps", [2.5, "many", True])
def test_steps_per_execution_that_is_no_whole_number_is_refused(steps):
    with pytest.raises(GearError, match="`steps_per_execution` must be a whole number"):
        resolve("auto", TF_GEARS, backend="tensorflow", steps_per_execution=steps)


@pytest.mark.skipif(TORCH, reason="PyTorch has no fused gear")
def test_steps_per_execution_bounds_a_chunk():
    loop = small_loop("auto", steps_per_execution=3)
    sizes = []
    loop.subscribe(lambda event: sizes.append(getattr(event, "steps", None)))
    loop.fit(*blobs(56), batch_size=8, verbose=0)
    assert loop.gear.fused
    assert max(s for s in sizes[1:-1] if s is not None and s < 7) == 3


@pytest.mark.skipif(not TORCH, reason="the others have a fused gear")
def test_several_steps_per_execution_are_refused_where_no_gear_fuses():
    why = "PyTorch's compiler has no loop over steps that changes variables"
    with pytest.raises(GearError, match=f"no gear 'fused-graph': {why}. It has"):
        small_loop("auto", steps_per_execution=3)


def test_a_model_that_asks_for_eager_runs_in_eager():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    loop = small_loop("auto", model=model, loss="mse", metrics=None)
    assert loop.gear == EAGER


def test_the_backend_lists_its_gears_with_the_surest_first():
    gears = backend.current().gears
    assert gears[0] == (GRAPH if TENSORFLOW else EAGER if TORCH else XLA)
    assert TORCH or gears[-1] == EAGER
