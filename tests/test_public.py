"""The public face: what there is, that it is described, and the errors it raises."""

import importlib
import inspect
import re

import pytest

import loopscope
from loopscope import errors, events

pytestmark = pytest.mark.once

PUBLIC = [getattr(loopscope, name) for name in loopscope.__all__]
CLASSES = [thing for thing in PUBLIC if inspect.isclass(thing)]
FUNCTIONS = [thing for thing in PUBLIC if inspect.isfunction(thing)]


def methods():
    for owner in CLASSES:
        for name, member in inspect.getmembers(owner):
            public = not name.startswith("_")
            home = getattr(member, "__module__", "") or ""
            if public and inspect.isfunction(member) and home.startswith("loopscope"):
                yield pytest.param(member, id=f"{owner.__name__}.{name}")


def arguments(thing):
    """The arguments that have a name of their own."""
    parameters = inspect.signature(thing).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.name != "self" and p.kind not in several]


def test_all_is_sorted_and_names_each_thing_once():
    assert loopscope.__all__ == sorted(set(loopscope.__all__), key=str)
    assert set(loopscope.__all__) == set(loopscope._HOME)


@pytest.mark.parametrize("name", loopscope.__all__)
def test_every_public_name_can_be_imported(name):
    namespace = {}
    exec(f"from loopscope import {name}", namespace)
    assert namespace[name] is getattr(loopscope, name)
    assert name in dir(loopscope)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'loopscope' has no attribute 'nothing'"):
        loopscope.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from loopscope import nothing  # noqa: F401


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert loopscope.__version__ == version("loopscope")


@pytest.mark.parametrize("thing", PUBLIC, ids=loopscope.__all__)
def test_every_public_name_has_a_docstring_of_one_line_and_more(thing):
    first, *rest = inspect.getdoc(thing).splitlines()
    assert first.endswith((".", ":"))
    assert len(first) <= 88
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("thing", [*CLASSES, *FUNCTIONS], ids=lambda t: t.__name__)
def test_every_argument_of_a_public_name_is_described(thing):
    text = inspect.getdoc(thing)
    missing = [
        name
        for name in arguments(thing)
        if not re.search(rf"^\s+\*{{0,2}}{name}: ", text, re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.parametrize("thing", FUNCTIONS, ids=lambda t: t.__name__)
def test_every_public_function_says_what_it_returns(thing):
    assert "Returns:" in inspect.getdoc(thing)


@pytest.mark.parametrize("method", list(methods()))
def test_every_public_method_has_a_docstring(method):
    text = inspect.getdoc(method)
    assert text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", dir(events))
def test_every_event_is_frozen_and_described(name):
    event = getattr(events, name)
    if not (inspect.isclass(event) and issubclass(event, events.Event)):
        return
    assert event.__dataclass_params__.frozen
    assert inspect.getdoc(event)


def drawn():
    """`{name: (parent, also)}` as the picture in errors.py has it."""
    parents, found = {}, {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"^([ │├└─]*)(\w+)(?: \(also an? (\w+)\))?", line)
        if match and re.search(r"\w+Error\b", match[2]):
            depth = len(match[1]) // 4
            parents[depth] = match[2]
            found[match[2]] = (parents.get(depth - 1), match[3])
    return found


def test_the_hierarchy_drawn_in_errors_is_the_real_one():
    real = {
        name: thing
        for name, thing in vars(errors).items()
        if inspect.isclass(thing) and issubclass(thing, Exception)
        if not issubclass(thing, Warning)
    }
    picture = drawn()
    assert set(picture) == set(real)
    for name, (parent, also) in picture.items():
        bases = [base.__name__ for base in real[name].__bases__]
        assert bases == [b for b in (parent or "Exception", also) if b]


def test_every_error_can_be_caught_as_one():
    for name in drawn():
        assert issubclass(getattr(errors, name), errors.LoopscopeError)


@pytest.mark.parametrize("module", ["loop", "epoch", "step", "state", "gear", "events"])
def test_every_module_opens_with_what_it_holds(module):
    assert importlib.import_module(f"loopscope.{module}").__doc__
