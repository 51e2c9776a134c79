"""New values of variables that a step computes, and then forgets."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.doctor.facts import Facts, Seen
from loopscope.doctor.finding import Finding

WHAT = {
    "stateless_call": "statistics or seeds of layers",
    "stateless_apply": "the state of the optimizer",
    "stateless_update_state": "the state of a metric",
}


def check(facts: Facts) -> Iterator[Finding]:
    """Compare what stateless methods return with what is there after the step."""
    if not facts.own or facts.first.look is None or facts.settled.look is None:
        return
    lost = _lost(facts, facts.first)
    if facts.settled is not facts.first:
        again = _lost(facts, facts.settled)
        lost = {key: paths for key, paths in lost.items() if key in again}
    for (method, owner), paths in lost.items():
        # Loss scaling skips steps, and with them all that belongs to them.
        if method == "stateless_apply" and facts.scales_loss:
            continue
        yield Finding(
            "dropped_state",
            "error",
            f"{method} of {owner!r} returns new values for {len(paths)} variables, and "
            f"the step drops them: {WHAT[method]} never move",
            ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else ""),
            "Return them from train_step in their place in the state, or assign them; "
            "or call the model itself in a step with loopscope.value_and_grad.",
            {"variables": len(paths), "moved": 0},
        )


def _lost(facts: Facts, seen: Seen) -> dict[tuple[str, str], list[str]]:
    """Of each owner whose variables got new values, none of which is there."""
    assert seen.look is not None
    look, paths = seen.look, {id(v): path for path, v in facts.runner.state}
    moved = {update.path for update in look.updates if update.norm}
    for kind in (look.optimizer, look.metrics, look.seeds, look.others):
        moved |= {
            path
            for path, change in kind.items()
            if change.before.tobytes() != change.after.tobytes()
        }
    lost: dict[tuple[str, str], set[str]] = {}
    kept = set()
    for one in seen.computed:
        key = (one.method, one.owner)
        # Called twice, with one result kept, it has kept a result.
        known = {paths[id(v)] for v in one.variables if id(v) in paths}
        lost.setdefault(key, set()).update(known)
        if known & moved:
            kept.add(key)
    return {key: sorted(p) for key, p in lost.items() if p and key not in kept}
