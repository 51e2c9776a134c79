"""What shows itself in a notebook: runs, steps, gears, findings; as HTML and plots."""

import re
import sys
from html.parser import HTMLParser

import keras
import numpy as np
import pytest

import loopscope
from loopscope.choose import in_words
from loopscope.compare import Comparison, GearReport
from loopscope.doctor.finding import Finding
from loopscope.errors import ExtraError, UsageError
from loopscope.estimate import Estimate
from loopscope.look import html
from models import FUSED, blobs, fresh, numbers, small_loop

pytestmark = pytest.mark.once

X, Y = blobs(64)
HOSTILE = "<script>alert('&')</script>"


def experiment():
    loop = fresh(small_loop, FUSED)
    return loopscope.Experiment(
        loop, x=X, y=Y, batch_size=8, epochs=3, validation_data=(X, Y)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "run"
    experiment().fit(run=folder, verbose=0)
    opened = loopscope.open_run(folder, experiment=experiment())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def rewound(run):
    return run.rewind(5)


class Tags(HTMLParser):
    """Checks that every tag is closed, and keeps the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.said = [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


def said(thing):
    """The text of what a notebook shows, which asks for nothing from elsewhere."""
    text = thing._repr_html_()
    assert "<script" not in text
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)|url\(", text)
    return Tags(text).said


def gears():
    return Comparison(
        [
            GearReport("eager", True, "", 0.0, 2.0, 0, 0.0),
            GearReport("graph", True, "", 0.5, 1.0, 500, 1e-7, chosen=True),
            GearReport("xla", True, HOSTILE, 1.0, 3.0, None, 2e-7),
            GearReport("fused-xla", False, HOSTILE),
        ]
    )


def test_a_run_plots_each_step_and_the_metrics_of_its_epochs(run):
    figure = run.plot()
    by_name = {trace.name: trace for trace in figure.data}
    loss = run.steps["loss"]
    np.testing.assert_allclose(by_name["loss, by step"].y, loss, rtol=1e-6)
    assert list(by_name["loss, by step"].x) == run.steps["step"].tolist()
    found = [row["val_accuracy"] for row in run.epochs]
    assert list(by_name["val_accuracy, by epoch"].y) == found
    assert list(by_name["val_accuracy, by epoch"].x) == [7, 15, 23]
    assert str(run.path) in figure.layout.title.text


def test_few_points_of_a_run_lie_between_the_least_and_the_greatest(run):
    figure = run.plot("loss", points=4)
    (mean,) = (trace for trace in figure.data if trace.name == "loss, by step")
    high, low = figure.data[:2]
    assert len(mean.y) == 4
    assert (low.y <= mean.y).all()
    assert (mean.y <= high.y).all()


def test_a_run_plots_what_is_named(run):
    figure = run.plot("accuracy")
    names = ["accuracy, by epoch", "val_accuracy, by epoch"]
    assert [trace.name for trace in figure.data] == names


def test_a_watched_run_plots_its_signals(tmp_path):
    made = experiment()
    made.loop.watch = 4
    made.fit(run=tmp_path / "run", verbose=0)
    watched = loopscope.open_run(tmp_path / "run")
    name = next(n for n in watched.signals if n.startswith("gradient_norm/"))
    (trace,) = watched.plot(name).data
    assert list(trace.x) == [0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(trace.y, watched.signals[name])


def test_a_run_cannot_plot_what_it_has_not_recorded(run):
    with pytest.raises(UsageError, match="records no 'nothing'"):
        run.plot("nothing")


def test_a_run_shows_its_epochs_and_its_loss(run):
    text = said(run)
    assert "finished" in text
    assert "loss by step" in text
    for row in run.epochs:
        assert f"{row['val_loss']:.4g}" in text


def test_a_run_without_a_whole_epoch_shows_itself(tmp_path):
    class Stop(Exception):
        pass

    def leave(event):
        if type(event).__name__ == "ChunkEnd" and made.loop.step == 3:
            raise Stop

    made = experiment()
    made.loop.subscribe(leave, chunk_steps={"train": 1})
    with pytest.raises(Stop):
        made.fit(run=tmp_path / "run", verbose=0)
    left = loopscope.open_run(tmp_path / "run")
    assert "interrupted" in said(left)
    assert list(left.plot().data[0].x) == left.steps["step"].tolist() != []


def test_a_step_that_was_run_again_shows_that_and_the_step(rewound):
    text = said(rewound)
    assert "the recorded bits" in text
    assert f"{rewound.loss_recorded:.9g}" in text
    assert "Gradients and updates" in text
    assert html.fragment(rewound.look) in rewound._repr_html_()


def test_a_step_that_was_not_opened_up_shows_what_there_is(run):
    closed = run.rewind(5, look=False)
    assert "Gradients" not in said(closed)
    with pytest.raises(UsageError, match="not opened up"):
        closed.plot()


def test_a_step_plots_its_examples_the_largest_loss_first(rewound):
    look = rewound.look
    examples, gradients, updates = rewound.plot().data
    assert list(examples.x) == [str(i) for i in look.worst]
    np.testing.assert_allclose(examples.y, look.loss_per_example[look.worst])
    worst = look.worst[0]
    assert f"example {look.examples[worst]}, label" in examples.hovertext[0]
    assert list(gradients.x) == [g.path for g in look.gradients]
    np.testing.assert_allclose(updates.y, [u.ratio for u in look.updates])


def test_a_step_without_a_loss_per_example_plots_the_rest():
    loop = fresh(small_loop, FUSED)
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        def compute_loss():
            return keras.ops.mean(keras.ops.square(model(x, training=True)))

        loss, gradients = loopscope.value_and_grad(
            compute_loss, model.trainable_variables
        )
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    figure = loop.look(X[:8], Y[:8]).plot()
    assert len(figure.data) == 2


def test_what_is_not_finite_can_be_plotted():
    x = numbers(8, 4)
    x[3] = np.nan
    figure = fresh(small_loop, FUSED).look(x, Y[:8]).plot()
    assert figure.data[0].x[0] == "3"
    assert "nan" in figure.layout.title.text


def test_gears_plot_where_compiling_has_paid():
    figure = gears().plot()
    bars, *lines = figure.data
    assert list(bars.x) == ["eager", "graph", "xla"]
    crossing = next(t for t in lines if t.name == "graph has paid")
    eager = next(t for t in lines if t.name == "eager")
    assert crossing.x[0] == 500
    assert crossing.y[0] == pytest.approx(1.0)
    assert np.interp(500, eager.x, eager.y) == pytest.approx(crossing.y[0])


def test_gears_show_themselves_as_a_table():
    text = said(gears())
    assert "graph *" in text
    assert "500 steps" in text
    assert HOSTILE in text


@pytest.mark.slow
def test_comparing_a_loop_gives_what_can_be_shown():
    compared = fresh(small_loop, FUSED).compare(X, Y, batch_size=8)
    assert [r["gear"] for r in compared.as_dicts()] == [r.gear for r in compared]
    assert "ms/step" in said(compared)
    assert compared.plot().data[0].x[0] == "eager"


def test_an_estimate_shows_itself_with_the_reason_for_its_gear():
    loop = fresh(small_loop, FUSED)
    found = loop.estimate(X, Y, batch_size=8, epochs=1000)
    text = said(found)
    assert f"8,000 steps in 1,000 epochs: about {in_words(found.total_s)}" in text
    assert f"{FUSED} *" in text
    assert f"ahead of {found.gears[0].gear} after" in text
    assert "why this gear: asked for" in text


def test_an_estimate_of_nothing_measured_shows_why():
    found = Estimate(None, 2, (), "graph", f"graph, since {HOSTILE}", None, 0.1)
    text = said(found)
    assert "an unknown number of steps in 2 epochs" in text
    assert HOSTILE in text
    assert "ms/step" not in text


def test_findings_show_their_evidence_and_hide_no_markup():
    finding = Finding("labels", "error", HOSTILE, HOSTILE, HOSTILE, {"least": 0.123456})
    text = said(finding)
    assert "least 0.1235" in text
    assert text.count(HOSTILE) == 3
    assert "docs/doctor/labels.md" in text


def test_an_examination_shows_its_findings():
    loop = fresh(small_loop, FUSED)
    examination = loop.doctor(1000 * X, Y, batch_size=8, checks=["inputs"])
    assert "unscaled" in said(examination)
    healthy = loop.doctor(X, Y, batch_size=8, checks=["inputs", "labels"])
    assert "2 checks, nothing found" in said(healthy)


def test_a_missing_plotly_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ExtraError, match=r"pip install 'loopscope\[view\]'"):
        gears().plot()
