"""An opened step in a notebook, in a browser: the page's own view of it."""

import re
from dataclasses import replace

import keras
import numpy as np
import pytest
from test_page import SPIKE, barriers, opened

import loopscope
from loopscope.look.opened import NonFinite
from models import FUSED, fresh, small_loop

pytestmark = pytest.mark.once

HURT = "<img src=x onerror=window.top.hurt=1>"
HOSTILE = f"</script><!--<script>window.top.hurt=1</script>{HURT}' \" &lt;"

LIGHT = "background: #fff; color: #222"
DARK = "background: #111; color: #eee"

# The policy that VS Code has for notebooks, where it has one.
STRICT = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; child-src https: data:"
)


@pytest.fixture(scope="module")
def step():
    (x, y), _ = loopscope.datasets.mnist()
    x, y = x[:64].reshape(-1, 784) / 255.0, y[:64]
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(16, "relu", name="hidden"),
            keras.layers.Dense(10, name="scores"),
        ]
    )
    return fresh(lambda gear: small_loop(gear, model=model), FUSED).look(x, y)


@pytest.fixture
def notebook(browser):
    """Puts what a cell shows where a notebook puts it.

    `notebook(html, ...)` gives a page of Playwright's. When the test is over, nothing
    must have been asked for, and no error logged.
    """
    contexts, wrong = [], []

    def notebook(
        html,
        *,
        look=LIGHT,
        width=900,
        policy=None,
        scripts=True,
        browser=browser,
        **more,
    ):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            reduced_motion="reduce",
            java_script_enabled=scripts,
            **more,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url))
        meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        page.set_content(
            f'<!doctype html><html lang="en"><head>{meta if policy else ""}'
            f'<title>A notebook</title></head><body style="margin: 0; {look}">'
            f'<main id="output">{"" if scripts else html}</main>'
        )
        if scripts:
            into = "html => { document.querySelector('#output').innerHTML = html }"
            page.evaluate(into, html)
        page.wrong = wrong
        return page

    yield notebook
    for context in contexts:
        context.close()
    assert [said for said in wrong if not said.startswith("data:image/png")] == []


def within(page):
    """The frame, once it is shown and as high as what is in it."""
    page.wait_for_selector("iframe", state="visible")
    frame = page.frames[1]
    frame.wait_for_selector("#step-found .part.times")
    for _ in range(200):
        high = frame.evaluate("document.body.getBoundingClientRect().height")
        if abs(page.locator("iframe").bounding_box()["height"] - high) < 1:
            return frame
        page.wait_for_timeout(25)
    raise AssertionError("the frame is not as high as what is in it")


def test_an_opened_step_is_the_view_of_the_page(step, notebook, keep):
    page = notebook(step._repr_html_())
    frame = within(page)
    # The static form has made place.
    assert page.locator("div.loopscope").is_hidden()
    assert frame.inner_text("#step-number") == "Step 0"
    assert "same bits" not in frame.inner_text(".facts")
    assert f"{step.loss:.6f}"[:6] in frame.inner_text(".facts")
    losses = [
        float(said.split("\n")[-1])
        for said in frame.locator(".examples li").all_inner_texts()
    ]
    assert len(losses) == 24
    assert losses == sorted(losses, reverse=True)
    assert frame.locator(".examples img").first.evaluate("i => i.naturalWidth") == 28
    frame.get_by_role("button", name="Show all 64").click()
    within(page)
    assert frame.locator(".examples li").count() == 64
    # Biases are zero before the first step: an update is no part of them.
    assert frame.locator(".part.heat td.heated").count() == 6
    assert "hidden/kernel" in frame.inner_text(".part.variables")
    assert "Dense" in frame.inner_text(".part.layers")
    assert "forward" in frame.inner_text(".part.times")
    keep(page, "notebook")


def test_hostile_names_are_text_in_a_notebook_as_well(step, notebook):
    spoilt = replace(
        step,
        layers=[replace(o, path=HOSTILE) for o in step.layers],
        gradients=[replace(g, path=HOSTILE) for g in step.gradients],
        updates=[replace(u, path=HOSTILE) for u in step.updates],
        losses={HOSTILE: 1.0, "other": float("nan")},
        phases={HOSTILE: 1.0},
        missing=[HOSTILE],
        first_nonfinite=NonFinite("operation", HOSTILE, HOSTILE),
        labels=[np.array([HOSTILE] * 64)],
        gear=HOSTILE,
    )
    page = notebook(spoilt._repr_html_())
    frame = within(page)
    for part in (".facts", ".trouble", ".layers", ".heat", ".variables", ".times"):
        assert HOSTILE in frame.inner_text(f"#step-found {part}"), part
    assert HOSTILE in frame.locator(".examples img").first.get_attribute("alt")
    assert frame.locator("img:not([src^='data:image/png'])").count() == 0
    assert page.evaluate("window.hurt") is None
    # What is in the frame reaches nothing around it.
    reach = "(() => { try { return !top.document } catch { return true } })()"
    assert frame.evaluate(reach)


STRIPPED = re.compile(r"<iframe.*?</iframe>", re.S)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda html: STRIPPED.sub("", html), {}),
        (lambda html: re.sub(r'onload=".*?"', "", html, flags=re.S), {}),
        (lambda html: html, {"scripts": False}),
    ],
    ids=["the frame is taken out", "its handler is taken out", "no script runs"],
)
def test_where_scripts_do_not_run_the_static_form_stays(step, notebook, change, how):
    page = notebook(change(step._repr_html_()), **how)
    page.wait_for_timeout(300)
    assert page.locator("iframe:visible").count() == 0
    text = page.inner_text("#output")
    assert "Examples, the largest loss first" in text
    assert "hidden/kernel" in text
    assert page.locator("div.loopscope img:visible").count() == 16


@pytest.mark.slow
def test_it_is_shown_under_a_policy_that_lets_only_scripts_within_run(step, notebook):
    frame = within(notebook(step._repr_html_(), policy=STRICT))
    assert frame.locator(".examples img").first.evaluate("i => i.naturalWidth") == 28


@pytest.mark.slow
@pytest.mark.parametrize(
    "ask",
    [
        "document.images[0].src = 'https://example.com/a.png'",
        "fetch('https://example.com/').catch(() => null)",
        "document.head.append(Object.assign(document.createElement('script'), "
        "{ textContent: 'window.hurt = 1' }))",
    ],
    ids=["a picture", "anything", "a script"],
)
def test_the_policy_of_the_frame_refuses_what_it_did_not_bring(step, notebook, ask):
    page = notebook(step._repr_html_())
    frame = within(page)
    page.wrong.clear()
    refused, came = [], []
    page.on("requestfailed", lambda asked: refused.append(asked.failure))
    page.on("requestfinished", lambda asked: came.append(asked.url))
    frame.evaluate(f"() => {{ {ask} }}")
    page.wait_for_timeout(200)
    assert frame.evaluate("window.hurt") is None
    assert "Content Security Policy" in page.wrong[0]
    assert came == []
    assert set(refused) <= {"csp"}
    page.wrong.clear()


@pytest.mark.slow
def test_it_stands_before_anyone_has_scrolled_to_it(step, notebook):
    above = '<div style="height: 9000px"></div>'
    within(notebook(above + step._repr_html_()))


@pytest.mark.slow
def test_a_theme_that_is_switched_is_taken_over(step, notebook):
    page = notebook(step._repr_html_())
    frame = within(page)
    for look, theme in ((DARK, "dark"), (LIGHT, "light")):
        page.evaluate(f"document.body.style = '{look}'")
        frame.wait_for_selector(f"html[data-theme={theme}]")


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
@pytest.mark.parametrize("look", [LIGHT, DARK], ids=["light", "dark"])
def test_axe_finds_no_barrier_in_a_notebook(
    step, notebook, undivided, keep, look, locale
):
    # The theme is the notebook's, whatever the system has.
    scheme = "dark" if look == LIGHT else "light"
    page = notebook(
        step._repr_html_(),
        look=look,
        locale=locale,
        color_scheme=scheme,
        width=360,
        browser=undivided,
    )
    frame = within(page)
    assert frame.get_attribute("html", "lang") == locale[:2]
    theme = "light" if look == LIGHT else "dark"
    assert frame.get_attribute("html", "data-theme") == theme
    title = {"en": "One step, opened", "ko": "스텝 들여다보기"}[locale[:2]]
    assert frame.inner_text("h1") == title
    assert frame.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert barriers(frame) == []
    assert page.get_attribute("iframe", "title") == "Step 0, opened"
    keep(page, f"notebook-{locale[:2]}-{theme}")


@pytest.mark.slow
def test_a_rewound_step_is_what_the_page_shows_for_it(shown, visit, notebook, keep):
    folder, _ = shown
    run = loopscope.open_run(folder / "spike")
    rewound = run.rewind(SPIKE)
    run.close()
    page = visit(more=f"&step={SPIKE}")
    opened(page)
    output = notebook(rewound._repr_html_())
    frame = within(output)
    assert frame.inner_text("#step-number") == f"Step {SPIKE}"
    assert "same bits" in frame.inner_text(".facts")
    for part in (".facts", ".pictures", ".heat", ".layers", ".variables"):
        get = "part => part.outerHTML"
        there = page.locator(f"#step-found {part}").first.evaluate(get)
        assert frame.locator(f"#step-found {part}").first.evaluate(get) == there, part
    keep(output, "notebook-rewound")
