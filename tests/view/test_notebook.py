"""Where a training stands, in a notebook and elsewhere."""

import nbformat
import pytest
from nbclient import NotebookClient

import loopscope
from loopscope.events import ChunkEnd, EpochBegin, GearChosen, PhaseBegin
from loopscope.view.notebook import NotebookLine
from loopscope.view.progress import ProgressLine, in_notebook
from models import FUSED, blobs, fresh, small_loop

pytestmark = pytest.mark.once

X, Y = blobs(64)


def test_a_notebook_shows_the_running_pass_and_the_epochs_that_are_over():
    loop, line, shown = fresh(small_loop, FUSED), NotebookLine(), []
    loop.subscribe(line)
    loop.subscribe(lambda event: shown.append((event, line.html())))
    for epoch in loop.epochs(2):
        for _ in epoch.train((X, Y), every=4, batch_size=8):
            pass
        epoch.validate((X, Y), batch_size=8)
    bars = [text for event, text in shown if isinstance(event, ChunkEnd)]
    assert any("epoch 2/2 · train · 5/8 · loss" in text for text in bars)
    assert any("test · 8/8" in text for text in bars)
    assert all('<progress aria-label="' in text for text in bars)
    assert "<progress" not in line.html()
    assert line.html().count("<tr>") == 3
    assert f"{epoch.metrics['val_accuracy']:.4g}" in line.html()


def test_a_bar_of_unknown_length_has_no_end():
    line = NotebookLine()
    for event in (
        GearChosen("eager", "<b>the only one</b>", 0.0),
        EpochBegin(0, None),
        PhaseBegin("train", None),
    ):
        line(event)
    assert "max=" not in line.html()
    assert "epoch 1 · train · 0" in line.html()
    assert "&lt;b&gt;the only one" in line.html()


def test_a_block_with_progress_listens_and_then_no_more(capsys):
    loop = fresh(small_loop, FUSED)
    before = list(loop._listeners)
    with loopscope.progress(loop):
        assert len(loop._listeners) == len(before) + 1
        assert isinstance(loop._listeners[-1], ProgressLine)
    assert loop._listeners == before
    assert not in_notebook()


CELLS = """
import numpy as np, keras, loopscope
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
loop = loopscope.Loop(model, "sgd", "mse", gear="graph", seed=0)
# %%
with loopscope.progress(loop):
    for epoch in loop.epochs(2):
        for step in epoch.train((x, x[:, :1]), every=None, batch_size=8):
            pass
# %%
history = loop.fit(x, x[:, :1], batch_size=8, epochs=1)
# %%
loop.look(x[:8], x[:8, :1])
"""


@pytest.mark.slow
def test_progress_is_one_output_of_a_cell_in_a_real_notebook():
    cells = [nbformat.v4.new_code_cell(c) for c in CELLS.split("# %%\n")]
    book = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        # As a notebook shows it: what a line has written over is not there.
        book,
        timeout=300,
        kernel_name="python3",
        coalesce_streams=True,
    )
    client.execute()
    (shown,) = book.cells[1].outputs
    assert shown.output_type == "display_data"
    assert "<progress" not in shown.data["text/html"]
    assert shown.data["text/html"].count("<tr>") == 3
    (bar,) = [o.text for o in book.cells[2].outputs if o.get("name") == "stdout"]
    assert bar.count("8/8") == 1
    step = book.cells[3].outputs[0].data["text/html"]
    assert step.count("<iframe ") == 1
    assert "Gradients and updates" in step
