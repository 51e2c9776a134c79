"""The site of the docs: built strictly, and asking for nothing from another host."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"

FOREIGN = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?https?:|<link[^>]*rel="?(?:stylesheet|"""
    r"""preconnect|icon)[^>]*href="https?:|@import|url\(["']?https?:"""
)

pytestmark = [pytest.mark.once, pytest.mark.slow]


@pytest.fixture(scope="module")
def built():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_site.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


def test_no_page_asks_another_host_for_anything(built):
    for page in [*built.rglob("*.html"), *built.rglob("*.css")]:
        found = FOREIGN.search(page.read_text("utf-8"))
        assert found is None, f"{page.name}: {found[0]}"


def test_the_reference_describes_every_public_name(built):
    import loopscope

    page = (built / "reference.html").read_text("utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    for name in loopscope.__all__:
        assert f'<h2 id="{name.lower()}' in page, name
    assert "How many steps this loop has trained" in text
    # Methods that the class takes in from other modules.
    assert "Measure every gear on this loop's train step" in html.unescape(text)
    records = (built / "records.html").read_text("utf-8")
    assert "Run a past step again, from the nearest checkpoint" in records


def test_both_languages_of_the_tutorial_are_there(built):
    for language, title in (("en", "A look inside"), ("ko", "훈련 루프 들여다보기")):
        folder = built / "docs" / "tutorial" / language
        assert title in (folder / "index.html").read_text("utf-8")
        assert len(list(folder.glob("0*.html"))) == 7
