"""Checkpoints are written and read variable by variable, in the format of others."""

import hashlib
import threading
import time
import tracemalloc
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from trainings import warned

from loopscope import Recording
from loopscope.errors import RunError
from loopscope.run import checkpoint, files, recorder, tensors, writer
from loopscope.run.checkpoint import Draft, check, read, write
from loopscope.run.folder import Folder
from loopscope.run.journal import JournalWriter
from loopscope.run.writer import Limits, Writer
from loopscope.state import sha256
from models import FUSED, blobs, small_loop

CONTENT = {"turn": 0, "run_s": 0.0, "finished": False, "cursor": {}}

# What no framework has a part in is tested once.
once = pytest.mark.once


def some_state():
    """Variables of many kinds; what follows the odd bytes is not aligned."""
    random = np.random.default_rng(0)
    return {
        "weights": random.normal(size=(5, 7)).astype("float32"),
        "odd": np.array([1, 2, 3], "uint8"),
        "after": random.normal(size=(3,)).astype("float64"),
        "narrow": np.arange(5).astype(ml_dtypes.bfloat16),
        "alone": np.array(3, "int64"),
        "narrow and alone": np.array(3).astype(ml_dtypes.float8_e4m3fn),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), "float32"),
        "half": np.arange(3, dtype="float16"),
        "wide": np.array([1 + 2j]),
        "turned": np.arange(6, dtype="int32").reshape(2, 3).T,
        "a name: ü/\\\"'": np.arange(2, dtype="uint32"),
    }


def assert_same(was, now):
    assert list(was) == list(now)
    for path, array in was.items():
        assert (array.dtype, array.shape) == (now[path].dtype, now[path].shape), path
        assert array.tobytes() == now[path].tobytes(), path


@once
def test_safetensors_reads_what_was_written(tmp_path):
    state = some_state()
    write(tmp_path, Draft("a", 0, dict(state), {"best": state["weights"]}, CONTENT))
    data = (tmp_path / "a.safetensors").read_bytes()
    for found in (
        safetensors.numpy.load_file(tmp_path / "a.safetensors"),
        safetensors.numpy.load(data),
    ):
        assert set(found) == {f"state/{path}" for path in state} | {"extra/best"}
        for path, array in state.items():
            other = found[f"state/{path}"]
            if array.dtype.name in tensors.TAGS:
                assert other.dtype == array.dtype
                assert other.shape == array.shape
            else:
                assert other.dtype == np.uint8
                assert other.shape == (*array.shape, array.dtype.itemsize)
            assert other.tobytes() == array.tobytes()


@once
def test_what_safetensors_wrote_is_read(tmp_path):
    """Checkpoints that an earlier version wrote: in another order, and aligned."""
    state = some_state()
    document, _ = write(tmp_path, Draft("a", 0, dict(state), {}, CONTENT))
    stored = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    data = safetensors.numpy.save(stored, metadata={"about": "nothing"})
    assert data != (tmp_path / "a.safetensors").read_bytes()
    document["arrays_sha256"] = hashlib.sha256(data).hexdigest()
    document["arrays_size_bytes"] = len(data)
    files.write(tmp_path / "a.safetensors", data)
    files.write(tmp_path / "a.json", files.seal(document))
    assert_same(state, read(tmp_path, "a").state)


@once
def test_every_kind_of_variable_comes_back_with_its_checksums(tmp_path):
    state = some_state()
    draft = Draft("a", 7, dict(state), {"best": state["narrow"]}, CONTENT, True)
    document, size_bytes = write(tmp_path, draft)
    assert not draft.state
    assert size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    back = read(tmp_path, "a")
    assert_same(state, back.state)
    assert_same({"best": state["narrow"]}, back.extra)
    assert back.state_sha256 == document["state_sha256"] == sha256(state.items())
    assert (back.step, back.pinned, back.content) == (7, True, CONTENT)


@once
def test_writing_holds_one_variable_and_reading_none(tmp_path):
    """The values stand for those on a device: arrays are there once asked for."""
    count, size = 8, 2**22
    state = {str(i): np.full(size // 4, i, "float32") for i in range(count)}

    def to_numpy(value):
        return value + 0.0

    tracemalloc.start()
    try:
        draft = Draft("a", 0, dict(state), {}, CONTENT, to_numpy=to_numpy)
        write(tmp_path, draft)
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        back = read(tmp_path, "a")
        check(tmp_path, "a")
        opened = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    # A block that was read, and as much to spare, beside the variable.
    assert written < size + 2 * files.BLOCK_BYTES
    assert opened < 3 * files.BLOCK_BYTES
    assert_same(state, back.state)


@once
def test_variables_are_let_go_of_as_they_are_written(tmp_path):
    class Value(np.ndarray):
        """An array that can be referred to weakly."""

    values = {str(i): np.zeros(3, "float32").view(Value) for i in range(4)}
    known = {path: weakref.ref(value) for path, value in values.items()}
    alive = []

    def to_numpy(value):
        alive.append(sum(ref() is not None for ref in known.values()))
        return np.array(value)

    draft = Draft("a", 0, values, {}, CONTENT, to_numpy=to_numpy)
    del values
    write(tmp_path, draft)
    assert alive == [4, 3, 2, 1]


@once
def test_a_checkpoint_that_was_opened_can_be_removed(tmp_path):
    state = some_state()
    write(tmp_path, Draft("a", 0, dict(state), {}, CONTENT))
    back = read(tmp_path, "a")
    checkpoint.remove(tmp_path, "a")
    assert not list(tmp_path.iterdir())
    assert_same(state, back.state)


@once
def test_a_value_that_is_read_as_something_else_is_not_written(tmp_path):
    draft = Draft(
        "a",
        0,
        {"v": np.zeros(3, "float32")},
        {},
        CONTENT,
        to_numpy=lambda value: value.astype("float64"),
    )
    with pytest.raises(RunError, match="v was not read as what it is"):
        write(tmp_path, draft)
    assert not list(tmp_path.iterdir())


@once
def test_a_disk_that_loses_bits_is_noticed(tmp_path, monkeypatch):
    real = files.sync_folder

    def lose(folder):
        real(folder)
        path = tmp_path / "a.safetensors"
        if path.exists():
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(files, "sync_folder", lose)
    with pytest.raises(RunError, match="is not what was written: the disk lost bits"):
        write(tmp_path, Draft("a", 0, some_state(), {}, CONTENT))
    assert not list(tmp_path.iterdir())


# A disk that is slower than checkpoints are made.


class Disk:
    """Stands between the writer and the files; takes nothing until `go` or `slow`.

    Attributes:
        most: The most checkpoints that had values, at any time.
    """

    def __init__(self, monkeypatch):
        self._go, self._real = threading.Event(), checkpoint.write
        self._drafts, self.most = [], 0
        save = Writer.save

        def remember(writer, draft, **options):
            self._drafts.append(weakref.ref(draft))
            save(writer, draft, **options)
            alive = [ref() for ref in self._drafts]
            self.most = max(self.most, sum(bool(d and d.state) for d in alive))

        monkeypatch.setattr(Writer, "save", remember)
        monkeypatch.setattr(checkpoint, "write", self._write)

    def go(self):
        self._go.set()

    def slow(self, seconds):
        self._seconds = seconds
        self._go.set()

    def _write(self, folder, draft):
        self._go.wait()
        time.sleep(getattr(self, "_seconds", 0.0))
        return self._real(folder, draft)


def record(path, every=1, **options):
    loop = small_loop(FUSED)
    x, y = blobs(64)
    how = Recording(path, replay_steps=every)
    loop.fit(x, y, batch_size=8, epochs=2, verbose=0, run=how, **options)
    return loop


def test_at_most_two_states_wait_for_a_slow_disk(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    disk.slow(0.02)
    record(tmp_path / "run")
    assert disk.most <= 2
    found, _ = checkpoint.entries(tmp_path / "run/checkpoints")
    assert {e.step for e in found} == set(range(17))


def test_callbacks_that_assign_much_wait_for_the_disk_as_well(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    disk.slow(0.02)
    monkeypatch.setattr("loopscope.run.writes.WRITE_BYTES", 0)

    class Assigns(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            bias = self.model.trainable_variables[-1]
            bias.assign(bias + 1.0)

    record(tmp_path / "run", every=1000, callbacks=[Assigns()])
    assert disk.most <= 2
    found, _ = checkpoint.entries(tmp_path / "run/checkpoints")
    assert sum(e.pinned for e in found) >= 15


def test_a_disk_that_hangs_holds_two_states_and_no_training(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    for module in (recorder, writer):
        monkeypatch.setattr(module, "PATIENCE_S", 0.05)

    class Ends(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                disk.go()

    with warned() as said:
        record(tmp_path / "run", callbacks=[Ends()])
    assert len(said) == 1
    assert "the checkpoint before step 2 is left out: the disk has taken" in said[0]
    assert disk.most <= 3  # With the one at the end, which is waited for.
    found, _ = checkpoint.entries(tmp_path / "run/checkpoints")
    assert {0, 1, 16} <= {e.step for e in found} < set(range(17))


@once
def test_progress_is_told_from_standing_still(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SYNC_BYTES", 2**12)
    folder = Folder(tmp_path)
    folder.make()
    at = Writer(folder, JournalWriter(folder.journal_path), Limits(10, 10.0, 2**30))
    seen = []
    sync = files.Growing.sync

    def watch(growing):
        sync(growing)
        seen.append(at.progress)

    monkeypatch.setattr(files.Growing, "sync", watch)
    state = {str(i): np.zeros(2**12, "float32") for i in range(4)}
    content = CONTENT | {"cursor": {"epoch": 0, "index": 0}}
    at.save(Draft("a", 0, state, {}, content))
    at.wait()
    at.close(tidy=True)
    moved = [m for saved, m in seen if saved == 0]
    assert moved[:4] == sorted(set(moved[:4]))
    assert at.progress == (1, 0)
