"""`loopscope view`, and `--view` beside a training, as a user runs them."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner
from program import loaded_by

from loopscope.cli import main
from page_server import LOOPSCOPE, environment, serving, until

pytestmark = pytest.mark.once


def test_help_imports_neither_a_framework_nor_a_server():
    found = loaded_by(["view", "--help"], "numpy", "starlette", "uvicorn", "plotly")
    assert found == "[]"


def test_the_page_is_served_until_ctrl_c_and_imports_no_framework(tmp_path):
    with serving(tmp_path) as page:
        assert page.said["address"].startswith("http://127.0.0.1:")
        assert page.said["address"].endswith(f"/#token={page.said['token']}")
        assert page.get("runs") == {"runs": []}
        assert "<html" in page.client.get("/").text
        with open(f"/proc/{page.process.pid}/maps") as maps:
            loaded = maps.read()
        assert "tensorflow" not in loaded
        # It listens to this machine and nobody else.
        with socket.socket() as other, pytest.raises(OSError, match="refused"):
            other.connect(("127.0.0.2", page.said["port"]))
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(30) == 0


def test_a_port_that_is_taken_is_refused_and_the_usual_one_replaced(tmp_path):
    with serving(tmp_path) as page:
        port = page.said["port"]
        arguments = ["view", str(tmp_path), "--no-open", "--port", str(port)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert f"Port {port} cannot be had" in result.stderr


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["view", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "There is no folder" in result.stderr
    assert "loopscope view runs" in result.stderr


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['starlette'] = None\n"  # As if it were not installed.
        "from loopscope.cli import main\n"
        f"main(['view', {str(tmp_path)!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "not installed: starlette" in done.stderr
    assert "pip install 'loopscope[view]'" in done.stderr


def test_view_beside_a_training_needs_a_run():
    arguments = ["train", "mnist", "--view", "--no-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "nothing is recorded" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "mnist", "resume", "branch"])
def test_view_shows_a_training_and_ends_with_it(command, tmp_path):
    arguments = {
        "train": ["train", "mnist", "--epochs", "2"],
        "mnist": ["mnist", "--epochs", "1", "--eager-epochs", "1"],
        "resume": ["resume", "runs/a", "--epochs", "2"],
        "branch": ["resume", "a", "--from-step", "400", "--run", "runs/b"],
    }[command]
    if "resume" in arguments:
        begun(tmp_path / arguments[1])
    with subprocess.Popen(
        [*LOOPSCOPE, *arguments, "--view", "--json"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        line = training.stderr.readline()
        assert line.startswith("shown at http://127.0.0.1:")
        page = children(training.pid)
        said = json.loads(training.stdout.read())
        assert training.wait(30) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "run.json").exists()
    assert said["run"] == f"runs/{run.name}"
    assert len(page) == 1
    until(lambda: os.path.exists(f"/proc/{page[0]}"), lambda there: not there)


def begun(path):
    """A run of one epoch."""
    done = subprocess.run(
        [*LOOPSCOPE, "train", "mnist", "--epochs", "1", "--run", str(path), "--json"],
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "resume"])
def test_the_chief_of_several_workers_shows_the_run(command, tmp_path):
    path = tmp_path / "run"
    arguments = ["train", "mnist", "--run", str(path)]
    if command == "resume":
        begun(path)
        arguments = ["resume", str(path)]
    done = subprocess.run(
        [*LOOPSCOPE, *arguments, "--epochs", "2", "--workers", "2", "--view", "--json"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("shown at http://127.0.0.1:") == 1
    assert json.loads(done.stdout)["epochs"] == 2


@pytest.mark.slow
def test_on_a_terminal_the_page_stays_until_ctrl_c(tmp_path):
    main_end, end = pty.openpty()
    with subprocess.Popen(
        [*LOOPSCOPE, "train", "mnist", "--epochs", "1", "--view"],
        cwd=tmp_path,
        env={**environment(), "BROWSER": "true"},
        stdout=end,
        stderr=end,
    ) as training:
        os.close(end)
        text = ""
        while "Ctrl-C ends it" not in text:
            text += os.read(main_end, 4096).decode()
        assert "The page stays at http://127.0.0.1:" in text
        assert training.poll() is None
        (page,) = children(training.pid)
        training.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while os.read(main_end, 4096):
                pass
        assert training.wait(30) == 0
    os.close(main_end)
    assert not os.path.exists(f"/proc/{page}")


@pytest.mark.slow
def test_the_page_of_a_training_that_is_killed_ends_too(tmp_path):
    with subprocess.Popen(
        [*LOOPSCOPE, "train", "mnist", "--epochs", "100", "--view", "--json"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        training.stderr.readline()
        page = children(training.pid)
        training.kill()
    until(lambda: os.path.exists(f"/proc/{page[0]}"), lambda there: not there)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
