"""PyTorch: what of a step gets into its graph, and what is refused with the reason."""

import keras
import numpy as np
import pytest
from keras import layers

import loopscope
from loopscope import Loop, backend, choose
from loopscope.errors import TraceError
from models import TORCH, blobs, differences, fresh, small_loop, small_model, warned

if TORCH:
    import torch

pytestmark = pytest.mark.skipif(not TORCH, reason="the others have tests of their own")


def ends(make, rows=24, **options):
    """The state after an epoch of three steps, in gear eager and in gear graph."""
    found = []
    for gear in ("eager", "graph"):
        loop = fresh(make, gear)
        loop.fit(*blobs(rows), batch_size=8, verbose=0, **options)
        found.append(loop.state.numpy())
    return found


def assert_alike(make, **options):
    eager, graph = ends(make, **options)
    apart = differences(eager, graph)
    assert {path: d for path, d in apart.items() if d > 1e-5} == {}
    return eager


def dropping(seed):
    def make(gear):
        model = small_model()
        model.add(layers.Dropout(0.5, seed=seed))
        return small_loop(gear, model=model)

    return make


@pytest.mark.parametrize("seed", [None, 3])
def test_dropout_draws_the_same_masks_in_a_graph(seed):
    state = assert_alike(dropping(seed))
    assert any("seed_generator_state" in path for path in state)


def test_pytorchs_generator_is_part_of_the_state():
    loop = fresh(dropping(None), "eager")
    x, y = blobs(24)
    loop.fit(x, y, batch_size=8, verbose=0)
    before = loop.state.snapshot()
    losses = [loop.fit(x, y, shuffle=False, verbose=0).history["loss"]]
    loop.state.restore(before)
    torch.manual_seed(99)
    loop.state.restore(before)
    losses.append(loop.fit(x, y, shuffle=False, verbose=0).history["loss"])
    assert losses[0] == losses[1]


def drawing(draw):
    def make(gear):
        loop = small_loop(gear)
        model, seeds = loop.model, keras.random.SeedGenerator(5)

        @loop.train_step
        def train_step(x, y):
            noise = draw(keras.ops.shape(x), seeds)

            def compute_loss():
                return model.compute_loss(x, y, model(x + noise, training=True))

            loss, grads = loopscope.value_and_grad(
                compute_loss, model.trainable_variables
            )
            model.optimizer.apply(grads, model.trainable_variables)
            return loss

        return loop

    return make


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(
            lambda shape, seed: (
                keras.random.normal(shape, seed=seed)
                + keras.random.uniform(shape, 1.0, 2.0, seed=seed)
                + keras.random.truncated_normal(shape, dtype="float32", seed=seed)
                + keras.ops.cast(
                    keras.random.randint(shape, 0, 5, seed=seed), "float32"
                )
                + keras.ops.cast(
                    keras.random.categorical(keras.ops.ones(shape), 4, seed=seed),
                    "float32",
                )
            ),
            id="all",
        )
    ],
)
def test_random_numbers_with_a_seed_are_the_same_in_a_graph(draw):
    assert_alike(drawing(draw))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=8.0, dynamic_growth_steps=2
        ),
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    ],
    ids=["loss scaling", "accumulation", "averages"],
)
def test_what_an_optimizer_does_now_and_then_it_does_in_a_graph(optimizer):
    def make(gear):
        return small_loop(gear, optimizer=optimizer())

    assert_alike(make)


def with_backward(*, zero_grad):
    """The step of Keras's own guide to loops on PyTorch."""

    def make(gear):
        loop = small_loop(gear)
        model = loop.model

        @loop.train_step
        def train_step(x, y):
            loss = model.compute_loss(x, y, model(x, training=True))
            if zero_grad:
                model.zero_grad()
            loss.backward()
            variables = model.trainable_weights
            gradients = [v.value.grad for v in variables]
            with torch.no_grad():
                model.optimizer.apply(gradients, variables)
            return loss

        return loop

    return make


def test_a_step_with_backward_runs_in_every_gear():
    assert_alike(with_backward(zero_grad=True))


def test_gradients_that_add_up_have_no_graph():
    loop = fresh(with_backward(zero_grad=False), "graph")
    with pytest.raises(TraceError, match=r"call `model.zero_grad\(\)` in the step"):
        loop.fit(*blobs(24), batch_size=8, verbose=0)
    assert loop.step == 0
    loop = fresh(with_backward(zero_grad=False), "auto")
    with warned("eager, since the step cannot be traced"):
        loop.fit(*blobs(24), batch_size=8, verbose=0)
    assert (loop.gear.name, loop.step) == ("eager", 3)


@pytest.mark.parametrize("zero_grad", [True, False])
def test_the_doctor_finds_gradients_that_add_up(zero_grad):
    loop = fresh(with_backward(zero_grad=zero_grad), "eager")
    found = loop.doctor(*blobs(64), batch_size=8).findings
    adding = [f.message for f in found if f.check == "accumulating"]
    assert bool(adding) != zero_grad
    if adding:
        assert "adds to the gradients of the step before, in 4 variables" in adding[0]


def test_an_optimizer_of_pytorchs_has_no_graph():
    loop = small_loop("graph")
    model = loop.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @loop.train_step
    def train_step(x, y):
        model.zero_grad()
        loss = model.compute_loss(x, y, model(x, training=True))
        loss.backward()
        optimizer.step()
        return loss

    with pytest.raises(TraceError, match=r"torch.optim.SGD changes parameters"):
        loop.fit(*blobs(24), batch_size=8, verbose=0)
    loop.gear = "eager"
    losses = loop.fit(*blobs(24), batch_size=8, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("norm", [False, True])
def test_modules_of_pytorchs_train_in_eager_and_without_buffers_in_a_graph(norm):
    def make(gear):
        inner = [torch.nn.Linear(4, 8), torch.nn.ReLU()]
        inner += [torch.nn.BatchNorm1d(8)] if norm else []
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.TorchModuleWrapper(
                    torch.nn.Sequential(*inner), output_shape=(None, 8)
                ),
                layers.Dense(3),
            ]
        )
        return small_loop(gear, model=model)

    if not norm:
        assert_alike(make)
        return
    with pytest.raises(TraceError, match=r"is a tensor that is no variable of Keras"):
        fresh(make, "graph").fit(*blobs(24), batch_size=8, verbose=0)
    fresh(make, "eager").fit(*blobs(24), batch_size=8, verbose=0)


def test_a_metric_over_thresholds_has_a_graph():
    def make(gear):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        return small_loop(
            gear,
            model=model,
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[keras.metrics.AUC(from_logits=True)],
        )

    x, y = blobs(24, count=2)
    states = []
    for gear in ("eager", "graph"):
        loop = fresh(make, gear)
        loop.fit(x, y, batch_size=8, verbose=0)
        states.append(loop.state.numpy())
    assert max(differences(*states).values()) < 1e-5


def test_a_built_in_step_without_a_graph_runs_in_eager():
    def loss(y_true, y_pred):
        value = keras.ops.mean(keras.ops.square(y_pred - y_true))
        return value * 2 if float(value) > 0 else value

    def make(gear):
        return Loop(
            keras.Sequential([keras.Input((4,)), layers.Dense(1)]),
            optimizer="sgd",
            loss=loss,
            gear=gear,
            seed=0,
        )

    x = blobs(24)[0]
    y = np.ones((24, 1), "float32")
    with pytest.raises(TraceError, match="a number is read in Python"):
        fresh(make, "graph").fit(x, y, batch_size=8, verbose=0)
    histories = []
    for gear in ("eager", "auto"):
        loop = fresh(make, gear)
        with warned("cannot be traced" if gear == "auto" else ""):
            history = loop.fit(x, y, validation_data=(x, y), epochs=2, verbose=0)
        histories.append(history.history)
        assert loop.gear.name == "eager"
    assert histories[0] == histories[1]
    with warned(""):
        assert np.isfinite(fresh(make, "auto").evaluate(x, y, verbose=0))


def test_a_step_that_changes_its_batch_leaves_the_data():
    loop = small_loop("eager")
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        x.mul_(2)
        return model.compute_loss(x, y, model(x))

    x, y = blobs(24)
    source = loop.source(x, y, batch_size=8, shuffle=False)
    losses = [loop.fit(source, epochs=2, verbose=0).history["loss"] for _ in range(2)]
    assert losses[0][0] == losses[0][1] == losses[1][0]


def test_a_read_is_one_copy_until_the_variable_changes():
    room = backend.current()
    variable = keras.Variable(np.ones(4, "float32"))
    before = room.read(variable)
    assert room.read(variable) is before
    assert before.data_ptr() != variable.value.data_ptr()
    with torch.no_grad():
        variable.value.add_(1)
    assert room.read(variable) is not before
    room.assign(variable, before)
    assert room.read(variable).tolist() == [1, 1, 1, 1]
    variable.assign(np.zeros(4, "float32"))
    assert before.tolist() == [1, 1, 1, 1]


def chosen(monkeypatch, *, epochs, graph_s=4e-4):
    """The gears that `auto` measures, in order, and the one that it takes."""
    trials = {"eager": choose.Trial(4e-3, 0.0), "graph": choose.Trial(graph_s, 8.0)}
    order = []

    def measure(runner, gear, segment, *, best_s):
        order.append(gear.name)
        return trials[gear.name]

    monkeypatch.setattr(choose, "measure", measure)
    loop = fresh(small_loop, "auto", cache=False)
    source = loop.source(*blobs(64), batch_size=8)
    loop.prepare("train", source, epochs_left=epochs)
    return order, loop.gear.name


def test_auto_begins_with_eager_and_tries_the_graph_where_it_can_pay(monkeypatch):
    # 4 ms a step: in 200 s of it twenty of compiling are allowed.
    assert chosen(monkeypatch, epochs=100) == (["eager"], "eager")
    assert chosen(monkeypatch, epochs=4_000) == (["eager", "graph"], "graph")


def test_a_graph_that_is_slower_is_not_taken(monkeypatch):
    order = chosen(monkeypatch, epochs=4_000, graph_s=5e-3)
    assert order == (["eager", "graph"], "eager")


def test_a_tensor_is_never_taken_for_an_array(monkeypatch, tmp_path):
    """On a GPU it is none; Keras alone knows how to bring it to the host."""
    from keras.src.backend.torch import core

    reading, as_array = [0], torch.Tensor.__array__

    def read(tensor, *rest, **named):
        if not reading[0]:
            raise TypeError("the tensor is on another device")
        return as_array(tensor, *rest, **named)

    def convert(real):
        def to_numpy(value):
            reading[0] += 1
            try:
                return real(value)
            finally:
                reading[0] -= 1

        return to_numpy

    for module in (core, keras.src.backend.torch, keras.src.backend):
        monkeypatch.setattr(module, "convert_to_numpy", convert(core.convert_to_numpy))
    monkeypatch.setattr(torch.Tensor, "__array__", read)
    x, y = blobs(64)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    loop = small_loop("eager")
    loop.fit(batches, validation_data=(x, y), verbose=0, run=tmp_path / "run")
    assert loop.look(x, y).loss > 0
    loop.doctor(x, y)
    loop.evaluate(x, y, verbose=0)
    loop.predict(x, verbose=0)
