"""What a gear is: one way of executing the same step.

A gear is Keras's triple (`run_eagerly`, `jit_compile`, `steps_per_execution`)
under a name. Which gears exist is said here; which a backend has, by the
backend; which one pays, by `choose.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loopscope.errors import GearError


@dataclass(frozen=True)
class Gear:
    """One way of executing steps.

    Attributes:
        name: The word for it, as `Loop(gear=...)` takes it.
        run_eagerly: Whether every operation is executed by itself.
        jit_compile: Whether the step is compiled by XLA.
        fused: Whether one call runs many steps (in Keras's words, a
            `steps_per_execution` above 1).
    """

    name: str
    run_eagerly: bool
    jit_compile: bool
    fused: bool


EAGER = Gear("eager", run_eagerly=True, jit_compile=False, fused=False)
GRAPH = Gear("graph", run_eagerly=False, jit_compile=False, fused=False)
XLA = Gear("xla", run_eagerly=False, jit_compile=True, fused=False)
FUSED_GRAPH = Gear("fused-graph", run_eagerly=False, jit_compile=False, fused=True)
FUSED_XLA = Gear("fused-xla", run_eagerly=False, jit_compile=True, fused=True)

GEARS = {gear.name: gear for gear in (EAGER, GRAPH, XLA, FUSED_GRAPH, FUSED_XLA)}
AUTO: Literal["auto"] = "auto"
NONE: Mapping[str, str] = {}


def resolve(
    gear: str | Gear,
    available: Iterable[Gear],
    *,
    backend: str,
    lacking: Mapping[str, str] = NONE,
    run_eagerly: bool | None = None,
    jit_compile: bool | str | None = None,
    steps_per_execution: int | None = None,
) -> Gear | None:
    """The gear that these words ask for, or `None` for `"auto"`.

    Args:
        gear: A name, a `Gear`, or `"auto"`.
        available: The gears of this backend.
        backend: The backend's name, for the error text.
        lacking: Why it lacks a gear, by the gear's name, for the error text.
        run_eagerly: Keras's word; `True` asks for `eager`.
        jit_compile: Keras's word; `True` asks for XLA, `False` refuses it,
            `None` and `"auto"` leave it open.
        steps_per_execution: Keras's word; above 1 asks for a fused gear.

    Raises:
        GearError: The gear is unknown, the backend lacks it, or the words
            contradict each other.
    """
    gears = tuple(available)
    names = ", ".join(repr(g.name) for g in gears)
    if steps_per_execution is not None and (
        type(steps_per_execution) is not int or steps_per_execution < 1
    ):
        raise GearError(
            "`steps_per_execution` must be a whole number of at least 1. "
            f"Received: steps_per_execution={steps_per_execution}"
        )
    if isinstance(gear, Gear):
        gear = gear.name
    open_words = (run_eagerly, None if jit_compile == "auto" else jit_compile)
    if gear == AUTO:
        if all(word is None for word in (*open_words, steps_per_execution)):
            return None
        wanted = _from_triple(run_eagerly, jit_compile, steps_per_execution, gears)
    elif not isinstance(gear, str) or gear not in GEARS:
        raise GearError(
            f"Unknown gear. Expected 'auto' or one of {names} "
            f"(backend {backend!r}). Received: gear={gear!r}"
        )
    else:
        wanted = GEARS[gear]
        _refuse_contradiction(wanted, run_eagerly, jit_compile, gears)
    if wanted not in gears:
        why = f": {lacking[wanted.name]}" if wanted.name in lacking else ""
        raise GearError(
            f"The {backend!r} backend has no gear {wanted.name!r}{why}. "
            f"It has: {names}. Choose one of these, or 'auto'. "
            f"Received: gear={gear!r}"
        )
    return wanted


def compiled(gears: Iterable[Gear]) -> Gear:
    """The surest of a backend's gears that compile."""
    return next(gear for gear in gears if not gear.run_eagerly)


def words_of(model: Any) -> dict[str, bool]:
    """What a model was compiled to ask for: `run_eagerly`, `jit_compile`.

    Empty where `compile` was left to its defaults, which `"auto"` takes for no wish.
    `jit_compile` counts where it is not what Keras itself would have chosen; where
    Keras compiles everything by XLA (JAX), refusing that means eager.
    """
    if getattr(model, "run_eagerly", False):
        return {"run_eagerly": True}
    chosen = getattr(model, "_resolve_auto_jit_compile", None)
    if not getattr(model, "compiled", False) or chosen is None:
        return {}
    wanted = bool(model.jit_compile)
    if wanted == bool(chosen()):
        return {}
    return {"jit_compile": True} if wanted else {"run_eagerly": True}


def _from_triple(
    run_eagerly: bool | None,
    jit_compile: bool | str | None,
    steps_per_execution: int | None,
    gears: tuple[Gear, ...],
) -> Gear:
    if run_eagerly:
        if jit_compile is True:
            raise GearError(
                "`run_eagerly=True` and `jit_compile=True` exclude each other. "
                "Leave one of them out."
            )
        return EAGER
    fused = (steps_per_execution or 1) > 1
    if XLA not in gears and not fused:
        # A backend without XLA (PyTorch) compiles by its own compiler, or not at all.
        return EAGER if jit_compile is False else GRAPH
    # A backend without graphs (JAX) compiles everything that is not eager.
    jit = jit_compile is True or (jit_compile is not False and GRAPH not in gears)
    return next(
        g
        for g in GEARS.values()
        if (g.run_eagerly, g.jit_compile, g.fused) == (False, jit, fused)
    )


def _refuse_contradiction(
    gear: Gear,
    run_eagerly: bool | None,
    jit_compile: bool | str | None,
    gears: tuple[Gear, ...],
) -> None:
    compiles = gear.jit_compile or (XLA not in gears and not gear.run_eagerly)
    for word, asked, has in (
        ("run_eagerly", run_eagerly, gear.run_eagerly),
        ("jit_compile", jit_compile, compiles),
    ):
        if isinstance(asked, bool) and asked != has:
            raise GearError(
                f"Gear {gear.name!r} means {word}={has}, but {word}={asked} was "
                "given too. Leave one of the two out."
            )
