"""`loopscope view` in a process of its own, and who asks it."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

import loopscope

# -P, as the installed program: its working folder has no part in what it imports.
LOOPSCOPE = [sys.executable, "-P", "-m", "loopscope.cli"]
PATIENCE_S = 120


def environment():
    """Of a process: the package of this one, whatever its working folder."""
    path = str(Path(loopscope.__file__).parents[1])
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": ""}
    return {**os.environ, **quiet, "PYTHONPATH": path}


class Page:
    """A page that is served.

    Attributes:
        said: What the command has said of it.
        process: That serves it.
    """

    def __init__(self, said, process):
        self.said, self.process = said, process
        token = {"X-Loopscope-Token": said["token"]}
        address = said["address"].partition("/#")[0]
        self.client = httpx.Client(base_url=address, headers=token, timeout=PATIENCE_S)

    def get(self, what, **query):
        answer = self.client.get(f"/api/{what}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, what, **body):
        return self.client.post(f"/api/{what}", json=body)

    def job(self, what, **body):
        """A job that has come to its end."""
        name = self.post(what, **body).json()["job"]
        return until(
            lambda: self.get("job", id=name), lambda job: job["state"] != "running"
        )

    def until(self, arrived, run="."):
        """The status of a run once it is as it should be."""
        return until(lambda: self.get("status", run=run), arrived)


def until(look, arrived):
    """What is seen once it is as it should be."""
    late = time.monotonic() + PATIENCE_S
    while not arrived(seen := look()):
        assert time.monotonic() < late, seen
        time.sleep(0.02)
    return seen


@contextmanager
def serving(folder, *arguments, cwd=None):
    """The page of a folder, from the command on to its end by Ctrl-C."""
    command = [*LOOPSCOPE, "view", str(folder), "--json", "--no-open", "--port", "0"]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
    )
    try:
        text = ""
        while line := process.stdout.readline():
            text += line
            if line.startswith("}"):
                break
        page = Page(json.loads(text), process)
        with page.client:
            yield page
    finally:
        process.kill()
        process.communicate()
