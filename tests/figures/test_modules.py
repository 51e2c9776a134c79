"""The page's modules as one script: all of them, in order, or a reason why not."""

import pytest

from loopscope.figures import STATIC, modules

pytestmark = pytest.mark.once


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Modules of one's own: `written(name=text, ...)`."""
    monkeypatch.setattr(modules, "STATIC", tmp_path)

    def written(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.js").write_text(text, "utf-8")

    return written


def test_a_module_stands_once_and_before_those_that_import_it(written):
    written(
        first='import { b } from "./second.js";\nimport { c } from "./third.js";\n',
        second='import {\n  c as d,\n} from "./third.js";\nexport const b = d();\n',
        third="const x = 1;\n\nexport function c() {}\nexport class C {}\n",
    )
    text = modules.script("first")
    order = [text.index(f"const _{name} =") for name in ("third", "second", "first")]
    assert order == sorted(order)
    assert text.count("function c()") == 1
    assert "const {\n  c: d,\n} = _third;" in text
    assert "return { c, C };" in text
    assert "\n\n" not in text


@pytest.mark.parametrize(
    "text",
    [
        'import * as all from "./b.js";\n',
        'import "./b.js";\n',
        "export default 1;\n",
        "export { a };\n",
        "export let a = 1;\n",
    ],
)
def test_another_kind_of_import_or_export_is_refused(written, text):
    written(a=text)
    with pytest.raises(ValueError, match=r"a\.js: (import|export)"):
        modules.script("a")


def test_modules_that_import_each_other_are_refused(written):
    written(a='import { b } from "./b.js";\n', b='import { a } from "./a.js";\n')
    with pytest.raises(ValueError, match="each other: a, b, a"):
        modules.script("a")


def test_a_step_by_itself_is_laid_out_by_the_modules_of_the_page():
    text = modules.script("alone")
    for name in ("dom", "examples", "format", "heat", "opened", "tables", "words"):
        assert text.count(f"const _{name} = (() => {{") == 1
        last = (STATIC / f"{name}.js").read_text("utf-8").splitlines()[-3:]
        assert "\n".join(last).replace("export ", "") in text
    for name in ("api", "jobs", "store"):
        assert f"_{name} =" not in text
    # Within HTML, nothing but these would end a script or change how it is read.
    assert "</script" not in text.lower()
    assert "<!--" not in text
