"""The documentation says what is: its examples run, and what it names exists."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import keras
import pytest
from click.testing import CliRunner

import loopscope
from loopscope import cli, datasets
from loopscope.gear import AUTO, GEARS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "loopscope"
ENGLISH, KOREAN = ROOT / "README.md", ROOT / "README.ko.md"
PAGES = [ENGLISH, KOREAN, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))

BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

once = pytest.mark.once
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language=""):
    """(info, text, first line) of each code block of a page."""
    content = page.read_text("utf-8")
    return [
        (m["info"], m["text"], content.count("\n", 0, m.start("text")))
        for m in BLOCK.finditer(content)
        if m["info"].split()[:1] == [language] or not language
    ]


def prose(page):
    """A page without its code blocks."""
    return BLOCK.sub("", page.read_text("utf-8"))


def spans(page):
    """What a page sets as code, blocks and spans, as one line each."""
    found = [text for _, text, _ in blocks(page)]
    return [" ".join(s.split()) for s in found + SPAN.findall(prose(page))]


def shell_lines(page):
    """What a page sets as code and not as Python, line by line."""
    found = [t for info, t, _ in blocks(page) if not info.startswith("python")]
    found = [line for text in found for line in text.splitlines()]
    return found + [" ".join(s.split()) for s in SPAN.findall(prose(page))]


def headings(page):
    return re.findall(r"^(#+) (.+)$", prose(page), re.M)


def anchor(heading):
    """The anchor that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")


def between(page, name):
    """The part of a page between the markers of a name."""
    content = page.read_text("utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert content.count(begin) == content.count(end) == 1, f"{page.name}: {name}"
    return content.partition(begin)[2].partition(end)[0]


def commands():
    return cli.main.commands


# The two READMEs.


@once
def test_both_readmes_have_the_same_headings():
    levels = [[level for level, _ in headings(page)] for page in (ENGLISH, KOREAN)]
    assert levels[0] == levels[1]


@once
def test_both_readmes_have_the_same_code_blocks():
    assert blocks_only(ENGLISH) == blocks_only(KOREAN)


def blocks_only(page):
    return [(info, text) for info, text, _ in blocks(page)]


@once
def test_both_readmes_have_the_same_figures_and_messages():
    def cells(page, column):
        rows = [r.split("|") for r in between(page, "gears").strip().splitlines()]
        return [[c.strip() for c in r[column:]] for r in rows[1:]]

    assert cells(ENGLISH, 1) == cells(KOREAN, 1)
    assert messages(ENGLISH) == messages(KOREAN)


@once
def test_both_readmes_link_to_each_other_and_to_the_same_files():
    def links(page):
        found = {link for link in LINK.findall(prose(page)) if not link.startswith("#")}
        # Pictures and the tutorial are there in both languages.
        found = {
            re.sub(r"-ko\b", "-en", link).replace("/ko/", "/en/") for link in found
        }
        return found - {"README.md", "README.ko.md"}

    assert links(ENGLISH) == links(KOREAN)
    assert "README.ko.md" in LINK.findall(prose(ENGLISH))
    assert "README.md" in LINK.findall(prose(KOREAN))


# Examples.

TINY = {"50_000": "500"}


@pytest.fixture
def tiny_data(monkeypatch):
    """600 of MNIST's examples, which the pages cut at 500 instead of 50,000."""
    (x, y), (x_test, y_test) = datasets.mnist()
    small = (x[:600], y[:600]), (x_test[:100], y_test[:100])
    monkeypatch.setattr(datasets, "mnist", lambda: small)


def program(page):
    """A page's examples as one program, each line where it stands in the page."""
    lines = []
    for info, text, first in blocks(page, "python"):
        words = info.split()[1:]
        if "notest" in words or not {keras.backend.backend()}.issuperset(words):
            continue
        for long, short in TINY.items():
            text = text.replace(long, short)
        lines += [""] * (first - len(lines)) + text.splitlines()
    return "\n".join(lines) + "\n"


# The Korean README has the same code, which another test says.
@pytest.mark.parametrize(
    "page",
    [
        page if page == ENGLISH else pytest.param(page, marks=pytest.mark.slow_on_jax)
        for page in PAGES
        if blocks(page, "python") and page != KOREAN
    ],
    ids=lambda page: page.name,
)
def test_every_example_of_a_page_runs(page, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Some record a run in `runs`.
    # A file, since AutoGraph reads a step's source.
    file = tmp_path / f"{page.stem}.py"
    file.write_text(program(page), "utf-8")
    code = compile(file.read_text("utf-8"), str(file), "exec")
    exec(code, {"__name__": "page"})


def test_the_experiment_of_the_readme_trains_from_the_command_line(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (code,) = (t for _, t, _ in blocks(ENGLISH, "python") if "def experiment" in t)
    file = tmp_path / "experiment_of_the_readme.py"
    file.write_text(code, "utf-8")
    arguments = ["train", f"{file}:experiment", "--epochs", "1", "--json"]
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 10


@once
def test_python_blocks_bear_no_unknown_word():
    known = {"notest", "tensorflow", "jax"}
    for page in PAGES:
        for info, _, first in blocks(page, "python"):
            assert known.issuperset(info.split()[1:]), f"{page.name}:{first}: {info}"


# What the pages name.


@once
@each_page
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, part = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        if part:
            assert part in {anchor(h) for _, h in headings(target)}, link


@once
@each_page
def test_named_files_exist(page):
    path = re.compile(r"(?:src|tests|docs|benchmarks|\.ci)/[\w./-]*\w")
    for span in spans(page):
        for name in path.findall(span):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@once
@each_page
def test_public_names_exist(page):
    for span in spans(page):
        for dotted in re.findall(r"\bloopscope((?:\.[A-Za-z_]\w*)+)", span):
            value = loopscope
            for name in dotted.split(".")[1:]:
                assert hasattr(value, name), f"{page.name}: loopscope{dotted}"
                value = getattr(value, name)


@once
@each_page
def test_members_of_loop_and_epoch_exist(page):
    from loopscope.epoch import Epoch, StepReport
    from loopscope.loop import Loop
    from loopscope.state import State

    built = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    loop = Loop(built, "sgd", "mse")
    kinds = {
        "loop.state": loop.state,
        "loop": loop,
        "Loop": Loop,
        "epoch": next(loop.epochs(1)),
        "Epoch": Epoch,
        "step": StepReport(0, 0, 0, {"loss": 0.0}),
        "State": State,
    }
    for kind, value in kinds.items():
        for span in spans(page):
            named = re.findall(rf"(?<![\w./]){re.escape(kind)}\.([a-z_]\w*)", span)
            for name in named:
                if name in ("py", "js"):  # a file
                    continue
                assert hasattr(value, name), f"{page.name}: {kind}.{name}"


@once
@each_page
def test_commands_options_and_targets_exist(page):
    options = {o for c in commands().values() for p in c.params for o in p.opts}
    options |= {"--help", "--version"}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    said = between(page, "messages") if page in (ENGLISH, KOREAN) else ""
    for span in shell_lines(page):
        for name in re.findall(r"^\$? ?loopscope ([a-z]+)\b", span):
            assert name in commands() or f"`{span}`" in said, f"{page.name}: {span}"
        for name in re.findall(r"\bmake ([a-z-]+)", span):
            assert name in targets, f"{page.name}: make {name}"
        if re.match(r"(loopscope \w+ )?--\w", span):
            for option in re.findall(r"--[a-z-]+", span):
                assert option in options, f"{page.name}: {option}"


@once
def test_gears_of_the_tables_are_the_gears_there_are():
    for page in (ENGLISH, KOREAN, ROOT / "docs" / "gears.md"):
        rows = re.findall(
            r"^\| `([a-z-]+)` \|.*(?:yes|no|있음|없음)", prose(page), re.M
        )
        assert rows == list(GEARS), page.name
    for page in PAGES:
        for name in re.findall(r"gear=\"([^\"]+)\"", "\n".join(spans(page))):
            assert name in GEARS or name == AUTO, f"{page.name}: {name}"


@once
def test_gears_that_a_backend_has_are_those_of_its_room():
    for column, room in ((4, "tensorflow"), (5, "jax")):
        text = (SOURCE / "backend" / f"{room}.py").read_text("utf-8")
        (listed,) = re.findall(r"^    gears = \(([A-Z_, ]+)\)", text, re.M)
        has = {name.strip().lower().replace("_", "-") for name in listed.split(",")}
        for row in prose(ROOT / "docs" / "gears.md").splitlines():
            cells = [c.strip() for c in row.strip("|").split("|")]
            if cells[0].strip("`") in GEARS and len(cells) == 6:
                said = cells[column] == "yes"
                assert said == (cells[0].strip("`") in has), (room, row)


@once
def test_every_command_is_named_in_the_readmes():
    for page in (ENGLISH, KOREAN):
        for name in commands():
            assert f"| `loopscope {name}" in prose(page), f"{page.name}: {name}"


@once
@each_page
def test_help_in_the_pages_is_the_real_help(page):
    for info, text, first in blocks(page):
        line, _, shown = text.partition("\n")
        if not re.fullmatch(r"\$ loopscope( \w+)* --help", line):
            continue
        arguments = line.removeprefix("$ loopscope ").split()
        result = CliRunner().invoke(
            # Click leaves two of a terminal's 80 columns free.
            cli.main,
            arguments,
            prog_name="loopscope",
            terminal_width=78,
        )
        assert shown == result.output, f"{page.name}:{first}"
        assert info == "text"


@once
def test_the_readme_shows_the_help():
    assert any(t.startswith("$ loopscope --help\n") for _, t, _ in blocks(ENGLISH))


def messages(page):
    """The messages of the table of errors, in order."""
    return re.findall(r"^\| `([^`]+)` \|", between(page, "messages"), re.M)


@once
def test_messages_of_the_table_are_messages_of_the_code():
    texts = [(ROOT / "Makefile").read_text("utf-8")]
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        texts += [_text(node) for node in ast.walk(tree)]
    assert messages(ENGLISH)
    for message in messages(ENGLISH):
        pattern = ".*".join(map(re.escape, message.split("...")))
        found = (re.search(pattern, text, re.S) for text in texts)
        assert any(found), message


def _text(node):
    """A string of the code; what is filled in is left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) for v in node.values if isinstance(v, ast.Constant))
    return ""


@once
def test_environment_variables_are_those_of_the_code():
    code = "".join(f.read_text("utf-8") for f in SOURCE.rglob("*.py"))
    said = {
        name
        for page in PAGES
        for name in re.findall(r"LOOPSCOPE_[A-Z_]+", page.read_text("utf-8"))
    }
    assert said == set(re.findall(r"LOOPSCOPE_[A-Z_]+", code))


# The architecture.


@once
def test_the_architecture_lists_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = page.partition("## Rooms")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in rooms.splitlines() if row.startswith("| `")]
    said = {name for row in rows for name in SPAN.findall(row)}
    files = {str(f.relative_to(SOURCE)) for f in SOURCE.rglob("*.py")}
    # A package's own file is named where it holds more than a line on its room.
    holds = {f for f in files if len((SOURCE / f).read_text("utf-8").splitlines()) > 1}
    assert said == holds


@once
def test_the_architecture_draws_the_contracts():
    page = ROOT / "docs" / "architecture.md"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
    (drawn,) = (t for info, t, _ in blocks(page) if info == "text layers")
    assert drawn.splitlines() == layers
    words = " ".join(prose(page).split())
    for contract in contracts:
        assert contract["name"] in words, contract["name"]


@once
def test_the_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{loopscope.__version__}]" in changelog


@once
def test_compatibility_lists_every_case_that_is_compared_and_none_that_failed():
    import test_parity_callbacks
    import test_parity_contract
    import test_parity_data
    import test_parity_models

    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    rows = {
        line.split(" | ")[0].strip("| `") for line in page.splitlines() if "|" in line
    }
    cases = [
        *test_parity_models.CASES,
        *test_parity_data.KINDS,
        *test_parity_callbacks.CASES,
        *test_parity_contract.BAD,
    ]
    assert [name for name in cases if name not in rows] == []
    assert "| NO" not in page


@once
def test_differences_name_tests_that_are_there():
    page = (ROOT / "docs" / "differences.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", page)) - set(dir(keras.Model))
    code = "".join(f.read_text("utf-8") for f in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 10
    assert [name for name in sorted(named) if f"def {name}(" not in code] == []
