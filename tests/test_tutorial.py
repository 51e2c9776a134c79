"""The tutorial is executed, and says the same in both languages."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial"
sys.path.insert(0, str(TUTORIAL))

import execute  # noqa: E402

ENGLISH = execute.chapters("en")
QUICK = ENGLISH[0]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# Chapters that are about other backends start processes for them.
pytestmark = pytest.mark.once


def outputs(book):
    """Everything that the cells of a notebook have shown, as text."""
    texts = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            texts.append(output.get("text") or str(output.get("data", {})))
    return "\n".join(texts)


def korean(chapter):
    return TUTORIAL / "ko" / chapter.name


@pytest.mark.parametrize(
    "chapter",
    [c if c == QUICK else pytest.param(c, marks=pytest.mark.slow) for c in ENGLISH],
    ids=lambda chapter: chapter.stem,
)
def test_a_chapter_runs_from_top_to_bottom(chapter, tmp_path):
    book = execute.execute(chapter, tmp_path)
    shown = outputs(book)
    assert shown
    assert "Traceback" not in shown


def test_both_languages_have_the_same_chapters():
    assert [c.name for c in ENGLISH] == [c.name for c in execute.chapters("ko")]
    assert len(ENGLISH) > 5


@pytest.mark.parametrize("chapter", ENGLISH, ids=lambda chapter: chapter.stem)
def test_both_languages_have_the_same_code_cells(chapter):
    assert execute.code(chapter) == execute.code(korean(chapter))


@pytest.mark.parametrize("chapter", ENGLISH, ids=lambda chapter: chapter.stem)
def test_both_languages_have_the_same_headings_and_links(chapter):
    pages = [c.read_text("utf-8") for c in (chapter, korean(chapter))]
    without = [re.sub(r"^```.*?^```$", "", p, flags=re.M | re.S) for p in pages]
    levels = [re.findall(r"^(#+) ", p, re.M) for p in without]
    assert levels[0] == levels[1]
    links = [LINK.findall(p) for p in without]
    assert sorted(links[0]) == sorted(links[1])


@pytest.mark.parametrize(
    "page", sorted(TUTORIAL.rglob("*.md")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_links_of_the_tutorial_lead_somewhere(page):
    for link in LINK.findall(page.read_text("utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("chapter", ENGLISH, ids=lambda chapter: chapter.stem)
def test_cells_fit_on_a_page(chapter):
    for cell in execute.code(chapter):
        for line in cell.splitlines():
            assert len(line) <= 100, line
