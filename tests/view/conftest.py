"""One folder of runs, one server and one browser for all tests of the page."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopscope.cli import main

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
EXPERIMENTS = Path(__file__).with_name("broken_mnist.py")
HOSTILE_RUN = "<img src=x onerror=window.hurt=1>"

# Nothing but the page: a browser that is started for the first time asks for much.
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def chromium():
    """The path of Chromium; without one there is nothing to drive."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "there is no Chromium; Debian and Ubuntu: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextlib.contextmanager
def process(*arguments, **more):
    """`loopscope ARGUMENTS`, ended when it is no longer needed."""
    started = subprocess.Popen(
        [sys.executable, "-m", "loopscope.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        **more,
    )
    with started:
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                started.kill()


@pytest.fixture(scope="module")
def shown(chromium, tmp_path_factory):
    """A folder of runs, and the address of its page: (folder, address)."""
    folder = tmp_path_factory.mktemp("shown")
    environment = {
        **os.environ,
        "LOOPSCOPE_CACHE": str(tmp_path_factory.mktemp("cache-of-the-page")),
    }
    with contextlib.ExitStack() as stack:
        live = [f"{EXPERIMENTS}:live", "--run", folder / "live"]
        training = stack.enter_context(process("train", *live, env=environment))
        for name, run in [("hostile", HOSTILE_RUN), ("spike", "spike")]:
            given = [f"{EXPERIMENTS}:{name}", "--run", str(folder / run), "--json"]
            with (
                pytest.MonkeyPatch.context() as patch,
                warnings.catch_warnings(record=True),
            ):
                warnings.simplefilter("always")  # They are events of the runs.
                patch.setenv("LOOPSCOPE_CACHE", environment["LOOPSCOPE_CACHE"])
                done = CliRunner().invoke(main, ["train", *given])
            assert done.exit_code == 0, done.output
        # A test that is run by itself comes before a framework has started.
        while not (folder / "live" / "live.json").exists():
            assert training.poll() is None
            time.sleep(0.1)
        view = ["view", folder, "--port", "0", "--no-open", "--json"]
        server = stack.enter_context(process(*view, env=environment))
        yield folder, json.loads(_document(server.stdout))["address"]


def _document(stream):
    """The lines of the first JSON document of a process."""
    text = ""
    for line in stream:
        text += line
        with contextlib.suppress(ValueError):
            json.loads(text)
            return text
    raise AssertionError(f"the server has ended: {text!r}")


@pytest.fixture(scope="module")
def browser(chromium):
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield found
        found.close()


@pytest.fixture(scope="module")
def undivided(browser, chromium):
    """The same, with frames in the process of their page.

    To a frame in another one, a language that is emulated comes late.
    """
    args = [*QUIET, "--disable-site-isolation-trials"]
    found = browser.browser_type.launch(executable_path=chromium, args=args)
    yield found
    found.close()


@pytest.fixture
def visit(browser, shown):
    """Opens the page as someone would, and sees to it that nothing goes wrong.

    `visit(run="spike", theme="dark", ...)` gives a page of Playwright's. When the test
    is over, the page must have logged no error and asked no other host.
    """
    _, address = shown
    contexts, wrong = [], []
    host = address.split("/#")[0]

    def visit(
        *,
        run="spike",
        theme="light",
        locale="en-US",
        width=1400,
        token=True,
        more="",
        without=None,
    ):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=theme,
            locale=locale,
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        if without is not None:
            page.route(f"**/{without}", lambda route: None)  # It never answers.
        page.on(
            "console",
            lambda said: (
                wrong.append(said.text) if said.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((host, "data:"))
                else wrong.append(request.url)
            ),
        )
        page.wrong = wrong
        start = address if token else f"{host}/#"
        page.goto(f"{start}&run={run}{more}")
        page.wait_for_selector("ol.code li")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def ending(shown):
    """The id of one more live run, which a test may end."""
    folder, _ = shown
    with process("train", f"{EXPERIMENTS}:live", "--run", folder / "ending"):
        while not (folder / "ending" / "live.json").exists():
            time.sleep(0.1)
        yield "ending"


@pytest.fixture
def keep():
    """Keeps a picture of a page: `keep(page, "name")`."""

    def keep(page, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    return keep
