"""Everything that is said on the page is said in English and in Korean."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest

import loopscope
from loopscope.doctor.checks import ALL
from loopscope.doctor.first_chunk import WHY_NOT
from loopscope.look.alternatives import Alternative
from loopscope.look.opened import NonFinite, OpenedStep
from loopscope.look.why import Carrier, Jump, Why
from loopscope.run import control, live
from loopscope.run.identity import CAUSES
from loopscope.run.plain import readable
from loopscope.showing import NOTES
from loopscope.view.page.jobs import DOING
from page_server import serving

pytestmark = pytest.mark.once

SOURCE = Path(loopscope.__file__).parent
STATIC = SOURCE / "figures" / "static"
ENTRY = re.compile(r'^  "([^"]+)": "(.*)",$', re.M)

OWN = ("broken", "not_now", "no_framework", "refused", "raised")
"""The sentence is another one each time, and stays English; what to do is told."""


STATELESS = ("stateless_call", "stateless_apply", "stateless_update_state")


def words(language):
    """What the page says in a language, by key."""
    found = {}
    for file in STATIC.glob("words*.js"):
        english, _, korean = file.read_text("utf-8").rpartition("const KO = {")
        if not english:  # Korean for what others say in English.
            english, korean = "", file.read_text("utf-8")
        found |= ENTRY.findall(english if language == "en" else korean)
    return found


@functools.cache
def calls():
    """Every call in the package, with the name of what is called."""
    nodes = (node for file in SOURCE.rglob("*.py") for node in ast.walk(tree(file)))
    found = [node for node in nodes if isinstance(node, ast.Call)]
    names = [getattr(c.func, "attr", getattr(c.func, "id", "")) for c in found]
    return list(zip(names, found, strict=True))


def called(*names):
    return [call for name, call in calls() if name in names]


def tree(file):
    return ast.parse(file.read_text("utf-8"))


def argument(call, name):
    """The texts that a keyword of a call may be."""
    for value in (k.value for k in call.keywords if k.arg == name):
        several = isinstance(value, ast.IfExp)
        choices = [value.body, value.orelse] if several else [value]
        return [c.value for c in choices if isinstance(c, ast.Constant)]
    return []


def first_text(call, place=0):
    """The text that an argument of a call is; empty if it is none."""
    given = call.args[place] if len(call.args) > place else None
    return given.value if isinstance(given, ast.Constant) else ""


def entries(file):
    """The dicts that are written out in a file, as pairs of nodes."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Dict):
            yield [
                (key.value, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            ]


def lacking(keys):
    return sorted(set(keys) - set(words("ko")))


def test_no_word_is_missing_in_either_language():
    english, korean = words("en"), words("ko")
    assert english.keys() <= korean.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", korean[key])) <= set(
            re.findall(r"\{\w+\}", text)
        ), key
    assert all(re.search("[가-힣]", text) for text in said(korean))
    code = "".join(file.read_text("utf-8") for file in STATIC.glob("*.js"))
    named = set(re.findall(r'\bword\("([^"]+)"', code))
    page = (STATIC / "index.html").read_text("utf-8")
    named |= set(re.findall(r'data-word="([^"]+)"', page))
    assert named <= set(korean)


def said(korean):
    """Korean texts, but for those that are made of what stands in their braces."""
    return [t for t in korean.values() if re.sub(r"\{\w+\}", "", t).strip(" ,:()[]")]


def test_every_finding_of_the_doctor_has_korean_words():
    assert len(ALL) == len({k for k in words("ko") if k.startswith("check.")})
    assert lacking(f"check.{name}" for name in ALL) == []
    keys, kinds = set(), {}
    for call in called("Finding"):
        check, found = first_text(call), argument(call, "kind") or [""]
        assert check in ALL
        kinds.setdefault(check, []).extend(found)
        keys |= {".".join(filter(None, (check, kind))) for kind in found}
    assert len(keys) > 40
    assert [c for c, found in kinds.items() if "" in found and len(found) > 1] == []
    keys = {f"finding.{key}" for key in keys}
    assert lacking(keys | {f"{key}.mend" for key in keys}) == []
    written = {k for k in words("ko") if k.startswith("finding.")}
    assert written == keys | {f"{key}.mend" for key in keys}


def test_every_number_of_a_finding_has_a_korean_name():
    files = [*(SOURCE / "doctor/checks").glob("*.py"), SOURCE / "doctor/script.py"]
    findings = [dict_ for file in files for dict_ in entries(file)]
    names = {name for entry in findings for name, _ in entry if name.islower()}
    names -= {*ALL, "sparse", "categorical", "train", "test", *STATELESS}
    assert len(names) > 50
    assert lacking(f"measured.{name}" for name in names) == []


def test_every_kind_of_event_has_korean_words():
    kinds = {"checkpoint", "control"}
    kinds |= {first_text(call) for call in called("_event", "note")} - {""}
    assert {"begin", "finished", "incident", "warning"} < kinds
    assert lacking(f"kind.{kind}" for kind in kinds) == []
    events = {*control.ACTIONS, "train", "test", "predict"}
    assert lacking(f"event.{name}" for name in events) == []
    signals = ("loss", "gradient_norm", "weight_norm", "update_norm")
    assert (
        lacking(f"incident.{name}" for name in ("spike", "nonfinite", *signals)) == []
    )
    assert lacking(f"phase.{name}" for name in live.ROLES) == []


def test_everything_that_a_job_does_has_korean_words():
    files = [SOURCE / "cli" / name for name in ("asked.py", "answering.py")]
    given = [pair for file in files for entry in entries(file) for pair in entry]
    told = {value.value for key, value in given if key == "what"}
    assert len(told) > 4
    assert told <= set(DOING)
    assert lacking(f"job.{what}" for what in DOING) == []


def test_every_error_that_has_a_code_has_korean_words():
    codes = {"no_framework", "refused", "raised"}
    for call in called("Refusal", "as_error", "UsageError", "RunError"):
        codes.update(argument(call, "code"))
    codes |= {first_text(call, 1) for call in called("_refusal")} - {""}
    assert len(codes) > 15
    assert lacking(f"error.{code}.next" for code in codes) == []
    assert lacking(f"error.{code}" for code in codes - {*OWN}) == []


def test_reasons_notes_and_causes_have_korean_words():
    assert lacking(f"note.{name}" for name in NOTES) == []
    assert lacking(f"glance.{name}" for name in WHY_NOT) == []
    causes = [name for name, _ in CAUSES] + ["source", "unknown"]
    assert lacking(f"cause.{name}" for name in causes) == []
    files = (SOURCE / "choose.py", SOURCE / "loop.py")
    given = [pair for file in files for entry in entries(file) for pair in entry]
    reasons = {value.value for key, value in given if key == "why"}
    assert reasons == {"measured", "raised", "untraceable"}
    assert lacking(f"reason.{name}" for name in reasons) == []


# The story.


def opened(losses=None, nonfinite=None):
    """As much of an opened step as its story reads."""
    given = dict.fromkeys(field.name for field in dataclasses.fields(OpenedStep))
    given |= {"loss_per_example": losses, "first_nonfinite": nonfinite}
    return OpenedStep(**given)


def why(**more):
    plain = {
        "step": 1234,
        "loss": 0.25,
        "usual_loss": 0.1,
        "history": [],
        "examples": [],
        "gradients": [],
        "updates": [],
        "earlier": [],
        "later": [],
        "look": opened(),
    }
    return Why(**{**plain, **more})


ALTERNATIVES = [
    Alternative("same", 2.5e-7),
    Alternative("half_rate", None),
    Alternative("clipped", float("nan"), 0.123456),
]

STORIES = {
    "no loss": why(loss=None),
    "nothing usual": why(usual_loss=None),
    "usually 0": why(usual_loss=0.0),
    "a spike": why(loss=1234567.0, usual_loss=1e-5),
    "quiet": why(loss=0.1000004, usual_loss=0.1),
    "not finite": why(
        loss=float("inf"),
        look=opened(
            np.array([1.0, np.nan]),
            NonFinite("operation", "Log", "mnist/a", "forward", list(range(12))),
        ),
        examples=[Carrier(1, None, None, None, float("nan"), None)],
    ),
    "in the batch": why(look=opened(nonfinite=NonFinite("batch", "x", examples=[3]))),
    "carried": why(
        look=opened(np.ones(8)),
        examples=[
            Carrier(3, 1469, 7, 2, 12.5, 0.375),
            Carrier(0, 12, 7, 7, 0.012345678, 0.25),
        ],
    ),
    "still": why(history=[1, 2, 3]),
    "jumped": why(
        history=[1, 2],
        gradients=[
            Jump(f"dense_{i}/kernel", 10.0**i, 1.0, 10.0**i) for i in range(1, 12)
        ],
        updates=[Jump("dense_2/kernel", 1.0, 0.1, 10.0)],
    ),
    "otherwise": why(earlier=ALTERNATIVES, later=ALTERNATIVES[:1]),
}

TELL = """
async (why) => {
  const { story } = await import("/static/story.js");
  const node = story(why);
  return [...node.querySelectorAll("p")].map((p) =>
    (p.className === "under" ? "  " : "") + p.textContent);
}
"""


def test_the_page_tells_the_story_that_python_tells(browser, tmp_path):
    with serving(tmp_path) as server, browser.new_context(locale="en-US") as context:
        page = context.new_page()
        page.goto(server.said["address"])
        page.wait_for_selector("#curves-title:has-text('Curves')")
        for name, story in STORIES.items():
            told = page.evaluate(TELL, readable(story.as_dict()))
            assert told == "\n".join(story.story()).split("\n"), name
        page.click("#language")
        for name, story in STORIES.items():
            told = page.evaluate(TELL, readable(story.as_dict()))
            assert len(told) == len("\n".join(story.story()).split("\n"))
            assert all(re.search("[가-힣]|^  .+/", line) for line in told), name
