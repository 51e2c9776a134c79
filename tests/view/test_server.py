"""The page's server: who may ask it, and what it answers, on real runs."""

import asyncio
import json
import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import keras
import numpy as np
import pytest

from loopscope import open_run
from loopscope.experiment import load
from loopscope.run import reading
from loopscope.run.folder import Folder
from loopscope.run.following import Following
from loopscope.run.journal import JournalWriter
from loopscope.view.page.server import application
from models import FUSED, blobs, small_loop
from page_server import serving, until

pytestmark = pytest.mark.once

HERE = "http://127.0.0.1:8765"
TOKEN = {"X-Loopscope-Token": "secret"}
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two runs: MNIST, and one whose names are hostile."""
    keras.utils.set_random_seed(0)
    place = tmp_path_factory.mktemp("runs")
    made = load("mnist", options={"batch_size": 500, "gear": FUSED})
    made.loop.watch = 20
    made.fit(epochs=2, run=place / "mnist", verbose=0)
    loop = small_loop(FUSED)
    model = loop.model

    @loop.train_step
    def train_step(x, y):
        # <script>alert("a comment")</script>
        return {HOSTILE: keras.ops.mean(model(x) ** 2)}

    x, y = blobs(32)
    loop.fit(x, y, batch_size=8, epochs=1, run=place / "<i>hostile" / "a&b", verbose=0)
    return place


@pytest.fixture(scope="module")
def client(folder):
    return Asking(application(folder, "secret"))


class Asking:
    """Asks an application that no process serves."""

    def __init__(self, app):
        self._app = app

    def get(self, path, **more):
        return self._request("GET", path, **more)

    def post(self, path, **more):
        return self._request("POST", path, **more)

    def _request(self, *what, **more):
        async def asked():
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
                return await client.request(*what, **more)

        return asyncio.run(asked())


def answered(client, what, status=200, **query):
    answer = client.get(f"/api/{what}", params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


# Who may ask.


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "localhost.a"],
)
def test_a_name_of_another_machine_that_leads_here_is_refused(client, host):
    answer = client.get("/api/runs", headers={"Host": host})
    assert answer.status_code == 403
    assert set(answer.json()) == {"error", "next", "code", "about"}


@pytest.mark.parametrize(
    "host", ["localhost:8765", "127.0.0.1", "[::1]:9", "LOCALHOST"]
)
def test_names_of_this_machine_are_taken_at_any_port(client, host):
    assert client.get("/api/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_is_refused(client, headers):
    for path in ("/api/runs", "/static/index.html"):
        assert client.get(path, headers=headers).status_code == 403
    answer = client.post("/api/open", json={}, headers={**TOKEN, **headers})
    assert answer.status_code == 403


def test_the_page_itself_is_taken(client):
    headers = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/runs", headers=headers).status_code == 200
    # A link to the page may be anywhere.
    there = client.get("/", headers={"Sec-Fetch-Site": "cross-site"})
    assert there.status_code == 200


@pytest.mark.parametrize("token", [None, "", "secre", "Secret", "sécret"])
def test_nothing_is_done_without_the_token(client, token):
    given = {} if token is None else {"X-Loopscope-Token": token.encode("latin-1")}
    for route in ("control", "open", "compare", "doctor", "cancel", "nowhere"):
        body = {"run": "mnist", "step": 1}
        answer = client.post(f"/api/{route}", json=body, headers=given)
        assert answer.status_code == 403
        assert "token" in answer.json()["error"]


def test_every_answer_forbids_foreign_code(client):
    for path in ("/", "/api/runs", "/api/nothing", "/static/nothing"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data:; ")
        assert "script-src" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"


# Nothing outside.


def test_only_ids_of_runs_that_are_inside_are_taken(folder, tmp_path):
    shown, other = tmp_path / "shown", tmp_path / "other"
    shown.mkdir()
    shutil.copytree(folder / "mnist", shown / "mnist")
    shutil.copytree(folder / "mnist", other)
    (shown / "link").symlink_to(other)
    # Its manifest is here, and its journal another run's.
    shutil.copytree(folder / "mnist", shown / "half")
    (shown / "half" / "journal.sqlite").unlink()
    (shown / "half" / "journal.sqlite").symlink_to(other / "journal.sqlite")
    client = Asking(application(shown, "secret"))
    assert [r["id"] for r in answered(client, "runs")["runs"]] == ["mnist"]
    outside = ["..", "../other", "mnist/../../other", str(other), "/", "link", "half"]
    unknown = [
        "./mnist",
        "mnist/",
        "mnist/../mnist",
        ".",
        "mnist/checkpoints",
        "mnist\0",
    ]
    for run in [*outside, *unknown]:
        for route in ("run", "status", "curve", "epochs", "checkpoints"):
            assert "no run" in answered(client, route, 404, run=run)["error"]
        for route in ("control", "open", "compare", "doctor"):
            body = {"run": run, "action": "save", "step": 1}
            answer = client.post(f"/api/{route}", json=body, headers=TOKEN)
            assert answer.status_code == 404
    assert not (other / "control.jsonl").exists()


@pytest.mark.parametrize(
    "path",
    [
        "../server.py",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "%2fetc/passwd",
        "//etc/passwd",
    ],
)
def test_no_file_but_the_page_s_own_is_served(client, path):
    assert client.get(f"/static/{path}").status_code == 404


def test_a_run_itself_can_be_shown(folder):
    client = Asking(application(folder / "mnist", "secret"))
    assert [r["id"] for r in answered(client, "runs")["runs"]] == ["."]
    assert answered(client, "status", run=".")["step"] == 200


def test_names_of_a_run_are_no_markup(client):
    run = "<i>hostile/a&b"
    found = answered(client, "run", run=run)
    assert found["names"]["outputs"] == [HOSTILE]
    assert any("<script>" in line["text"] for line in found["code"]["lines"])
    for what, query in {
        "runs": {},
        "run": {"run": run},
        "curve": {"run": run, "name": HOSTILE},
        "events": {"run": run},
        "status": {"run": HOSTILE},
        "nothing": {},
    }.items():
        answer = client.get(f"/api/{what}", params=query)
        assert answer.headers["Content-Type"] == "application/json"
        assert not set("<>&") & set(answer.text)


# What is answered.


def test_runs_are_listed_newest_first(client, folder):
    runs = answered(client, "runs")["runs"]
    assert [r["id"] for r in runs] == ["<i>hostile/a&b", "mnist"]
    expected = reading.summary(Folder(folder / "mnist")).as_dict()
    assert {n: v for n, v in runs[1].items() if n != "id"} == expected


def test_a_run_has_its_code_names_and_manifest(client):
    found = answered(client, "run", run="mnist")
    roles = [line["role"] for line in found["code"]["lines"]]
    expected = ["epoch", "data", "step", "forward", "loss", "backward", "apply"]
    assert [r for r in dict.fromkeys(roles) if r in expected] == expected
    assert {"metrics", "validation"} < set(roles)
    assert [line["n"] for line in found["code"]["lines"]] == [*range(1, len(roles) + 1)]
    names = found["names"]
    assert names["outputs"] == ["loss"]
    assert set(names["epochs"]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert "gradient_norm/mnist/dense_1" in names["signals"]
    assert found["manifest"]["origin"]["experiment"] == "mnist"
    assert found["gears"] is None


def test_an_own_step_is_shown_as_it_was_written(client):
    lines = answered(client, "run", run="<i>hostile/a&b")["code"]["lines"]
    (line,) = (line for line in lines if "keras.ops.mean" in line["text"])
    assert line["role"] == "forward"
    (line,) = (line for line in lines if "def train_step" in line["text"])
    assert line["role"] == "step"


def test_a_finished_run_says_where_it_ended(client):
    found = answered(client, "status", run="mnist")
    assert (found["status"], found["live"]) == ("finished", None)
    assert (found["step"], found["epoch"], found["epochs"]) == (200, 1, 2)
    assert (found["index"], found["steps_per_epoch"]) == (100, 100)
    assert found["gear"] == FUSED
    assert found["shapes"]["data"] == "(500, 784) uint8, (500,) uint8"
    assert found["shapes"]["forward"] == "(500, 10) float32"
    roles = {"data", "step", "compiling", "callbacks", "validation", "saving"}
    assert set(found["seconds"]) == roles
    assert found["seconds"]["step"] > 0 < found["seconds"]["validation"]
    ids = [e["id"] for e in found["events"]]
    assert ids == [*range(1, len(ids) + 1)]
    later = answered(client, "status", run="mnist", after=ids[-2])["events"]
    assert [e["id"] for e in later] == ids[-1:]
    assert later[0]["kind"] == "finished"


def test_a_curve_is_what_the_journal_has(client, folder):
    loss = open_run(folder / "mnist").steps["loss"]
    whole = answered(client, "curve", run="mnist")
    assert (whole["start"], whole["stop"]) == (0, 200)
    assert whole["step"] == [*range(200)]
    assert np.array_equal(np.float32(whole["mean"]), loss)
    assert whole["time"] == sorted(whole["time"])
    part = answered(client, "curve", run="mnist", start=50, stop=150, points=10)
    assert part["step"] == [*range(50, 150, 10)]
    assert np.allclose(part["low"], loss[50:150].reshape(10, 10).min(1))
    assert np.allclose(part["high"], loss[50:150].reshape(10, 10).max(1))
    assert np.allclose(part["mean"], loss[50:150].reshape(10, 10).mean(1))
    assert answered(client, "curve", run="mnist", start=500)["step"] == []


def test_epochs_signals_events_and_checkpoints_are_those_of_the_run(client, folder):
    run = open_run(folder / "mnist")
    epochs = answered(client, "epochs", run="mnist")["epochs"]
    assert [(e["epoch"], e["first_step"], e["steps"]) for e in epochs] == [
        (0, 0, 100),
        (1, 100, 100),
    ]
    assert epochs[1]["logs"]["val_accuracy"] == run.epochs[1]["val_accuracy"]
    signals = answered(client, "signals", run="mnist")
    name = "update_ratio/mnist/dense_1"
    assert signals["step"] == run.signals["step"].tolist() == [*range(0, 200, 20)]
    assert np.allclose(signals["values"][name], run.signals[name])
    few = answered(client, "signals", run="mnist", start=100, points=1)
    assert few["step"] == [100]
    assert np.isclose(few["values"][name][0], run.signals[name][5:].mean())
    events = answered(client, "events", run="mnist", kind="compiled")["events"]
    assert events
    assert {e["kind"] for e in events} == {"compiled"}
    assert set(events[0]) == {"id", "step", "kind", "data", "time"}
    found = answered(client, "checkpoints", run="mnist")["checkpoints"]
    assert found[0]["step"] == 0
    assert found[-1]["name"].endswith("-end")


def test_numbers_that_are_none_are_text(tmp_path):
    folder = journal_of(tmp_path, np.float32([1, np.nan, np.inf, -np.inf]))
    client = Asking(application(folder.path, "secret"))
    found = answered(client, "curve", run=".")
    assert found["mean"] == [1.0, "nan", "nan", "nan"]
    assert found["low"] == [1.0, "nan", "nan", "nan"]
    assert answered(client, "runs")["runs"][0]["loss"] == "-inf"


def journal_of(path, *rows):
    """A run of which the journal has these losses."""
    folder = Folder(path)
    folder.make()
    folder.write_manifest(
        {
            "id": "0" * 32,
            "created": "2026-01-01T00:00:00Z",
            "origin": {},
            "script": ["long.py"],
            "first_step": 0,
            "identity": {"backend": "none", "gear": "eager"},
        }
    )
    add(folder, 0, *rows)
    return folder


def add(folder, first, *rows, event=None):
    journal = JournalWriter(folder.journal_path)
    with journal.transaction():
        if event is not None:
            number = journal.next_event()
            journal.put("events", [(number, first, event, "{}", time.time())])
        for values in rows:
            row = (first, "loss", len(values), values.dtype.str, values.tobytes(), 1.0)
            journal.put("steps", [row])
            first += len(values)
    journal.close()


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"run": "mnist", "points": "many"}, 400),
        ({"run": "mnist", "points": 0}, 400),
        ({"run": "mnist", "points": 10**9}, 400),
        ({"run": "mnist", "start": "1.5"}, 400),
        ({"run": "mnist", "start": "9" * 40}, 400),
        ({}, 400),
        ({"run": "mnist", "name": "no such"}, 404),
        ({"run": "none"}, 404),
    ],
)
def test_a_wrong_question_is_told_what_to_do(client, query, status):
    found = answered(client, "curve", status, **query)
    assert found["error"]
    assert found["next"]
    assert (found["code"] != "") == (status == 404)


@pytest.mark.parametrize("body", ["", "[]", "{", "[" * 5000, '{"run": 3}', "1" * 10**5])
def test_a_body_that_is_no_question_is_refused(client, body):
    for route in ("control", "open", "doctor"):
        answer = client.post(f"/api/{route}", content=body, headers=TOKEN)
        assert answer.status_code == 400


def test_nothing_is_asked_of_a_run_that_nobody_trains(client):
    body = {"run": "mnist", "action": "pause"}
    answer = client.post("/api/control", json=body, headers=TOKEN)
    assert answer.status_code == 409
    assert "Nothing trains" in answer.json()["error"]
    answer = client.post("/api/control", json={**body, "action": "x"}, headers=TOKEN)
    assert answer.status_code == 400


def test_a_damaged_run_is_said_to_be_so(folder, tmp_path):
    shutil.copytree(folder / "mnist", tmp_path / "a")
    data = bytearray((tmp_path / "a" / "journal.sqlite").read_bytes())
    data[4096:8192] = bytes(4096)
    (tmp_path / "a" / "journal.sqlite").write_bytes(data)
    client = Asking(application(tmp_path, "secret"))
    (found,) = answered(client, "runs")["runs"]
    assert found["status"] == "damaged"
    assert "damaged" in answered(client, "status", 409, run="a")["error"]


def test_plotly_is_served_from_its_package(client):
    answer = client.get("/static/plotly.min.js")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/javascript")
    assert b"plotly.js" in answer.content[:200]


# Following.


def test_a_run_that_grows_is_read_on_from_where_it_was(tmp_path):
    folder = journal_of(tmp_path, np.arange(3, dtype="<f4"))
    following = Following(folder)
    first = following.look()
    assert following.look() is first
    add(folder, 3, np.arange(3, 5, dtype="<f4"), np.arange(5, 9, dtype="<f4"))
    assert following.look().series["loss"].values.tolist() == [*range(9)]
    assert first.series["loss"].values.tolist() == [0, 1, 2]


def test_what_the_disk_takes_long_for_is_seen_once_it_is_there(tmp_path, monkeypatch):
    folder = journal_of(tmp_path, np.arange(3, dtype="<f4"))
    journal = JournalWriter(folder.journal_path)

    def put(first):
        values = np.arange(first, first + 2, dtype="<f4")
        with journal.transaction():
            row = (first, "loss", 2, values.dtype.str, values.tobytes(), 1.0)
            journal.put("steps", [row])

    put(3)
    following = Following(folder)
    assert following.look().stop == 5
    # Whoever looks while the disk takes the log sees it at its last size and time.
    now = {path: os.stat(path) for path in following._files() if path.exists()}
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path: now.get(path) or stat(path))
    put(5)
    assert following.look().stop == 7
    journal.close()


def test_a_run_that_was_cut_and_trained_on_is_read_anew(tmp_path):
    folder = journal_of(tmp_path, np.arange(9, dtype="<f4"))
    add(folder, 0, event="begin")
    following = Following(folder)
    assert following.look().stop == 9
    journal = JournalWriter(folder.journal_path)
    with journal.transaction():
        journal.cut(4, 0, 0, begun=True)
    journal.close()
    add(folder, 4, -np.ones(2, dtype="<f4"), event="resume")
    assert following.look().series["loss"].values.tolist() == [0, 1, 2, 3, -1, -1]


# Jobs.


def test_a_step_is_opened_in_another_process(folder):
    recorded = open_run(folder / "mnist").steps["loss"]
    with serving(folder) as page:
        job = page.job("open", run="mnist", step=123)
        assert (job["state"], job["error"]) == ("done", None)
        step = job["result"]
        assert (step["step"], step["steps"]) == (123, 200)
        assert step["same_bits"] is True
        assert np.float32(step["recorded_loss"]) == recorded[123]
        shown = step["pictures"]
        assert len(shown) == 500
        assert shown[0]["picture"].startswith("data:image/png;base64,")
        losses = [example["loss"] for example in shown]
        assert losses == sorted(losses, reverse=True)
        assert step["why"]["step"] == 123
        assert step["why"]["story"][0].startswith("Step 123 has a loss of")
        assert step["why"]["earlier"][1]["kind"] == "half_rate"
        heat = step["heat"]
        assert heat["paths"][0] == "mnist/dense_1/kernel"
        assert len(heat["paths"]) == len(heat["gradient_norm"]) == 6
        assert all(ratio > 0 for ratio in heat["update_ratio"])
        # What is wrong with the question is said, and the next one answered.
        job = page.job("open", run="mnist", step=2000)
        assert job["state"] == "failed"
        assert "the steps 0 to 199" in job["error"]["error"]
        assert job["error"]["code"] == "no_step"
        assert job["error"]["about"] == {"step": 2000, "first": 0, "last": 199}
        job = page.job("open", run="<i>hostile/a&b", step=0)
        assert "begun by `fit` in a script" in job["error"]["error"]
        workers = children(page.process.pid)
        assert workers
    until_gone(workers)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def until_gone(pids):
    until(
        lambda: [p for p in pids if os.path.exists(f"/proc/{p}")], lambda left: not left
    )


def test_a_job_that_nobody_asked_for_is_not_there(client):
    assert answered(client, "job", 404, id="7")["next"] == "Ask the question again."
    answer = client.post("/api/cancel", json={"id": "7"}, headers=TOKEN)
    assert answer.status_code == 404


@pytest.mark.slow
def test_gears_are_compared_and_the_doctor_is_asked(folder):
    with serving(folder) as page:
        rows = page.job("compare", run="mnist")["result"]["rows"]
        assert {r["gear"] for r in rows} >= {"eager", FUSED}
        assert rows[0]["max_relative_difference"] == 0
        findings = page.job("doctor", run="mnist")["result"]["findings"]
        assert [f["check"] for f in findings] == ["inputs", "saturation"]


@pytest.mark.slow
def test_a_waiting_question_can_be_cancelled_and_the_story_gives_way(folder):
    with serving(folder) as page:
        names = [
            page.post("open", run="mnist", step=step).json()["job"]
            for step in (10, 11, 12)
        ]
        assert page.post("cancel", id=names[1]).status_code == 200
        jobs = [ended(page, name) for name in names]
        assert [job["state"] for job in jobs] == ["done", "cancelled", "done"]
        assert jobs[1]["error"] is None
        assert jobs[0]["result"]["why"] is None
        assert jobs[2]["result"]["why"]


def ended(page, name):
    return until(
        lambda: page.get("job", id=name), lambda job: job["state"] != "running"
    )


def test_a_job_that_runs_is_cancelled_and_another_process_takes_the_next(folder):
    with serving(folder) as page:

        def begun():
            name = page.post("open", run="mnist", step=5).json()["job"]
            until(
                lambda: page.get("job", id=name),
                lambda job: job["doing"]["what"] == "framework",
            )
            return name, children(page.process.pid)

        name, workers = begun()
        page.post("cancel", id=name, only="waiting")
        assert page.get("job", id=name)["state"] == "running"
        assert page.post("cancel", id=name).json() == {"cancelled": name}
        job = page.get("job", id=name)
        assert (job["state"], job["error"], job["result"]) == ("cancelled", None, None)
        until_gone(workers)
        other, others = begun()
        assert not set(others) & set(workers)
        page.post("cancel", id=other)
        until_gone(others)
        assert page.get("job", id=name)["state"] == "cancelled"


@pytest.mark.slow
def test_after_a_cancelled_job_a_step_is_opened(folder):
    with serving(folder) as page:
        for what in ("framework", "rewind"):
            name = page.post("open", run="mnist", step=7).json()["job"]
            until(
                lambda name=name: page.get("job", id=name),
                lambda job, what=what: job["doing"]["what"] == what,
            )
            page.post("cancel", id=name)
            assert page.get("job", id=name)["state"] == "cancelled"
        assert page.job("open", run="mnist", step=7)["result"]["same_bits"] is True
        # What is done is not cancelled any more.
        page.post("cancel", id="3")
        assert page.get("job", id="3")["state"] == "done"


@pytest.mark.slow
def test_a_process_that_dies_says_so_and_another_one_answers(folder, tmp_path):
    with serving(folder) as page:
        name = page.post("open", run="mnist", step=1).json()["job"]
        workers = until(lambda: children(page.process.pid), bool)
        os.kill(workers[0], signal.SIGKILL)
        job = ended(page, name)
        assert "has ended" in job["error"]["error"]
        assert page.job("open", run="mnist", step=1)["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["own", "another", "module", "working folder"])
def test_code_in_a_run_folder_is_not_run_by_opening_a_step(where, folder, tmp_path):
    shutil.copytree(folder / "mnist", tmp_path / "run")
    shutil.copytree(folder / "mnist", tmp_path / "other")
    evil = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    place = {"own": "run", "another": "other"}.get(where, "run")
    for name in ("evil.py", "json.py", "numpy.py"):
        (tmp_path / place / name).write_text(evil)
    manifest = json.loads((tmp_path / "run/run.json").read_text())["content"]
    manifest.pop("format")
    if where in ("own", "another"):
        manifest["origin"]["function"] = f"{tmp_path / place / 'evil.py'}:make"
    else:
        manifest["origin"]["function"] = "evil:make"
    if where == "working folder":
        manifest["working_folder"] = str(tmp_path / "run")
    Folder(tmp_path / "run").write_manifest(manifest)
    cwd = tmp_path / "run" if where == "module" else tmp_path
    with serving(tmp_path / "run", cwd=cwd) as page:
        job = page.job("open", run=".", step=1)
        assert job["state"] == "failed"
    assert not (tmp_path / "executed").exists()
