"""Tables and lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from loopscope.figures.cells import measured


def console() -> Console:
    """Standard output: styled on a terminal, plain lines elsewhere."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=160)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table; every column but the first is aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def gears(reports: Sequence[Mapping[str, Any]]) -> Table:
    """`GearReport`s as a table."""
    columns = (
        "gear",
        "compile s",
        "ms/step",
        "pays after",
        "largest difference",
        "note",
    )
    rows = []
    for r in reports:
        name = f"{r['gear']} *" if r["chosen"] else r["gear"]
        if not r["available"]:
            rows.append((name, "-", "-", "-", "-", r["reason"]))
            continue
        rows.append((name, *measured(r), r["reason"]))
    return table(columns, rows)


def metrics(logs: Mapping[str, Any]) -> str:
    """Metrics on one line."""
    return " - ".join(
        f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in logs.items()
    )


def rewound(found: Mapping[str, Any]) -> str:
    """A past step that was run again."""
    same = "the recorded bits" if found["identical"] else "NOT the recorded bits"
    rate = found["learning_rate"]
    lines = [
        f"step {found['step']} (epoch {found['epoch']}, batch {found['batch_index']}) "
        f"in gear {found['gear']}",
        f"loss      {_exact(found['loss_replayed'])}, recorded "
        f"{_exact(found['loss_recorded'])}: {same}",
        f"replayed  {found['replayed_steps']} steps from the checkpoint before step "
        f"{found['checkpoint_step']}, {found['seconds']:.2f} s",
        *([] if rate is None else [f"rate      {rate:.6g}"]),
        f"before    state {found['state_sha256_before'][:12]}",
        f"after     state {found['state_sha256_after'][:12]}",
    ]
    return "\n".join(lines)


def opened(found: Mapping[str, Any]) -> Group:
    """A step, opened up."""
    parts: list[Any] = []
    if found["loss_difference"] is not None:
        parts.append(
            f"opened    in gear eager: loss {_exact(found['loss'])}, relative "
            f"difference {found['loss_difference']:.1e}"
        )
    losses = found["losses"]
    if len(losses) > 1:
        parts.append("parts     " + metrics(losses))
    if found["first_nonfinite"] is not None:
        parts.append(f"NOT FINITE {_nonfinite(found['first_nonfinite'])}")
    parts += ["", _worst(found["worst"])] if found["worst"] else []
    parts += ["", _layers(found["layers"])] if found["layers"] else []
    parts += ["", _trained(found)] if found["gradients"] else []
    times = ", ".join(f"{name} {ms:.2f}" for name, ms in found["phases"].items())
    parts += ["", f"ms        {times} (executed eagerly)"]
    parts += [f"not seen  {what}" for what in found["missing"]]
    return Group(*parts)


def difference(found: Mapping[str, Any]) -> Group | str:
    """Two steps side by side."""
    steps = f"step {found['step']}"
    if found["other_step"] != found["step"]:
        steps += f" and step {found['other_step']}"
    partings = found["partings"]
    if not partings:
        return f"{steps}: the same, bit for bit, in {found['compared']} parts"
    first = partings[0]
    largest: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for p in partings:
        count, most = largest.get(p["kind"], (0, p))
        most = p if p["relative"] > most["relative"] else most
        largest[p["kind"]] = (count + 1, most)
    rows = [
        (kind, str(count), f"{most['relative']:.1e}", most["name"])
        for kind, (count, most) in largest.items()
    ]
    return Group(
        f"{steps}: {len(partings)} of {found['compared']} parts differ, first "
        f"{first['kind']} {first['name']} (relative difference "
        f"{first['relative']:.1e})",
        "",
        table(("what", "differ", "largest", "of"), rows),
    )


def _nonfinite(first: Mapping[str, Any]) -> str:
    words = [f"{first['what']} {first['name']!r}"]
    words += [f"in layer {first['layer']!r}"] if first["layer"] else []
    words += [f"({first['phase']})"] if first["phase"] else []
    if first["examples"]:
        words.append(f"at examples {first['examples'][:8]} of the batch")
    return " ".join(words)


def _worst(examples: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            str(e["position"]),
            "" if e["example"] is None else str(e["example"]),
            _short(e["loss"]),
            "" if e["label"] is None else str(e["label"]),
            "" if e["predicted"] is None else str(e["predicted"]),
        )
        for e in examples
    ]
    return table(
        ("worst, in the batch", "in the data", "loss", "label", "taken for"), rows
    )


def _layers(layers: Sequence[Mapping[str, Any]]) -> Table:
    names = ("mean", "std", "min", "max")
    rows = [
        (
            o["path"] if not o["call"] else f"{o['path']} ({o['call'] + 1})",
            "x".join(map(str, o["shape"])),
            *(_short(o[name]) for name in names),
            _share(o["zeros"]),
            "no" if o["finite"] is False else "",
            _short(o["gradient_norm"]),
        )
        for o in layers
    ]
    columns = ("layer", "shape", *names, "zeros", "finite", "gradient")
    return table(columns, rows)


def _trained(found: Mapping[str, Any]) -> Table:
    updates = {u["path"]: u for u in found["updates"]}
    rows = []
    for g in found["gradients"]:
        update = updates.get(g["path"], {"norm": None, "ratio": None})
        rows.append(
            (
                g["path"],
                "none" if g["norm"] is None else _short(g["norm"]),
                _share(g["zeros"]),
                _short(update["norm"]),
                _short(update["ratio"]),
            )
        )
    return table(("variable", "gradient", "zeros", "update", "update/weight"), rows)


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.0%}"


def _exact(value: Any) -> str:
    return "none" if value is None else f"{value:.9g}"


def stretch(segment: Any) -> str:
    """A stretch of a run that was replayed."""
    line = f"steps {segment.first} to {segment.stop - 1}: "
    if segment.verified:
        return line + "the recorded bits"
    if segment.first_difference is not None:
        return line + str(segment.first_difference)
    return line + "the recorded losses, but another state in the end"


def verification(found: Mapping[str, Any]) -> str:
    """What a verification comes to, on one line, and what has changed."""
    largest = found["largest_relative_difference"]
    if found["verified"]:
        line = f"verified: {found['steps']} steps replayed to the recorded bits"
    else:
        line = f"not verified: largest relative difference of a loss {largest:.1e}"
    changed = [
        f"{d['path']}: was {d['was']!r}, is {d['now']!r}" for d in found["differences"]
    ]
    return "\n".join([line, *changed])


def runs(found: Sequence[Mapping[str, Any]]) -> Table:
    """`Summary`s as a table."""
    columns = ("run", "status", "experiment", "gear", "epochs", "steps", "loss", "MB")
    rows = []
    for s in found:
        status = s["status"]
        if s["writer"]:
            status += f" (pid {s['writer'].get('pid')} on {s['writer'].get('host')})"
        elif status == "interrupted" and s["resumable_step"] is not None:
            status += f", goes on at step {s['resumable_step']}"
        elif s["problem"]:
            status += f": {s['problem']}"
        rows.append(
            (
                s["path"],
                status,
                f"{s['experiment']} ({s['backend']})" if s["backend"] else "",
                s["gear"] or "",
                str(s["epochs"]),
                f"{s['steps']:,}",
                "" if s["loss"] is None else f"{s['loss']:.4f}",
                f"{s['size_bytes'] / 1e6:.1f}",
            )
        )
    return table(columns, rows)
