"""What a step of the user's own keeps in Python: counters, lists, random numbers.

Compiled, a step is executed by Python once, while it is traced: what it changes here
changes then, and never again. What Keras or the framework holds is no part of it.
"""

from __future__ import annotations

import dis
import inspect
import io
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

import numpy as np

from loopscope.discover import codes, is_foreign
from loopscope.step import ModelStep

DEPTH = 3
"""How far attributes are followed: `self.state.count` is two."""

ELEMENTS = 64
"""Of a longer container only the length is looked at."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
CONTAINERS = (list, dict, set, deque)


@dataclass(frozen=True, eq=False)
class Held:
    """Something that a step names and may change.

    Attributes:
        kind: `"number"` (or another plain value), `"container"`, or `"random"`: a
            generator of random numbers.
        value: Itself.
        print: Equal for equal contents.
        length: Of a container, as it was.
        line: Where the step changes it, `"file.py:12"`.
    """

    kind: Literal["number", "container", "random"]
    value: Any
    print: Any
    length: int = 0
    line: str = ""


@dataclass(frozen=True, eq=False)
class Change:
    """What was held before a step, and after it."""

    before: Held
    after: Held


def surroundings(step: Callable[..., Any]) -> dict[str, Held]:
    """What a step, and the functions of the user's that it calls, keep in Python.

    Found as `discover` finds models: by the names in their code.
    """
    return walked(step).found


def walked(step: Callable[..., Any]) -> Walk:
    """The functions of a step, and what they keep."""
    walk = Walk()
    if isinstance(step, ModelStep):
        step = getattr(step.model, f"{step.phase}_step")
    walk.function(step)
    return walk


@dataclass
class Watched:
    """What steps have done beside their arithmetic."""

    changed: Mapping[str, Change] = field(default_factory=dict)
    printed: str = ""


@contextmanager
def watched(step: Callable[..., Any] | None) -> Iterator[Watched]:
    """See what changes in the surroundings of a step within a block, and is printed."""
    seen = Watched()
    before, told = _taken(step), _Overheard(sys.stdout)
    if before is None:
        yield seen
        return
    with redirect_stdout(told):
        yield seen
    seen.changed = changes(before, _taken(step) or before)
    seen.printed = told.heard


def _taken(step: Callable[..., Any] | None) -> dict[str, Held] | None:
    """The surroundings; `None` of no step, or where a user's object refuses."""
    try:
        return None if step is None else surroundings(step)
    except Exception:
        return None


class _Overheard(io.TextIOBase):
    """Passes on what is printed, and remembers it."""

    def __init__(self, out: Any) -> None:
        self._out, self.heard = out, ""

    def write(self, text: str) -> int:
        self.heard += text
        return int(self._out.write(text))

    def flush(self) -> None:
        self._out.flush()


def changes(before: dict[str, Held], after: dict[str, Held]) -> dict[str, Change]:
    """What has changed, by name."""
    return {
        name: Change(before[name], held)
        for name, held in after.items()
        if name in before and before[name].print != held.print
    }


def prints(step: Callable[..., Any]) -> str:
    """The line on which a step calls `print`; empty if it does not."""
    functions = walked(step).functions
    return next((line_of(f, "print") for f in functions if _names(f, "print")), "")


def names_of(function: FunctionType) -> dict[str, Any]:
    """The globals and closed-over values that a function names."""
    names = {name for code in codes(function.__code__) for name in code.co_names}
    named = {n: function.__globals__[n] for n in names if n in function.__globals__}
    return named | dict(inspect.getclosurevars(function).nonlocals)


@dataclass
class Walk:
    """Goes through a step and the functions that it calls."""

    found: dict[str, Held] = field(default_factory=dict)
    functions: list[FunctionType] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def function(self, given: Any) -> None:
        """Look through one, whatever it is wrapped in."""
        if isinstance(given, partial):
            given = given.func
        given = getattr(given, "python_function", given)
        if isinstance(given, MethodType):
            self._of(given.__func__, {"self": given.__self__})
        else:
            self._of(given, {})

    def _of(self, function: Any, bound: dict[str, Any]) -> None:
        known = id(function) in self._seen
        if known or not isinstance(function, FunctionType):
            return
        if is_foreign(function.__module__):
            return
        self._seen.add(id(function))
        self.functions.append(function)
        names = {name for code in codes(function.__code__) for name in code.co_names}
        for name, value in {**names_of(function), **bound}.items():
            self._value(name, value, function, names)

    def _value(
        self,
        label: str,
        value: Any,
        function: FunctionType,
        names: set[str],
        depth: int = 0,
    ) -> None:
        if isinstance(value, ModuleType):
            self._module(label, value, function)
        elif isinstance(value, (FunctionType, MethodType, partial)) or hasattr(
            value, "python_function"
        ):
            self.function(value)
        elif (held := _held(value)) is not None:
            line = line_of(function, label.rpartition(".")[2])
            self.found[label] = replace(held, line=line)
        elif depth < DEPTH and _is_users(value):
            for name, inner in list(vars(value).items()):
                if name in names:
                    self._value(f"{label}.{name}", inner, function, names, depth + 1)

    def _module(self, label: str, module: ModuleType, function: FunctionType) -> None:
        """The generator that functions of a module draw from."""
        state: Any = None
        if module is random:
            state = random.getstate()
        elif module is np.random or (
            module is np
            and any(
                (label, "random") in _attributes(c) for c in codes(function.__code__)
            )
        ):
            module, state = np.random, np.random.get_state()
        if state is not None:
            self.found[module.__name__] = Held(
                "random", module, repr(state), 0, line_of(function, "random")
            )


def _is_users(value: Any) -> bool:
    has_attributes = hasattr(value, "__dict__") and not isinstance(value, type)
    return has_attributes and not is_foreign(type(value).__module__)


def _held(value: Any) -> Held | None:
    if isinstance(value, PLAIN):
        return Held("number", value, repr(value))
    if isinstance(value, CONTAINERS):
        all_of = value.items() if isinstance(value, dict) else value
        few = list(all_of) if len(value) <= ELEMENTS else []
        return Held(
            "container", value, (len(value), [_print(v) for v in few]), len(value)
        )
    if isinstance(value, np.random.Generator):
        return Held("random", value, repr(value.bit_generator.state))
    if isinstance(value, np.random.RandomState):
        return Held("random", value, repr(value.get_state()))
    if isinstance(value, random.Random):
        return Held("random", value, repr(value.getstate()))
    return None


def _print(value: Any) -> str:
    """Of an element: tensors that come and go within a step change nothing."""
    if isinstance(value, tuple):
        return repr([_print(v) for v in value])
    return repr(value) if isinstance(value, PLAIN) else type(value).__name__


def _attributes(code: CodeType) -> Iterator[tuple[str, str]]:
    """Each `name.attribute` in a function."""
    before: Any = None
    for now in dis.get_instructions(code):
        if now.opname in ("LOAD_ATTR", "LOAD_METHOD") and before is not None:
            yield str(before.argval), str(now.argval)
        before = now if now.opname.startswith("LOAD_") else None


def _names(function: FunctionType, name: str) -> bool:
    return any(name in code.co_names for code in codes(function.__code__))


def line_of(function: FunctionType, name: str) -> str:
    """Where a function changes what is called so, or first names it."""
    file = Path(function.__code__.co_filename).name
    first = function.__code__.co_firstlineno
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return f"{file}:{first}"
    changing = (f"{name} +=", f"{name} =", f"{name}[", f"{name}.", f"{name}(", name)
    for text in changing:
        for number, line in enumerate(lines):
            if text in line.split("#")[0]:
                return f"{file}:{first + number}"
    return f"{file}:{first}"
