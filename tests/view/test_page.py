"""The page in a browser: all of it is clicked, on finished runs and on a live one."""

import json
import re

import pytest

pytestmark = pytest.mark.once

SPIKE = 60
"""The step of the run `spike` that has one."""


def opened(page):
    """Wait until the step that is asked for is there, its story too."""
    page.wait_for_selector("#step-found:not(.old) .story")
    return page.inner_text("#step-number")


def until(page, expression):
    """Wait until an expression is true; Playwright's own way needs `eval`."""
    for _ in range(1_200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it has never been true: {expression}")


def drawn(page):
    """Wait until a chart is there, with its lines."""
    page.wait_for_selector("#charts .plot .scatterlayer .trace")


def barriers(page):
    """What axe finds on a page, as text."""
    from axe_core_python.sync_playwright import Axe

    return [json.dumps(found)[:2_000] for found in Axe().run(page)["violations"]]


def asked(page, path):
    """The queries of the requests for `path`, from now on."""
    found = []
    page.on("request", lambda r: found.append(r.url) if f"/api/{path}?" in r.url else 0)
    return found


def test_it_shows_runs_and_where_the_one_in_focus_stands(visit, keep):
    page = visit()
    drawn(page)
    assert "token" not in page.url
    assert "loopscope" in page.title()
    assert page.inner_text("#name") == "spike"
    page.wait_for_selector("nav .name:text-is('live')")
    assert page.inner_text("#gauge-status dd") == "finished"
    assert page.inner_text("#gauge-gear dd") == "graph"
    assert page.inner_text("#gauge-step dd").startswith("200")
    code = page.inner_text("ol.code")
    assert "for epoch in range" in code
    assert "model.compute_loss(x, y, y_pred)" in code
    assert "(64, 784) float32" in code
    # Nothing trains here: the controls say so, and do nothing.
    page.wait_for_selector("#why-not:has-text('this run is finished')")
    button = page.locator("#do-pause")
    assert button.get_attribute("aria-disabled") == "true"
    posts = []
    page.on("request", lambda r: posts.append(r.url) if r.method == "POST" else None)
    button.dispatch_event("click")  # Playwright would wait until it is enabled.
    assert posts == []
    keep(page, "finished")


@pytest.mark.slow
def test_curves_are_drawn_by_step_epoch_and_time_smoothed_and_in_a_log_scale(visit):
    page = visit()
    drawn(page)
    titles = []
    for axis in ("epoch", "time", "step"):
        page.check(f"#axis-{axis}")
        until(
            page,
            f"document.querySelector('.plot .xtitle').textContent.startsWith('{axis}')",
        )
        titles.append(page.text_content(".plot .xtitle >> nth=0"))
    assert titles == ["epoch", "time (s)", "step"]
    page.set_checked("#log", False)
    until(page, "document.querySelector('.plot')._fullLayout.yaxis.type === 'linear'")
    page.check("#log")
    until(page, "document.querySelector('.plot')._fullLayout.yaxis.type === 'log'")
    rough = page.evaluate("document.querySelector('.plot').data.length")
    page.fill("#smooth", "0")
    until(page, f"document.querySelector('.plot').data.length === {rough - 1}")


@pytest.mark.slow
def test_the_range_that_is_seen_is_asked_for_anew(visit):
    page = visit()
    drawn(page)
    curves = asked(page, "curve")
    page.click("#zoom-in")
    until(page, "document.querySelector('.plot')._fullLayout.xaxis.range[0] > 0")
    assert any("start=50&stop=151" in url for url in curves), curves
    page.click("#zoom-all")
    until(page, "document.querySelector('.plot')._fullLayout.xaxis.range[0] === 0")


@pytest.mark.slow
def test_signals_of_a_watched_training_are_curves_too(visit):
    page = visit()
    drawn(page)
    page.get_by_label("gradient_norm", exact=True).check()
    page.wait_for_selector("figure.chart >> nth=2 >> .scatterlayer .trace")
    assert "mnist/hidden" in page.inner_text("figure.chart >> nth=2")
    page.click(".depth canvas", position={"x": 100, "y": 8})
    page.wait_for_selector("#step-head:has-text('of 200')")


@pytest.mark.slow
def test_another_run_is_laid_over_the_one_in_focus(visit, keep):
    page = visit()
    drawn(page)
    page.get_by_label("Lay live over the curves").check()
    page.wait_for_selector(".chart .legend li:has-text('live: training')")
    assert "beside=live" in page.url
    keep(page, "two-runs")


def test_a_click_on_a_curve_opens_that_step(visit, keep):
    page = visit()
    drawn(page)
    page.hover(".plot .nsewdrag >> nth=0", position={"x": 200, "y": 80})
    page.wait_for_timeout(100)
    page.click(".plot .nsewdrag >> nth=0", position={"x": 200, "y": 80})
    first = opened(page)
    assert re.fullmatch(r"Step \d+ of 200", first)
    assert "same bits" in page.inner_text(".facts")
    assert page.locator(".examples li").count() == 24
    losses = [
        float(said.split("\n")[-1])
        for said in page.locator(".examples li").all_inner_texts()
    ]
    assert losses == sorted(losses, reverse=True)
    assert page.locator(".examples img").first.evaluate("i => i.naturalWidth") == 28
    alt = page.locator(".examples img").first.get_attribute("alt")
    assert re.match(r"Row \d+: label \d, taken for \d", alt)
    page.get_by_role("button", name="Show all 64").click()
    assert page.locator(".examples li").count() == 64
    assert "mnist/hidden/kernel" in page.inner_text(".part.heat")
    assert page.locator(".part.heat td.heated").count() == 8
    assert "Dense" in page.inner_text(".part.layers")
    assert "forward" in page.inner_text(".part.times")
    assert "has a loss of" in page.inner_text(".part.why")
    assert page.inner_text("ol.code .role-forward .time").endswith("s")
    keep(page, "step")
    assert barriers(page) == []

    number = int(re.search(r"\d+", first)[0])
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"#step-number:has-text('Step {number + 1} of 200')")
    page.wait_for_selector("#step-found.old")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f"#step-number:has-text('Step {number - 1} of 200')")
    page.wait_for_selector("#step-found:not(.old)")
    assert f"step={number - 1}" in page.url

    page.click("#language")
    for _ in range(2):  # The system's, light, dark.
        page.click("#theme")
    assert page.get_attribute("html", "lang") == "ko"
    assert page.get_attribute("html", "data-theme") == "dark"
    drawn(page)
    assert page.locator(".part.heat td.heated").count() == 8
    assert barriers(page) == []
    keep(page, "step-ko-dark")


@pytest.mark.slow
def test_from_an_incident_to_the_picture_that_caused_it_is_one_click(visit, keep):
    page = visit()
    page.select_option("#kind", "incident")
    page.click("#event-list li.bad button")
    opened(page)
    story = page.inner_text(".part.why")
    assert "1 of its 64 examples carry" in story
    assert "row 1469" in story
    assert "Row 1469" in page.locator(".examples img").first.get_attribute("alt")
    keep(page, "incident")


@pytest.mark.slow
def test_a_step_that_is_not_there_is_said_and_what_to_do(visit):
    page = visit()
    page.fill("#go-step", "100000")
    page.press("#go-step", "Enter")
    page.wait_for_selector("#step-job .trouble")
    assert "100000" in page.inner_text("#step-job .trouble").replace(",", "")


@pytest.mark.slow
def test_events_are_listed_by_kind(visit):
    page = visit()
    until(page, "document.querySelectorAll('#kind option').length > 3")
    page.select_option("#kind", "compiled")
    rows = page.locator("#event-list li").all_inner_texts()
    assert rows
    assert all("compiled" in row for row in rows)
    page.select_option("#kind", "checkpoint")
    assert "kB" in page.inner_text("#event-list")


def test_a_live_run_is_paused_stepped_and_resumed(visit, keep):
    page = visit(run="live")
    page.wait_for_selector("#do-pause[aria-disabled=false]")
    page.wait_for_selector("ol.code li.now")
    page.wait_for_selector("#gauge-speed dd:has-text('steps/s')")
    page.wait_for_selector("#phases li:has-text('callbacks')")
    page.wait_for_selector("ol.code .shape:has-text('(64, 784) float32')")
    drawn(page)
    keep(page, "live")
    page.click("#do-pause")
    page.wait_for_selector("#gauge-status[data-state=paused]")
    said = page.inner_text("#why-not")
    at = int(re.search(r"\d+", said)[0])
    live = page.evaluate("fetch('/api/status?run=live').then((r) => r.json())")["live"]
    shown = float(page.inner_text("#gauge-loss dd"))
    assert shown == pytest.approx(live["loss"]["value"], rel=1e-3)
    page.click("#do-step")
    page.wait_for_selector(f"#why-not:has-text('{at + 1}')")
    page.click("#do-save")
    page.wait_for_selector(".log li:has-text('checkpoint') >> text=/step/")
    page.click("#do-resume")
    page.wait_for_selector("#gauge-status[data-state=running]")
    page.select_option("#kind", "control")
    assert "pause" in page.inner_text("#event-list")


@pytest.mark.slow
def test_a_live_run_is_stopped_after_its_epoch(visit, ending):
    page = visit(run=ending)
    page.wait_for_selector("#do-stop[aria-disabled=false]")
    page.click("#do-stop")
    page.wait_for_selector("#gauge-status[data-state=finished]")
    page.wait_for_selector("#why-not:has-text('this run is finished')")
    page.wait_for_selector("#event-list li:has-text('finished')")


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_barrier(visit, keep, locale, theme):
    page = visit(theme=theme, locale=locale, more=f"&step={SPIKE}&beside=live")
    drawn(page)
    opened(page)
    assert page.get_attribute("html", "lang") == locale[:2]
    assert page.get_attribute("html", "data-theme") == theme
    assert barriers(page) == []
    keep(page, f"page-{locale[:2]}-{theme}")


@pytest.mark.slow
def test_language_and_theme_are_switched_and_remembered(visit):
    page = visit()
    page.click("#language")
    assert page.inner_text("#curves-title") == "곡선"
    assert page.evaluate("document.activeElement.id") == "language"
    page.click("#theme")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.reload()
    page.wait_for_selector("#curves-title:has-text('곡선')")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.inner_text("#name") == "spike"


def test_hostile_names_are_text_and_nothing_else(visit, keep):
    page = visit()
    page.locator("nav button", has_text="onerror").click()
    until(page, "document.querySelector('#name').textContent[0] === '<'")
    drawn(page)
    page.wait_for_selector("figure.chart h3:has-text('acc<img')")
    assert "UserWarning · <img src=x" in page.inner_text("#event-list")
    assert (
        page.locator("img:not([src^='data:image/png']):not([src*=icon])").count() == 0
    )
    assert page.evaluate("window.hurt") is None
    keep(page, "hostile")


@pytest.mark.slow
def test_it_fits_a_screen_of_360_pixels(visit, keep):
    page = visit(width=360, more="&step=40")
    drawn(page)
    opened(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    keep(page, "narrow")


@pytest.mark.slow
def test_everything_is_reached_by_keyboard(visit):
    page = visit(more="&step=40")
    drawn(page)
    opened(page)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    seen = []
    for _ in range(120):
        page.keyboard.press("Tab")
        here = page.evaluate(
            "document.activeElement.id || document.activeElement.className"
        )
        if seen and here == seen[0]:
            break
        seen.append(here)
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "loop"
    assert "run=spike" in page.url
    wanted = {"skip", "theme", "language", "run-0", "over-0", "do-pause", "axis-step"}
    wanted |= {"log", "smooth", "zoom-in", "group-0", "go-step", "step-back", "kind"}
    wanted |= {"compare", "examine", "event-list"}
    assert wanted <= set(seen), wanted - set(seen)


def test_the_first_paint_waits_for_neither_data_nor_charts(browser, shown):
    address = shown[1]
    with browser.new_context() as context:
        page = context.new_page()
        page.route("**/api/**", lambda route: None)  # It never answers.
        page.route("**/plotly.min.js", lambda route: None)
        page.goto(address)
        page.wait_for_selector("#curves-title:has-text('Curves')")
        assert page.inner_text("#do-pause").endswith("Pause")


@pytest.mark.slow
def test_curves_are_sketched_until_the_charts_have_come(visit):
    page = visit(without="plotly.min.js")
    page.wait_for_selector(".sketch polyline")
    assert page.locator(".plot .scatterlayer").count() == 0


@pytest.mark.slow
def test_without_its_token_the_page_reads_but_steers_nothing(visit):
    page = visit(run="live", token=False)
    page.wait_for_selector("#do-pause[aria-disabled=false]")
    page.click("#do-pause")
    page.wait_for_selector("#controls-trouble .trouble")
    assert "loopscope view" in page.inner_text("#controls-trouble")
    # Chromium reports the refusal itself; nothing else may be reported.
    assert all("403" in said for said in page.wrong)
    page.wrong.clear()


@pytest.mark.slow
def test_gears_are_compared_and_the_doctor_examines_on_demand(visit, keep):
    page = visit()
    drawn(page)
    page.click("#examine")
    page.wait_for_selector("#doctor p:has-text('all checks')", timeout=300_000)
    page.click("#compare")
    page.wait_for_selector("#gears-found .plot svg", timeout=300_000)
    assert "fused-graph" in page.inner_text("#gears-found table")
    keep(page, "gears")


@pytest.mark.slow
def test_a_question_is_cancelled_by_keyboard_and_asked_again(visit, keep):
    page = visit()
    drawn(page)
    page.click("#examine")
    page.focus("#doctor-job .cancel:visible")
    keep(page, "cancel")
    page.keyboard.press("Enter")
    page.wait_for_selector("#doctor-job:has-text('Cancelled.')")
    assert page.evaluate("document.activeElement.id") == "examine"
    page.fill("#go-step", "40")
    page.press("#go-step", "Enter")
    page.focus("#step-job .cancel:visible")
    assert barriers(page) == []
    page.keyboard.press("Space")
    page.wait_for_selector("#step-job:has-text('Cancelled.')")
    assert page.evaluate("document.activeElement.id") == "step"
    assert page.inner_text("#step-found") == ""
    page.fill("#go-step", "40")
    page.press("#go-step", "Enter")
    assert opened(page) == "Step 40 of 200"
