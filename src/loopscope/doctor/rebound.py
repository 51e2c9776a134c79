"""Numbers that a step reads, and that the outer loop changes.

Compiled, a step has the value that such a number had when it was traced. Before any
training the number has not changed yet, so this is read off the source.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from loopscope.doctor.surroundings import line_of, names_of, walked

TRAINS = frozenset({"epochs", "fit", "train"})
"""Methods of a loop by which a `for` is known to train."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Rebound:
    """A number: its name, its value now, and the lines that read and change it."""

    name: str
    value: float
    read: str
    changed: str


def rebound(step: Callable[..., Any]) -> Iterator[Rebound]:
    """Numbers of a step that a training `for` or `while` after it assigns anew."""
    for function in walked(step).functions:
        numbers = {
            name: value
            for name, value in names_of(function).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        file = function.__code__.co_filename
        for name, line in _assigned(function).items() if numbers else ():
            if name in numbers:
                yield Rebound(
                    name,
                    numbers[name],
                    line_of(function, name),
                    f"{Path(file).name}:{line}",
                )


def _assigned(function: FunctionType) -> dict[str, int]:
    """What training loops after a function assign, each with the first line."""
    code = function.__code__
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, int] = {}
    scope = _scope(tree, code)
    for node, shared in _loops(scope, None):
        if node.lineno <= code.co_firstlineno or not _trains(node):
            continue
        for name in (n for n in ast.walk(node) if isinstance(n, ast.Name)):
            known = shared is None or name.id in shared
            if known and isinstance(name.ctx, ast.Store):
                found.setdefault(name.id, name.lineno)
    return found


def _loops(
    node: ast.AST, shared: set[str] | None
) -> Iterator[tuple[ast.For | ast.While, set[str] | None]]:
    """Each loop in a scope, with the names that its function shares with the scope."""
    for child in ast.iter_child_nodes(node):
        inner = shared
        if isinstance(child, FUNCTIONS):
            declared = (ast.Global, ast.Nonlocal)
            words = [n for n in ast.walk(child) if isinstance(n, declared)]
            inner = {name for word in words for name in word.names}
        elif isinstance(child, (ast.For, ast.While)):
            yield child, shared
        yield from _loops(child, inner)


def _scope(tree: ast.Module, code: Any) -> ast.AST:
    """The function that a function of closed-over names is in; else the module."""
    scope: ast.AST = tree
    for node in ast.walk(tree) if code.co_freevars else ():
        if isinstance(node, FUNCTIONS) and hasattr(node, "end_lineno"):
            first, last = node.lineno, node.end_lineno or node.lineno
            if first < code.co_firstlineno <= last:
                scope = node  # Inner ones come later.
    return scope


def _trains(loop: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in TRAINS
        for node in ast.walk(loop)
    )
