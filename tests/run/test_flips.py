"""A damaged run is refused, or goes on from where it is whole: it never lies.

A few flips of each file here, under `make test-slow` 500 (flips.py says what is asked).
"""

import re
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress

import numpy as np
import pytest
from flips import (
    JOURNAL,
    WAL,
    Sound,
    emptied,
    every_flip,
    first_rows,
    flipped,
    missing,
    page_headers,
    structure_flipped,
    truncated,
)
from trainings import Ended, end, remembering, train, two_outputs, warned

import loopscope
from loopscope.errors import RunError
from loopscope.run import reading
from loopscope.run.folder import Folder
from loopscope.run.journal import JournalReader, JournalWriter
from loopscope.run.resume import find

# What is read has nothing to do with who computes.
pytestmark = pytest.mark.once

EPOCHS = 40
FLIPS, MANY_FLIPS = 100, 500


def trained(path=None, **options):
    options = {"make": two_outputs, "epochs": EPOCHS, "more": remembering(), **options}
    return train(path, **options)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that ended in its 38th epoch."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(Ended):
        trained(path, every=10, acts={37: end})
    return Sound(path, tmp_path_factory.mktemp("damaged"), EPOCHS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    trained(path, every=10)
    return Sound(path, tmp_path_factory.mktemp("damaged"), EPOCHS)


@pytest.fixture(scope="module")
def torn(killed, tmp_path_factory):
    """The run of a process that was killed: its journal is in two files."""
    return Sound(killed.path, tmp_path_factory.mktemp("damaged"), killed.epochs)


def file_of(run, which):
    return run.newest(which) if which in ("json", "safetensors") else which


def assert_never_lies(run, which, damage, count):
    counts, wrong = run.random(file_of(run, which), damage, count)
    assert not wrong, "\n".join(wrong[:5])
    return counts


@pytest.mark.parametrize("which", ["run.json", "json", "safetensors", JOURNAL])
def test_a_flipped_bit_is_found_or_changes_nothing(interrupted, which):
    assert_never_lies(interrupted, which, flipped, FLIPS)


def test_a_flipped_bit_in_what_orders_the_journal_is_found(interrupted):
    assert_never_lies(interrupted, JOURNAL, structure_flipped, FLIPS)


def test_no_row_of_the_journal_vanishes_by_one_bit(interrupted):
    data = interrupted.files[JOURNAL]
    counts_of_rows = [header[4] for header in page_headers(data)]
    _, wrong = interrupted.outcomes(JOURNAL, every_flip(data, counts_of_rows))
    assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize("which", ["json", "safetensors"])
def test_a_flipped_bit_in_the_end_of_a_finished_run_is_found(finished, which):
    assert_never_lies(finished, which, flipped, FLIPS // 2)


def test_a_flipped_bit_in_the_log_of_a_killed_run_ends_it_there(torn):
    counts = assert_never_lies(torn, WAL, flipped, FLIPS // 2)
    assert counts["steps: up to a step"]


@pytest.mark.parametrize("which", ["run.json", "json", "safetensors", JOURNAL])
def test_a_truncated_an_empty_and_a_missing_file_are_told(interrupted, which):
    assert_never_lies(interrupted, which, truncated, 20)
    assert_never_lies(interrupted, which, emptied, 1)
    assert_never_lies(interrupted, which, missing, 1)


def test_a_log_of_a_killed_run_that_is_truncated_empty_or_missing_is_told(torn):
    assert_never_lies(torn, WAL, truncated, 20)
    assert_never_lies(torn, WAL, emptied, 1)
    assert_never_lies(torn, WAL, missing, 1)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["run.json", "json", "safetensors", JOURNAL])
def test_no_flipped_bit_of_many_is_missed(interrupted, finished, which):
    assert_never_lies(interrupted, which, flipped, MANY_FLIPS)
    assert_never_lies(finished, which, flipped, MANY_FLIPS)


@pytest.mark.slow
@pytest.mark.parametrize("which", [JOURNAL, WAL])
def test_no_flipped_bit_of_many_is_missed_in_a_killed_run(torn, which):
    assert_never_lies(torn, which, flipped, MANY_FLIPS)


@pytest.mark.slow
def test_no_flipped_bit_of_many_is_missed_in_what_orders_the_journal(interrupted):
    assert_never_lies(interrupted, JOURNAL, structure_flipped, 4 * MANY_FLIPS)
    data = interrupted.files[JOURNAL]
    headers = [place for header in page_headers(data) for place in header]
    _, wrong = interrupted.outcomes(JOURNAL, every_flip(data, headers))
    assert not wrong, "\n".join(wrong[:5])


def test_a_row_of_one_table_is_none_of_another(tmp_path):
    # One flipped bit of a page's number lets a table go on in a page of another one.
    path = tmp_path / JOURNAL
    journal = JournalWriter(path)
    journal.put("writes", [(8, 0, "path", "float32", "[]", b"1234")])
    journal.close()
    other = sqlite3.connect(path)
    with other:
        other.execute("INSERT INTO epochs SELECT * FROM writes")
    other.close()
    reader = JournalReader(path, live=False)
    with pytest.raises(RunError, match=r"the row 8 of 'epochs' does not match"):
        reader.epochs()
    reader.close()


def damaged_copy(run, tmp_path, name, data):
    """A copy of a run with other bytes in one file; `None` takes it away."""
    for file, content in run.files.items():
        content = data if file == name else content
        if content is not None:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
    return tmp_path


def test_no_flipped_bit_in_the_keys_of_the_first_steps_is_missed(interrupted):
    # What a query selects by, and what says how far the journal reaches.
    data = interrupted.files[JOURNAL]
    flips = every_flip(data, first_rows(data, "steps", 4))
    _, wrong = interrupted.outcomes(JOURNAL, flips, asks=("steps", "cut"))
    assert not wrong, "\n".join(wrong[:5])


def test_a_journal_reaches_no_further_than_a_row_whose_key_is_damaged(tmp_path):
    # Of two outputs, from step 64 on: the end of one says nothing of the other.
    path = tmp_path / JOURNAL
    journal = JournalWriter(path)
    values = np.arange(80, dtype="<f4")
    for first in (64, 144):
        for name in ("also", "loss"):
            row = (first, name, 80, values.dtype.str, values.tobytes(), 1.5)
            journal.put("steps", [row])
    journal.close()
    data = path.read_bytes()
    reached = Counter()
    for changed, where in every_flip(data, first_rows(data, "steps", 2)):
        path.write_bytes(changed)
        try:
            reader = JournalReader(path, live=False, first=64)
        except RunError:
            continue
        with closing(reader):
            try:
                whole = len(reader.scalars()["loss"][1]) == 160
            except RunError:
                whole = False
            with suppress(RunError):
                reached[reader.covered()] += 1
                assert reader.covered() == (224 if whole else 64), where
    assert reached[64] > 20


def test_a_checkpoint_whose_epochs_the_journal_lacks_is_passed_over(
    interrupted, tmp_path
):
    # A log that ends between the last step of an epoch and its end.
    path = damaged_copy(interrupted, tmp_path, "", None)
    journal = JournalWriter(path / JOURNAL)
    journal.put("epochs", [(29, 29 * 8, None, None, None, 0.0)])
    journal.close()
    past = find(Folder(path), EPOCHS, anyway=False)
    assert past.checkpoint.step < 30 * 8
    assert [epoch for epoch, _ in past.history] == list(
        range(past.checkpoint.step // 8)
    )
    assert any("journal" in note for note in past.notes)


def test_a_run_without_its_manifest_is_not_taken_for_an_empty_folder(
    interrupted, tmp_path
):
    path = damaged_copy(interrupted, tmp_path, "run.json", None)
    with pytest.raises(RunError, match=re.escape("run.json")):
        train(path, epochs=1)
    with pytest.raises(RunError, match=re.escape("run.json")):
        train(path, epochs=1, resume=True)
    left = [f for f in interrupted.files if f != "run.json"]
    assert all((path / f).read_bytes() == interrupted.files[f] for f in left)


def test_a_run_that_has_lost_all_checkpoints_keeps_its_journal(interrupted, tmp_path):
    path = damaged_copy(interrupted, tmp_path, "", None)
    for file in (path / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(RunError, match="checkpoint"):
        trained(path, resume=True)
    assert (path / JOURNAL).read_bytes() == interrupted.files[JOURNAL]
    assert reading.summary(Folder(path)).steps == 304


def test_a_run_goes_on_from_before_a_damaged_checkpoint_to_the_same_end(
    interrupted, tmp_path
):
    name = interrupted.newest("safetensors")
    path = damaged_copy(interrupted, tmp_path, name, b"")
    with warned() as said:
        loop, history = trained(path, resume=True)
    assert len(said) == 1
    assert f"{name} is damaged" in said[0]
    undisturbed, whole = trained()
    assert loop.state.sha256() == undisturbed.state.sha256()
    assert history.history == whole.history
    assert reading.summary(Folder(path)).status == "finished"


def test_a_damaged_journal_is_kept_aside_when_told_to_go_on_anyway(
    interrupted, tmp_path
):
    path = damaged_copy(interrupted, tmp_path, JOURNAL, b"not a journal")
    with pytest.raises(RunError, match=r"journal\.sqlite is damaged.*--anyway"):
        trained(path, resume=True)
    with warned() as said:
        loop, _ = trained(path, resume="anyway")
    assert "journal.sqlite is damaged" in said[0]
    assert "begun anew" in said[0]
    undisturbed, _ = trained()
    assert loop.state.sha256() == undisturbed.state.sha256()
    assert (path / "journal.damaged.sqlite").read_bytes() == b"not a journal"
    assert len(reading.steps(Folder(path))["step"]) == EPOCHS * 8


def test_a_branch_takes_no_damaged_steps_with_it(interrupted, tmp_path):
    losses = interrupted.steps["loss"][:4].tobytes()
    data = interrupted.files[JOURNAL]
    changed, _ = next(every_flip(data, [data.index(losses)]))
    path = damaged_copy(interrupted, tmp_path / "run", JOURNAL, changed)
    run, new = loopscope.open_run(path), tmp_path / "new"
    with pytest.raises(RunError, match=r"journal.* is damaged"):
        run.branch(270, new)
    assert not new.exists()


CHURN = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
print("began", flush=True)
while True:
    names = [folder / f"{i}.safetensors" for i in range(5)]
    for name in names:
        name.with_suffix(".tmp").write_bytes(bytes(99))
        name.with_suffix(".tmp").replace(name)
    for name in names:
        name.unlink()
"""


def test_files_that_come_and_go_while_a_run_is_summed_up_are_no_error(
    interrupted, tmp_path
):
    path = damaged_copy(interrupted, tmp_path, "", None)
    command = [sys.executable, "-c", CHURN, str(path / "checkpoints")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            for _ in range(150):
                assert reading.summary(Folder(path)).steps == 304
        finally:
            process.kill()
