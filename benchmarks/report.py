"""benchmarks/results.md and results.png out of what `run.py` has measured."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import report_recording
from target import Target, table_of
from workloads import WORKLOADS

Row = dict[str, Any]

FIRST_LOSS = 1e-4
"""How closely, relatively, everyone's first step must have the same loss."""

FIRST_LOSS_RANDOM = 0.1
"""The same where the step draws random numbers."""

CALLBACKS_TITLE = "## `fit` with the usual callbacks"


def markdown(document: dict[str, Any]) -> str:
    """The whole of results.md."""
    rows = document["rows"]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(document["versions"].items()))
    made = targets(document)
    lines = [
        "# Results",
        "",
        f"Machine: {document['machine']}. {versions}. Written by `make bench`"
        f"{' --quick' if document.get('quick') else ''} in "
        f"{document['wall_s'] / 60:.0f} minutes.",
        "",
        "All programs train the same model on the same data from the same weights, "
        "in rounds, one after the other. A figure is the median of the rounds, with "
        "the least and the most. Absolute times move with the machine and its load: "
        "read the ratios, which are taken within each round.",
        "",
        *table_of(made),
    ]
    lines += ["", "![ms per step of everyone](results.png)"]
    for name, workload in WORKLOADS.items():
        of = [r for r in rows if r["workload"] == name]
        if of:
            lines += ["", f"## {workload.title[0].upper()}{workload.title[1:]}", ""]
            lines += _table(of, name)
    lines += ["", CALLBACKS_TITLE, "", *_callbacks(document.get("callbacks") or [])]
    lines += ["", "## Whole trainings in `auto`", ""]
    lines += _choosing(document.get("choosing") or [])
    lines += ["", "## A long run", "", *_long_run(document.get("long_run") or {})]
    lines += ["", *report_recording.sections(document.get("recording") or {})]
    return "\n".join(lines) + "\n"


def callbacks_alone(rows: list[Row]) -> str:
    """The section on `fit` with callbacks, and its targets."""
    lines = [
        *table_of([*_callbacks_targets(rows)]),
        "",
        CALLBACKS_TITLE,
        "",
        *_callbacks(rows),
    ]
    return "\n".join(lines) + "\n"


# Tables.


def _table(rows: list[Row], workload: str) -> list[str]:
    epoch = " s/epoch |" if workload == "mlp" else ""
    rule = "---|" if epoch else ""
    lines = [
        f"| backend | who | ms/step |{epoch} least to most | first call, s | "
        "loss of step 0, of epoch 0 |",
        f"|---|---|---|{rule}---|---|---|",
    ]
    steps = WORKLOADS[workload].steps
    for row in sorted(rows, key=lambda r: (r["backend"], _ms(r))):
        who = row["peer"]
        if row["peer"] == "loopscope auto" and "about" in row:
            who += f" ({row['about'].split(';')[0]})"
        ms, spread = "-", row.get("error", "")
        if "median" in row:
            ms = f"{row['median']:.3f}"
            spread = f"{min(row['ms']):.3f} to {max(row['ms']):.3f}"
        elif "once_ms" in row:
            ms, spread = f"{row['once_ms']:.3f}", "measured once: far behind"
        per_epoch = ""
        if epoch:
            timed = "median" in row
            per_epoch = f" {row['median'] * steps / 1e3:.3f} |" if timed else " - |"
        first_s = f"{row['first_s']:.1f}" if "first_s" in row else "-"
        lines.append(
            f"| {row['backend']} | {who} | {ms} |{per_epoch} {spread} | {first_s} | "
            f"{_losses(row)} |"
        )
    lines += ["", *_same_training(rows, workload)]
    for row in rows:
        settings = row.get("about", "")
        if ";" in settings or "tried" in settings:
            lines.append(f"- {row['backend']}, {row['peer']}: {settings}.")
    return lines


def _losses(row: Row) -> str:
    if row.get("first_loss") is None:
        return "-"
    losses = f"{row['first_loss']:.4f}"
    return losses + (f", {row['loss']:.3f}" if row.get("loss") is not None else "")


def _same_training(rows: list[Row], workload: str) -> list[str]:
    """A line on whether everyone trained the same, and who did not."""
    allowed = WORKLOADS[workload]
    whole = [r for r in rows if r.get("steps") == allowed.steps]
    checks = (
        (
            "first_loss",
            FIRST_LOSS_RANDOM if allowed.random else FIRST_LOSS,
            "the first step's loss",
            rows,
        ),
        ("loss", allowed.loss_spread, "the first epoch's mean loss", whole),
    )
    words, wrong = [], []
    for key, limit, name, of in checks:
        known = {id(r): r[key] for r in of if isinstance(r.get(key), float)}
        if not known:
            continue
        middle = statistics.median(known.values())
        off = {
            f"{r['peer']} ({r['backend']})": abs(known[id(r)] / middle - 1)
            for r in of
            if id(r) in known
        }
        words.append(f"{name} within {max(off.values()):.1e} of the median")
        wrong += [f"{who} ({name})" for who, o in off.items() if not o <= limit]
    lines = [f"- Same training: {'; '.join(words)}."] if words else []
    if wrong:
        lines.append(f"- **Trains something else:** {', '.join(wrong)}.")
    return lines


def _callbacks(rows: list[Row]) -> list[str]:
    if not rows:
        return ["Not measured."]
    lines = [
        "The bar of `verbose=1`, ModelCheckpoint after each epoch, EarlyStopping and "
        "CSVLogger. Both are given the same arrays and a model compiled with Keras's "
        "defaults; an epoch in the middle of a long training is timed, with what its "
        "end brings. On TensorFlow an epoch of Keras's may wait at its end for the "
        "autotuning of its pipeline, so `keras.fit` trains once more without: from a "
        "`tf.data` pipeline of the same batches. The faster of the two counts.",
        "",
        "| workload | backend | `keras.fit`, ms/step | `loopscope.fit`, ms/step | "
        "times faster | least to most |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = _find(rows, row["workload"], row["backend"], "loopscope.fit")
        if ours is None or row is ours:
            continue
        errors = [r["error"] for r in (row, ours) if "error" in r]
        times, spread = "-", "; ".join(errors)
        if not errors:
            middle, least, most = _ratio(row, ours)
            times, spread = f"{middle:.2f}", f"{least:.2f} to {most:.2f}"
        lines.append(
            f"| {row['workload']} | {row['backend']} | {_said(row)} | {_said(ours)} | "
            f"{times} | {spread} |"
        )
    lines.append("")
    for name in WORKLOADS:
        of = [r for r in rows if r["workload"] == name]
        lines += [f"- {name}: {line[2:]}" for line in _same_training(of, name)]
    return lines


def _said(row: Row) -> str:
    """Milliseconds per step, and what is special about them."""
    _, _, special = row["peer"].partition(", ")
    special = special or row.get("about", "")
    ms = f"{row['median']:.3f}" if "median" in row else "-"
    return f"{ms} ({special})" if special else ms


def _long_run(long_run: dict[str, Any]) -> list[str]:
    if "flat" not in long_run:
        return [f"Not measured. {long_run.get('error', '')}".strip()]
    flat, disk = long_run["flat"], long_run["from_disk"]
    return [
        "A tiny model in gear fused-xla on TensorFlow, epochs of 1,000 steps.",
        "",
        "| steps | median us/step | quiet tenth us/step |",
        "|---|---|---|",
        *(
            f"| {w['from_step']:,} to {w['to_step']:,} | {w['median_us']:.2f} | "
            f"{w['quiet_us']:.2f} |"
            for w in flat["windows"]
        ),
        "",
        f"Memory from step 2,000 to step {flat['steps']:,}: "
        + ", ".join(f"{k} {v:+.2f} MiB" for k, v in flat["grown_mib"].items())
        + ".",
        "",
        f"From disk: a file of {disk['file_mib']:.0f} MiB in {disk['steps']} steps and "
        f"{disk['seconds']:.1f} s; anonymous memory grew by at most "
        f"{disk['added_mib']:.0f} MiB.",
    ]


def _choosing(rows: list[Row]) -> list[str]:
    if not rows:
        return ["Not measured."]
    lines = [
        "From nothing, trials and compilations included; the cache is off.",
        "",
        "| workload | backend | steps | plain, s | `auto`, s | chosen | longer by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain_s, auto_s = (statistics.median(row[k]) for k in ("plain_s", "auto_s"))
        chosen = ", ".join(dict.fromkeys(row["gears"]))
        lines.append(
            f"| {row['workload']} | {row['backend']} | {row['steps']:,} | "
            f"{row['plain']} {plain_s:.2f} | {auto_s:.2f} | {chosen} | "
            f"{auto_s - plain_s:+.2f} s |"
        )
    return lines


def _choosing_target(rows: list[Row]) -> Target:
    """The training that `auto` made longest, against what is allowed for it."""
    statement = "`auto` makes no training longer than the plain gear by 5 % or 2 s"
    if not rows:
        return Target(statement, "-", None)
    over = []
    for row in rows:
        plain_s, auto_s = (statistics.median(row[k]) for k in ("plain_s", "auto_s"))
        allowed_s = max(0.05 * plain_s, 2.0)
        over.append((auto_s - plain_s - allowed_s, auto_s - plain_s, row))
    excess_s, longer_s, worst = max(over, key=lambda o: o[0])
    return Target(
        statement,
        f"at worst {longer_s:+.2f} s ({worst['workload']} on {worst['backend']}, "
        f"{worst['steps']:,} steps)",
        excess_s <= 0,
    )


# Targets.


def targets(document: dict[str, Any]) -> list[Target]:
    """Each statement about speed with the figure reached."""
    rows = [r for r in document["rows"] if _ms(r) < math.inf]
    made: list[Target] = []
    if any(r["workload"] == "mlp" for r in rows):
        made += _mlp_targets(rows)
    for workload in WORKLOADS:
        for backend in ("tensorflow", "jax"):
            made += _auto_targets(rows, workload, backend)
    made += _callbacks_targets(document.get("callbacks") or [])
    made.append(_choosing_target(document.get("choosing") or []))
    made += _long_targets(document.get("long_run") or {})
    return made + report_recording.targets(document.get("recording") or {})


def _mlp_targets(rows: list[Row]) -> list[Target]:
    def find(backend: str, peer: str) -> Row | None:
        return _find(rows, "mlp", backend, peer)

    auto = find("tensorflow", "loopscope auto")
    mlp = "Tutorial MLP, TensorFlow"
    made = [
        _at_least(
            50,
            f"{mlp}: 50 times the eager loop",
            find("tensorflow", "eager loop"),
            auto,
        ),
        _at_least(
            4,
            f"{mlp}: 4 times the tutorial's `tf.function` loop",
            find("tensorflow", "tf.function loop"),
            auto,
        ),
        _at_least(
            1,
            f"{mlp}: no slower than JAX by hand with `lax.scan`",
            find("jax", "lax.scan by hand"),
            auto,
        ),
    ]
    floors = [r for r in rows if r["backend"] == "one thread"]
    if floors:
        floor = min(floors, key=_ms)
        others = [
            f"{peer} {_ratio(row, floor)[0]:.2f}"
            for backend, peer in (
                ("tensorflow", "loopscope fused-xla"),
                ("tensorflow", "whole epoch by hand"),
                ("tensorflow", "whole epoch by hand, TensorFlow operations only"),
                ("jax", "lax.scan by hand"),
            )
            if (row := find(backend, peer)) is not None
        ]
        made.append(
            _at_most(
                1.25,
                f"{mlp}: within 1.25 of the one-thread floor ({floor['peer']})",
                auto,
                floor,
                f"Against the same floor: {', '.join(others)}.",
            )
        )
    fit, wide = "loopscope fit with validation", ", 1,000 a batch"
    for peer, bare in (
        (fit, "bare fused loop"),
        (fit + wide, "bare fused loop"),
        (fit, "bare fused loop and validation"),
    ):
        whole, base = find("tensorflow", peer), find("tensorflow", bare)
        if whole is None or base is None:
            continue
        middle, least, most = (100 * (r - 1) for r in _ratio(whole, base))
        why = ""
        if "validation" not in bare:
            why = (
                "Here the forward pass over 10,000 validation images, 64 a batch, "
                "counts as added; the next lines take batches of 1,000, and compare "
                "with a bare loop that validates too."
            )
        made.append(
            Target(
                f"{mlp}: `fit` with validation{wide if peer != fit else ''}, metrics "
                f"and events adds at most 10 % to the {bare}",
                f"{middle:+.1f} % ({least:+.1f} to {most:+.1f})",
                middle <= 10,
                why,
            )
        )
    return made


def _auto_targets(rows: list[Row], workload: str, backend: str) -> list[Target]:
    auto = _find(rows, workload, backend, "loopscope auto")
    if auto is None:
        return []
    of = [r for r in rows if (r["workload"], r["backend"]) == (workload, backend)]
    gears = [r for r in of if _is_gear(r["peer"])]
    peers = [r for r in of if r["module"].startswith("peers")]
    made = []
    for name, group in (("of the peers", peers), ("single gear of ours", gears)):
        if not group:
            continue
        best = min(group, key=_ms)
        made.append(
            _at_most(
                1.05,
                f"{WORKLOADS[workload].title}, {backend}: `auto` takes at most 1.05 of "
                f"the best {name} ({best['peer']})",
                auto,
                best,
                f"`auto` said: {auto.get('about', '')}.",
            )
        )
    return made


def _callbacks_targets(rows: list[Row]) -> Iterator[Target]:
    """`fit` with the usual callbacks against the faster of Keras's."""
    rows = [r for r in rows if _ms(r) < math.inf]
    for name, workload in WORKLOADS.items():
        for backend in ("tensorflow", "jax"):
            of = [r for r in rows if (r["workload"], r["backend"]) == (name, backend)]
            ours = _find(of, name, backend, "loopscope.fit")
            theirs = [r for r in of if r is not ours]
            if not theirs:
                continue
            best = min(theirs, key=_ms)
            why = f"In gear {ours.get('about', '')}." if ours else ""
            yield _at_most(
                1.0,
                f"{workload.title}, {backend}: `fit` with the usual callbacks takes at "
                f"most 1.00 of `keras.fit`'s time ({best['peer']})",
                ours,
                best,
                why,
            )
            if (name, backend) == ("mlp", "tensorflow"):
                yield _at_least(
                    5,
                    "Tutorial MLP, TensorFlow: `fit` with the usual callbacks at least "
                    f"5 times as fast as Keras's default ({best['peer']})",
                    best,
                    ours,
                )


def _long_targets(long_run: dict[str, Any]) -> list[Target]:
    statements = (
        "Cost per step flat from 10^3 to 10^6 steps (within 10 %)",
        "Memory grows by less than 10 MB over 10^6 steps",
        "Data on disk ten times larger than the memory allowed trains",
    )
    if "flat" not in long_run:
        return [Target(s, "-", None) for s in statements]
    flat, disk = long_run["flat"], long_run["from_disk"]
    steps = flat["steps"]
    quiet = [w["quiet_us"] for w in flat["windows"]]
    grown = max(flat["grown_mib"].values())
    short = "" if steps >= 10**6 else f" over {steps:,} steps only"
    return [
        Target(
            statements[0],
            f"{quiet[-1] / quiet[0]:.2f} of the first window{short}",
            quiet[-1] <= 1.1 * quiet[0],
            "The machine's load moves this figure; the table below has all windows.",
        ),
        Target(statements[1], f"{grown:+.2f} MiB{short}", grown * 2**20 < 10**7),
        Target(
            statements[2],
            f"{disk['file_mib']:.0f} MiB file, {disk['added_mib']:.0f} MiB added, "
            f"{disk['allowed_mib']} allowed",
            disk["added_mib"] <= disk["allowed_mib"],
        ),
    ]


def _at_least(
    times: float, statement: str, slow: Row | None, fast: Row | None
) -> Target:
    if slow is None or fast is None:
        return Target(statement, "-", None)
    middle, least, most = _ratio(slow, fast)
    about = fast.get("about", "")
    return Target(
        statement,
        f"{middle:.2f} times ({least:.2f} to {most:.2f})",
        middle >= times,
        f"`auto` said: {about}." if about else "",
    )


def _at_most(
    limit: float, statement: str, ours: Row | None, base: Row, why: str = ""
) -> Target:
    if ours is None:
        return Target(statement, "-", None)
    middle, least, most = _ratio(ours, base)
    return Target(
        statement, f"{middle:.2f} ({least:.2f} to {most:.2f})", middle <= limit, why
    )


def _ratio(over: Row, under: Row) -> tuple[float, float, float]:
    """How many times one takes what the other takes: median, least, most of rounds."""
    if "median" in over and "median" in under:
        ratios = sorted(a / b for a, b in zip(over["ms"], under["ms"], strict=True))
        return statistics.median(ratios), ratios[0], ratios[-1]
    ratio = _ms(over) / _ms(under)
    return ratio, ratio, ratio


def _ms(row: Row) -> float:
    return float(row.get("median", row.get("once_ms", math.inf)))


def _find(rows: Iterable[Row], workload: str, backend: str, peer: str) -> Row | None:
    wanted = (workload, backend, peer)
    of = (r for r in rows if (r["workload"], r["backend"], r["peer"]) == wanted)
    return next(of, None)


def _is_gear(peer: str) -> bool:
    return peer.startswith("loopscope ") and peer.split()[1] not in ("auto", "fit")


def machine() -> str:
    """The machine in words."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


# The chart.


def chart(rows: list[Row], file: Path) -> None:
    """A bar for each program, a panel for each workload; the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in rows if "median" in r and "eager" not in r["peer"]]
    names = [n for n in WORKLOADS if any(r["workload"] == n for r in shown)]
    if not names:
        return
    counts = [sum(r["workload"] == n for r in shown) for n in names]
    figure, panels = pyplot.subplots(
        len(names),
        1,
        figsize=(9, 0.24 * sum(counts) + 0.9 * len(names)),
        height_ratios=counts,
        squeeze=False,
    )
    for name, panel in zip(names, panels[:, 0], strict=True):
        of = sorted((r for r in shown if r["workload"] == name), key=lambda r: -_ms(r))
        medians = [r["median"] for r in of]
        spread = [
            [m - min(r["ms"]) for m, r in zip(medians, of, strict=True)],
            [max(r["ms"]) - m for m, r in zip(medians, of, strict=True)],
        ]
        panel.barh(
            [f"{r['peer']}, {r['backend']}" for r in of],
            medians,
            xerr=spread,
            color=[_color(r) for r in of],
            error_kw={"elinewidth": 0.8, "ecolor": "#444"},
        )
        panel.set_title(f"{WORKLOADS[name].title}: ms/step", fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _color(row: Row) -> str:
    if row["module"] == "floor":
        return "#c9a227"
    return "#1f6fb4" if row["module"] == "ours" else "#9aa3ab"
