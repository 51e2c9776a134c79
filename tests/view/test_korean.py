"""The page in Korean: whatever is done on it, no English sentence is left unmarked."""

import re

import pytest
from test_page import SPIKE, barriers, drawn, opened

pytestmark = [pytest.mark.once, pytest.mark.slow]

UNMARKED = """
() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { parentElement: around, textContent: text } = walker.currentNode;
    if (around.closest("[lang]").lang !== "ko" || !around.checkVisibility()) continue;
    if (around.closest("script, style, noscript, svg")) continue;
    found.push(text);
  }
  for (const node of document.querySelectorAll("[aria-label], [title], img[alt]")) {
    if (node.closest("[lang]").lang !== "ko") continue;
    const names = ["aria-label", "title", "alt"];
    found.push(...names.map((name) => node.getAttribute(name) ?? ""));
  }
  return found;
}
"""

SENTENCE = re.compile(r"\b[A-Za-z]+ [a-z]+ [a-z]+\b")
"""Three words in a row are one; two may be a name."""


def english(page):
    """What is English on a Korean page and not said to be."""
    return [text for text in page.evaluate(UNMARKED) if SENTENCE.search(text)]


def test_a_step_is_opened_and_told_in_korean(visit, keep):
    page = visit(locale="ko-KR", more=f"&step={SPIKE}")
    drawn(page)
    said = opened(page)
    assert said == f"스텝 {SPIKE} / 200"
    story = page.inner_text(".part.why")
    assert "번 스텝의 손실은" in story
    assert "1469행" in story
    assert "학습률을 절반으로 줄이면" in story
    assert "걸러 냄" in page.inner_text("ol.code")
    page.select_option("#kind", "incident")
    assert f"{SPIKE}번 스텝: " in page.inner_text("#event-list")
    page.select_option("#kind", "")
    assert english(page) == []
    assert barriers(page) == []
    keep(page, "korean-step")


def test_gears_and_findings_are_told_in_korean(visit, keep):
    page = visit(locale="ko-KR")
    drawn(page)
    page.click("#examine")
    page.wait_for_selector("#doctor-job [role=status]:has-text('중')")
    assert english(page) == []
    page.wait_for_selector("#doctor p:has-text('모든 항목')", timeout=300_000)
    page.click("#compare")
    page.wait_for_selector("#gears-found .plot svg", timeout=300_000)
    assert english(page) == []
    keep(page, "korean-doctor")


def test_what_goes_wrong_is_told_in_korean(visit):
    page = visit(locale="ko-KR")
    page.fill("#go-step", "100000")
    page.press("#go-step", "Enter")
    page.wait_for_selector("#step-job .trouble:has-text('번 스텝이 없습니다')")
    assert "0번부터 199번까지" in page.inner_text("#step-job .trouble")
    assert english(page) == []
    page.locator("nav button", has_text="onerror").click()
    page.wait_for_selector("#event-list li")
    assert english(page) == []
