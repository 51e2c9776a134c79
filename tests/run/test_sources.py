"""Every kind of data goes on where training was ended, or says that it cannot."""

import time

import keras
import numpy as np
import pytest

from loopscope import Experiment, Recording, open_run
from loopscope.errors import RunError
from loopscope.events import ChunkEnd
from models import STEP, Batches, blobs, fresh, halved, small_loop, warned

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

X, Y = blobs(60)


class Ended(Exception):
    """Stands for whatever ends a process."""


def in_batches(size=8):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, len(X), size)]


class Shuffling(keras.utils.PyDataset):
    """Has an order of its own in each epoch, from a generator that it keeps."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(5)
        self.order = np.arange(len(X))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rows = self.order[index * 8 : (index + 1) * 8]
        return X[rows], Y[rows]

    def on_epoch_end(self):
        self.random.shuffle(self.order)


def arrays(folder):
    return {"x": X, "y": Y, "batch_size": 8}


def arrays_in_parts(folder):
    return {"x": X, "y": Y, "batch_size": 8, "steps_per_epoch": 4, "epochs": 6}


def memmap(folder):
    path = folder / "x.npy"
    if not path.exists():
        np.save(path, X)
    return {"x": np.load(path, mmap_mode="r"), "y": Y, "batch_size": 8}


def a_list(folder):
    return {"x": in_batches()}


def an_iterable(folder):
    return {"x": Batches(in_batches())}


def list_in_parts(folder):
    return {"x": in_batches(), "steps_per_epoch": 4, "epochs": 6}


def a_generator(folder):
    def generate():
        random = np.random.default_rng(1)
        while True:
            rows = random.integers(0, len(X), 8)
            yield X[rows], Y[rows]

    return {"x": generate(), "steps_per_epoch": 8}


def a_pydataset(folder):
    return {"x": Shuffling()}


def tf_data(folder):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(30, seed=4)
    return {"x": data.batch(8).map(lambda x, y: (x * 2, y)).prefetch(2)}


def tf_data_in_order(folder):
    import tensorflow as tf

    return {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)}


def tf_data_without_end(folder):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(60, seed=4).repeat()
    return {"x": data.batch(8), "steps_per_epoch": 5, "epochs": 4}


def grain_map(folder):
    import grain

    data = grain.MapDataset.source(np.arange(len(X))).shuffle(seed=3)
    return {"x": data.map(lambda i: (X[i], Y[i])).batch(8)}


def grain_iter(folder):
    return {"x": grain_map(folder)["x"].to_iter_dataset()}


def torch_loader(folder):
    import torch

    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)
    return {"x": loader}


SOURCES = [
    arrays,
    arrays_in_parts,
    memmap,
    a_list,
    an_iterable,
    list_in_parts,
    a_generator,
    a_pydataset,
    tf_data,
    tf_data_in_order,
    tf_data_without_end,
    grain_map,
    grain_iter,
    torch_loader,
]


def train(arguments, *, at=None, **run):
    loop = fresh(small_loop, STEP)

    def end(event):
        trained = isinstance(event, ChunkEnd) and event.phase == "train"
        if trained and at is not None and loop.step >= at:
            raise Ended

    limits = {"train": lambda index: max(1, (at or 10**6) - loop.step)}
    loop.subscribe(end, chunk_steps=limits)
    arguments = {"epochs": 3, "verbose": 0, **arguments, **run}
    if at is None:
        return loop, loop.fit(**arguments)
    with pytest.raises(Ended):
        loop.fit(**arguments)
    return loop, None


@pytest.mark.parametrize("make", halved(SOURCES, ids=lambda make: make.__name__))
def test_training_goes_on_at_the_next_batch(make, tmp_path):
    whole, expected = train(make(tmp_path), run=Recording(tmp_path / "whole", 3))
    path = tmp_path / "ended"
    train(make(tmp_path), at=11, run=Recording(path, replay_steps=3))
    loop, history = train(make(tmp_path), run=path, resume=True)
    assert loop.step == whole.step
    assert loop.state.sha256() == whole.state.sha256()
    assert history.history == expected.history


BRIEF = (arrays_in_parts, memmap, a_generator, a_pydataset, tf_data, grain_map)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=[] if make in BRIEF else pytest.mark.slow)
        for make in SOURCES
    ],
)
def test_any_step_is_run_again_on_its_own_batch(make, tmp_path):
    train(make(tmp_path), run=Recording(tmp_path / "run", replay_steps=3))
    for step in (9, 13):
        made = Experiment(fresh(small_loop, STEP), **{"epochs": 3, **make(tmp_path)})
        run = open_run(tmp_path / "run", experiment=made)
        rewound = run.rewind(step)
        assert rewound.identical
        assert rewound.replayed_steps <= 3
        run.close()


def test_grain_makes_no_batch_that_was_trained_on():
    import grain

    made = []

    def example(index):
        made.append(int(index))
        return np.float32([index])

    data = grain.MapDataset.source(np.arange(4000)).map(example).batch(4)
    source = fresh(small_loop, STEP).source(data)
    known = -1
    while known != len(made):  # Threads of Grain's may still be reading ahead.
        known = len(made)
        time.sleep(0.3)
    made.clear()
    epoch = source.open(0, 990)
    steps = 0
    while (segment := epoch.take(4)) is not None:
        steps += segment.steps
    epoch.close()
    assert steps == 10
    # Beside them, the first batch, for the shapes.
    assert sorted(made) == [0, 1, 2, 3, *range(3960, 4000)]


def test_data_that_can_be_read_once_are_rewound_into_once(tmp_path):
    train(a_pydataset(tmp_path), run=Recording(tmp_path / "run", replay_steps=3))
    made = Experiment(fresh(small_loop, STEP), epochs=3, **a_pydataset(tmp_path))
    run = open_run(tmp_path / "run", experiment=made)
    assert run.rewind(9).identical
    with pytest.raises(RunError, match="can be read once only, and have been"):
        run.rewind(9)
    run.close()


def test_an_order_without_a_seed_is_said_at_the_start_and_found_at_the_resume(
    tmp_path,
):
    import tensorflow as tf

    def data():
        loop_seeded = fresh(small_loop, STEP)
        tf.random.set_seed(None)
        return loop_seeded, tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(
            30
        ).batch(8)

    def end(loop):
        def hear(event):
            if isinstance(event, ChunkEnd) and loop.step >= 11:
                raise Ended

        return hear

    loop, batches = data()
    loop.subscribe(end(loop), chunk_steps={"train": 1})
    with (
        warned(r"cannot be repeated.*`shuffle` has no seed"),
        pytest.raises(Ended),
    ):
        loop.fit(batches, epochs=3, verbose=0, run=Recording(tmp_path / "run", 3))
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").iterdir()}
    loop, batches = data()
    with (
        warned("cannot be repeated"),
        pytest.raises(RunError, match=r"Batch 0 of the data is not the one.*no seed"),
    ):
        loop.fit(batches, epochs=3, verbose=0, run=tmp_path / "run", resume=True)
    after = {p: p.read_bytes() for p in (tmp_path / "run/checkpoints").iterdir()}
    assert after == before


def test_a_torch_loader_without_a_generator_is_said_at_the_start(tmp_path):
    import torch

    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
    with warned("DataLoader shuffles without a generator"):
        train({"x": loader, "epochs": 1}, run=tmp_path / "run")


def test_other_batches_than_before_are_refused_and_nothing_is_changed(tmp_path):
    data = in_batches()
    train({"x": data}, at=11, run=Recording(tmp_path / "run", replay_steps=3))
    other = [(x + 1, y) for x, y in data]
    with pytest.raises(RunError, match="Batch 0 of the data is not the one"):
        train({"x": other}, run=tmp_path / "run", resume=True)
    loop, _ = train({"x": data}, run=tmp_path / "run", resume=True)
    whole, _ = train({"x": data})
    assert loop.state.sha256() == whole.state.sha256()


def test_validation_data_that_remember_are_brought_to_their_place(tmp_path):
    validation = Shuffling

    def once(**run):
        return train({**arrays(tmp_path), "validation_data": validation()}, **run)

    _, expected = once(run=Recording(tmp_path / "whole", replay_steps=3))
    once(at=19, run=Recording(tmp_path / "run", replay_steps=3))
    _, history = once(run=tmp_path / "run", resume=True)
    assert history.history == expected.history
