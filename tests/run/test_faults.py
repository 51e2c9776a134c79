"""A disk that fails ends no training, and takes nothing that was recorded before."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
from trainings import STEPS, train, warned, wide_loop

import loopscope
from loopscope.errors import RunError
from loopscope.events import ChunkEnd
from loopscope.run import checkpoint, reading
from loopscope.run.folder import Folder

# What is tested here is the same on every backend.
pytestmark = pytest.mark.slow_on_jax

EPOCHS = 8
RAM_DISK = "32m"
"""The size of a disk with room for about ten checkpoints."""


@pytest.fixture(scope="module")
def undisturbed():
    """The state and the History of a training that is not recorded."""
    loop, history = train(make=wide_loop, epochs=EPOCHS)
    return loop.state.sha256(), history.history


def recorded(path, acts=None, **options):
    loop, history = train(path, make=wide_loop, epochs=EPOCHS, acts=acts, **options)
    return loop.state.sha256(), history.history


@pytest.fixture
def limit():
    """Sets the largest size that a file may have."""

    def set_to(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    yield set_to
    set_to(resource.RLIM_INFINITY)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={RAM_DISK}", "tmpfs", place)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def mount(*arguments):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")


def fill(place):
    with (place / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass


def remove(path):
    # A file may come while others go.
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


def once_said(said, act):
    """Acts of the epochs after the third: mend what is broken, once it has shown."""

    def wait():
        # What the thread that writes has met is said at the next step.
        if not said:
            time.sleep(0.3)
        else:
            act()

    return dict.fromkeys(range(3, EPOCHS - 2), wait) | {EPOCHS - 2: act}


def assert_each_said_once(said):
    """One warning of a kind, however often it happens: numbers and causes aside."""
    kinds = [re.sub(r"\d+|\(.*\)", "", text) for text in said]
    # At most: a checkpoint that was under way, the journal, what is lost in the end.
    assert 1 <= len(said) <= 3, said
    assert len(set(kinds)) == len(kinds), said


def assert_goes_on(path, undisturbed):
    """What is in the folder is whole, and leads to the undisturbed end."""
    at = path / "checkpoints"
    found, problems = checkpoint.entries(at)
    assert not problems
    for entry in found:
        checkpoint.check(at, entry.name)
    assert not list(at.glob("*.tmp"))
    with warned() as said:
        assert recorded(path, resume=True) == undisturbed
    assert not said
    assert reading.summary(Folder(path)).status == "finished"
    assert len(reading.steps(Folder(path))["step"]) == EPOCHS * STEPS


# Checkpoints that cannot be written.


def test_checkpoints_that_cannot_be_written_end_no_training(
    undisturbed, limit, tmp_path
):
    path = tmp_path / "run"
    with warned() as said:
        assert recorded(path, {3: lambda: limit(2**20)}) == undisturbed
    limit(resource.RLIM_INFINITY)
    assert len(said) == 1, said
    assert re.search(
        r"the checkpoint before step \d+ could not be written \(.*File too large\); "
        "the ones before it stay, and it is tried again later",
        said[0],
    )
    summary = reading.summary(Folder(path))
    assert (summary.status, summary.steps) == ("interrupted", EPOCHS * STEPS)
    assert summary.resumable_step <= 4 * STEPS
    assert_goes_on(path, undisturbed)


def test_checkpoints_are_written_again_once_they_can_be(undisturbed, limit, tmp_path):
    path = tmp_path / "run"
    with warned() as said:
        acts = once_said(said, lambda: limit(resource.RLIM_INFINITY))
        assert recorded(path, {2: lambda: limit(2**20), **acts}) == undisturbed
    assert len(said) == 1, said
    summary = reading.summary(Folder(path))
    assert (summary.status, summary.resumable_step) == ("finished", EPOCHS * STEPS)
    problems = [e for e in loopscope.open_run(path).events if e["kind"] == "problem"]
    assert len(problems) == 1
    assert "could not be written" in problems[0]["problem"]


def test_no_checkpoint_at_all_leaves_the_steps(undisturbed, limit, tmp_path):
    path = tmp_path / "run"
    limit(2**20)
    with warned() as said:
        assert recorded(path) == undisturbed
    limit(resource.RLIM_INFINITY)
    assert len(said) == 1, said
    assert reading.summary(Folder(path)).resumable_step is None
    assert len(reading.steps(Folder(path))["step"]) == EPOCHS * STEPS


@pytest.mark.parametrize("phase", ["train", "end"])
def test_a_signal_says_so_where_its_checkpoint_cannot_be_written(
    phase, undisturbed, limit, tmp_path, capsys
):
    path, epoch = tmp_path / "run", 5 if phase == "train" else EPOCHS - 1
    acts = {
        3: lambda: limit(2**20),
        epoch: lambda: os.kill(os.getpid(), signal.SIGTERM),
    }
    with warned() as said, pytest.raises(SystemExit) as left:
        recorded(path, acts)
    limit(resource.RLIM_INFINITY)
    assert left.value.code == 143
    assert len(said) == 1, said
    assert (
        f"the run '{path}' could not be saved before step {(epoch + 1) * STEPS}: gone "
        "on with, it starts from the checkpoint before"
    ) in capsys.readouterr().err
    assert reading.summary(Folder(path)).resumable_step <= 4 * STEPS
    assert_goes_on(path, undisturbed)


# A journal that cannot be written.


def test_a_full_disk_ends_no_training(undisturbed, disk):
    path = disk / "run"
    with warned() as said:
        assert recorded(path, {3: lambda: fill(disk)}) == undisturbed
    (disk / "ballast").unlink()
    assert_each_said_once(said)
    assert "full" in said[0] or "No space left" in said[0]
    assert_goes_on(path, undisturbed)


def test_a_disk_that_has_room_again_has_everything_in_the_end(undisturbed, disk):
    path = disk / "run"
    with warned() as said:
        acts = once_said(said, lambda: (disk / "ballast").unlink(missing_ok=True))
        assert recorded(path, {2: lambda: fill(disk), **acts}) == undisturbed
    assert_each_said_once(said)
    assert reading.summary(Folder(path)).status == "finished"
    assert list(reading.steps(Folder(path))["step"]) == list(range(EPOCHS * STEPS))
    assert [row["epoch"] for row in reading.epochs(Folder(path))] == [*range(EPOCHS)]


def test_a_journal_that_cannot_grow_ends_no_training(undisturbed, limit, tmp_path):
    path = tmp_path / "run"
    with warned() as said:
        assert recorded(path, {3: lambda: limit(2**14)}) == undisturbed
    limit(resource.RLIM_INFINITY)
    assert_each_said_once(said)
    assert any("the journal cannot be written" in text for text in said)
    assert_goes_on(path, undisturbed)


# A folder that cannot be written from the start.


def assert_refused_before_training(path, match, **options):
    heard = []
    with pytest.raises(RunError, match=match):
        train(path, make=wide_loop, listener=lambda loop: heard.append, **options)
    assert not [event for event in heard if isinstance(event, ChunkEnd)]


def test_a_full_disk_is_refused_before_training(disk):
    fill(disk)
    assert_refused_before_training(
        disk / "run", r"cannot be written.*(full|No space).*Nothing was trained"
    )
    assert not (disk / "run").exists()


def test_a_run_on_a_full_disk_is_not_gone_on_with_and_stays(disk, undisturbed):
    path = disk / "run"
    with pytest.raises(ZeroDivisionError):
        recorded(path, {3: lambda: 1 / 0})
    was = reading.summary(Folder(path))
    fill(disk)
    assert_refused_before_training(
        path, r"cannot be written.*(full|No space)", epochs=EPOCHS, resume=True
    )
    assert reading.summary(Folder(path)) == was
    (disk / "ballast").unlink()
    assert_goes_on(path, undisturbed)


@pytest.mark.once
def test_a_path_below_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert_refused_before_training(
            path, r"cannot be written: (Not a directory|File exists).*Nothing was"
        )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.once
def test_a_read_only_disk_is_refused_before_training_and_can_be_read(disk):
    path = disk / "run"
    train(path)
    steps = reading.steps(Folder(path))
    mount("-o", "remount,ro", disk)
    assert_refused_before_training(
        disk / "other", "cannot be written: Read-only file system. Nothing was trained"
    )
    assert_refused_before_training(
        path, "cannot be written: Read-only file system", epochs=9, resume=True
    )
    run = loopscope.open_run(path)
    assert run.summary.status == "finished"
    assert all((run.steps[k] == steps[k]).all() for k in steps)
    assert run.events[-1]["kind"] == "finished"


# A folder that goes.


def test_a_folder_that_is_removed_ends_no_training(undisturbed, tmp_path):
    path = tmp_path / "run"
    with warned() as said:
        assert recorded(path, {3: lambda: remove(path)}) == undisturbed
    assert len(said) == 1, said
    assert "is gone; recording ends here, training goes on" in said[0]
    assert not path.exists()


def test_a_folder_that_is_replaced_by_another_run_is_left_alone(undisturbed, tmp_path):
    path, other = tmp_path / "run", tmp_path / "other"
    recorded(other)
    other_was = reading.summary(Folder(other))

    def replace():
        remove(path)
        other.rename(path)

    with warned() as said:
        assert recorded(path, {3: replace}) == undisturbed
    assert len(said) == 1, said
    assert "is gone; recording ends here, training goes on" in said[0]
    now = reading.summary(Folder(path))
    assert (now.created, now.steps, now.size_bytes) == (
        other_was.created,
        other_was.steps,
        other_was.size_bytes,
    )


def test_a_checkpoint_under_way_goes_into_no_other_run(
    undisturbed, tmp_path, monkeypatch
):
    path, other, write = tmp_path / "run", tmp_path / "other", checkpoint.write
    recorded(other)
    files_were = sorted(p.name for p in (other / "checkpoints").iterdir())

    def late(folder, made):
        # Between the writer's look at the folder and the first byte.
        if made.step == 4 * STEPS and other.exists():
            remove(path)
            other.rename(path)
        return write(folder, made)

    monkeypatch.setattr(checkpoint, "write", late)
    with warned() as said:
        assert recorded(path) == undisturbed
    assert "is gone; recording ends here" in said[0]
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == files_were


def test_checkpoints_that_are_removed_end_no_training(undisturbed, tmp_path):
    path = tmp_path / "run"
    with warned() as said:
        assert recorded(path, {3: lambda: remove(path / "checkpoints")}) == undisturbed
    assert len(said) == 1, said
    assert len(reading.steps(Folder(path))["step"]) == EPOCHS * STEPS


# A branch.


def test_a_branch_to_a_full_disk_is_refused_and_leaves_nothing(disk, tmp_path):
    path = tmp_path / "run"
    recorded(path)
    before = reading.summary(Folder(path))
    fill(disk)
    with pytest.raises(RunError, match=r"cannot be written.*(full|No space)"):
        loopscope.open_run(path).branch(30, disk / "new")
    assert not (disk / "new").exists()
    assert reading.summary(Folder(path)) == before
    (disk / "ballast").unlink()
    loopscope.open_run(path).branch(30, disk / "new")
    assert reading.summary(Folder(disk / "new")).status == "interrupted"
