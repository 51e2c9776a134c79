"""The sections on recorded runs out of what `recording.py` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from target import Target, percent, table_of
from workloads import WORKLOADS

Row = dict[str, Any]

JOURNAL, CHECKPOINTS = 3.0, 2.0
"""Percent that may be added by the journal, and by checkpoints."""

REWIND_S, READ_S, GROWN_MB = 1.0, 2.0, 10.0

WAYS = {
    "journal": "journal alone",
    "defaults": "all defaults",
    "checkpoints": "the checkpoints' share",
    "nothing": "nothing, measured as the others",
}


def page(found: dict[str, Any], about: str) -> str:
    """results-recording.md.

    Args:
        found: What was measured.
        about: Machine, versions, command.
    """
    lines = [
        "# Recorded runs",
        "",
        about,
        "",
        "A figure is the median of the rounds, with the least and the most. Shares are "
        "taken within each round: read these, absolute times move with the machine and "
        "its load.",
        "",
        *table_of(targets(found)),
        "",
        *sections(found),
    ]
    return "\n".join(lines) + "\n"


def sections(found: dict[str, Any]) -> list[str]:
    """Every table."""
    lines = ["## What recording costs", "", *_cost(found.get("cost") or [])]
    lines += ["", "## Rewind", "", *_rewind(found.get("rewind") or [])]
    lines += ["", "## A long journal", "", *_journal(found.get("journal") or {})]
    lines += ["", "## Memory and handles", "", *_memory(found.get("memory") or [])]
    lines += ["", "## A large checkpoint", ""]
    lines += _checkpoint(found.get("checkpoint") or [])
    if found:
        lines += ["", f"Load of the machine before each part: {_loads(found)}."]
    return lines


def targets(found: dict[str, Any]) -> list[Target]:
    """Each statement about recording with the figure reached."""
    made: list[Target] = []
    for row in found.get("cost") or []:
        who = f"{WORKLOADS[row['workload']].title}, {row['backend']}, {row['gear']}"
        for way, limit, what in (
            ("journal", JOURNAL, "the journal adds"),
            ("checkpoints", CHECKPOINTS, "checkpoints by default add"),
        ):
            statement = f"{who}: {what} at most {limit:.0f} % in the steady state"
            if "error" in row:
                made.append(Target(statement, row["error"], None))
                continue
            shares = _shares(row, way, "steady_s")
            cpu = statistics.median(_shares(row, way, "steady_cpu_s"))
            noise = percent(_shares(row, "nothing", "steady_s"))
            made.append(
                Target(
                    statement,
                    f"{percent(shares)} %; of the quietest pieces "
                    f"{_quietest(row, way):+.1f} %; of processor time {cpu:+.1f} %; "
                    f"two unrecorded ones differ by {noise} %",
                    statistics.median(shares) <= limit,
                )
            )
    for row in found.get("rewind") or []:
        if row["gear"] != "auto":
            continue
        who = f" in {row['chosen']}" if "chosen" in row else ""
        statement = (
            f"Tutorial MLP, {row['backend']}: any step of a five-epoch run within "
            f"{REWIND_S:.0f} s in a warm process (`auto`{who})"
        )
        if "error" in row:
            made.append(Target(statement, row["error"], None))
            continue
        worst = max(row["seconds"])
        made.append(Target(statement, f"at most {worst:.2f} s", worst <= REWIND_S))
    made.append(_read_target(found.get("journal") or {}))
    made.append(_memory_target(found.get("memory") or []))
    return made


def _read_target(row: Row) -> Target:
    steps = f"{row['steps']:,}" if row else "10,000,000"
    statement = (
        f"A journal of {steps} steps is opened, summed up and plotted in under "
        f"{READ_S:.0f} s"
    )
    reads = [r for r in row.get("reads", []) if "error" not in r]
    if not reads:
        return Target(statement, "-", None)
    seconds = [r["all_s"] for r in reads]
    reached = _spread(seconds, 1, " s")
    return Target(statement, reached, statistics.median(seconds) < READ_S)


def _memory_target(rows: Sequence[Row]) -> Target:
    row = next((r for r in rows if r["recorded"] and "error" not in r), None)
    steps = f"{row['steps']:,}" if row else "1,000,000"
    statement = (
        f"Memory and handles stay flat over {steps} recorded steps (less than "
        f"{GROWN_MB:.0f} MB after the first fifth)"
    )
    if row is None:
        return Target(statement, "-", None)
    grown, handles = _grown(row), _handles(row)
    return Target(
        statement,
        f"{grown:+.1f} MB, {handles:+d} handles",
        grown < GROWN_MB and handles <= 1,
        "The file of a checkpoint that is being written is one handle.",
    )


# Tables.


def _cost(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured."]
    lines = [
        "One loop trains the same again and again in one process: unrecorded, with the "
        "journal alone, with all defaults, unrecorded again, in turns. A piece is a "
        "call of `fit` on arrays, without validation, from the initial weights, into a "
        "new folder. *Steady* leaves out the first 3 epochs and what follows the last: "
        "the folder, the data's checksum and the first checkpoint lie before, the last "
        "checkpoint after. *Processor* is the time of all threads of the process. "
        "Shares are of the mean of the two unrecorded pieces of the round; the second "
        "of these against the first says what the machine makes of nothing. "
        "*Quietest* compares the fastest piece of each kind, which other programs on "
        "the machine have disturbed least. "
        "*Journal alone* leaves out the checkpoints at the ends of epochs too, "
        "which no option of `Recording` does.",
        "",
        "| workload | backend, gear | unrecorded, ms/step | what | steady, % | "
        "steady, quietest, % | steady, processor, % | whole, % | whole, processor, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        who = f"| {row['workload']} | {row['backend']}, {row['gear']} |"
        if "error" in row:
            lines.append(f"{who} - | {row['error']} | - | - | - | - | - |")
            continue
        for way, words in WAYS.items():
            steady, *rest = (
                percent(_shares(row, way, key))
                for key in ("steady_s", "steady_cpu_s", "whole_s", "whole_cpu_s")
            )
            cells = " | ".join([steady, f"{_quietest(row, way):+.1f}", *rest])
            ms = _epoch_ms(row) / row["steps"]
            lines.append(f"{who} {ms:.3f} | {words} | {cells} |")
    lines += [
        "",
        "Where it goes, in one more piece each, with a clock in the recorder:",
        "",
        "| workload | backend, gear | what | training thread in the recorder, ms/epoch "
        "(steady) | of the quietest unrecorded piece, % | of these ms | writing "
        "thread, processor, ms/epoch | checkpoints | one takes, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for way, where in row.get("where", {}).items():
            by = where["epoch_ms"]
            most = sorted(by, key=lambda name: -by[name])[:4]
            parts = ", ".join(f"{name} {by[name]:.2f}" for name in most)
            lines.append(
                f"| {row['workload']} | {row['backend']}, {row['gear']} | "
                f"{WAYS[way]} | {sum(by.values()):.2f} | "
                f"{100 * sum(by.values()) / _epoch_ms(row, min):.2f} | {parts} | "
                f"{where['writer_cpu_ms'] / row['epochs']:.2f} | {where['saves']} | "
                f"{where['save_ms']:.1f} |"
            )
    lines.append("")
    for row in rows:
        if "error" in row:
            continue
        rounds, same = len(row["pieces"]["journal"]), row["same_state"]
        state = "the same bits" if same else "**other bits**"
        lines.append(
            f"- {row['workload']}, {row['backend']}: {rounds} rounds of "
            f"{row['epochs']} epochs of {row['steps']} steps; every piece ended in "
            f"{state}."
        )
    return lines


def _epoch_ms(
    row: Row, which: Callable[[list[float]], float] = statistics.median
) -> float:
    """Of an unrecorded epoch in the steady state."""
    seconds = [p["steady_s"] for p in row["pieces"]["unrecorded"]]
    return 1e3 * which(seconds) / (row["epochs"] - row["settled"])


def _quietest(row: Row, way: str) -> float:
    """Percent that the fastest piece with something takes longer than that without."""
    pieces = row["pieces"]
    least = {k: min(p["steady_s"] for p in of) for k, of in pieces.items()}
    alone = {"pieces": {k: [{"steady_s": s}] for k, s in least.items()}}
    (share,) = _shares(alone, way, "steady_s")
    return share


def _shares(row: Row, way: str, key: str) -> list[float]:
    """Percent that something adds, for each round."""

    def of(kind: str) -> list[float]:
        return [piece[key] for piece in row["pieces"][kind]]

    first, again = of("unrecorded"), of("unrecorded again")
    if way == "nothing":
        return [100 * (b / a - 1) for a, b in zip(first, again, strict=True)]
    base = [(a + b) / 2 for a, b in zip(first, again, strict=True)]
    more, less = {
        "journal": (of("journal"), base),
        "defaults": (of("defaults"), base),
        "checkpoints": (of("defaults"), of("journal")),
    }[way]
    return [100 * (m - n) / b for m, n, b in zip(more, less, base, strict=True)]


def _rewind(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured."]
    lines = [
        "The tutorial's MLP, five epochs of MNIST with validation, recorded with all "
        "defaults; then steps drawn at random, one after the other in a warm process.",
        "",
        "| backend | gear | steps drawn | median, s | largest, s | most steps replayed "
        "| the recorded bits | first call, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gear = row["gear"]
        if "error" in row:
            lines.append(f"| {row['backend']} | {gear} | {row['error']} | | | | | |")
            continue
        gear = f"auto ({row['chosen']})" if gear == "auto" else gear
        seconds = row["seconds"]
        lines.append(
            f"| {row['backend']} | {gear} | {len(seconds)} of {row['steps']:,} | "
            f"{statistics.median(seconds):.2f} | {max(seconds):.2f} | "
            f"{max(row['replayed']):,} | {row['identical']} | {row['first_s']:.2f} |"
        )
    return lines


def _journal(row: Row) -> list[str]:
    if "written_s" not in row:
        return [f"Not measured. {row.get('error', '')}".strip()]
    size = row["size_bytes"] / 1e6
    lines = [
        f"{row['steps']:,} losses in rows of 1,000, a transaction each: written in "
        f"{row['written_s']:.1f} s, {size:.0f} MB. Read in fresh processes, from a "
        "warm page cache; imports are timed apart.",
        "",
        "| what | s | least to most |",
        "|---|---|---|",
    ]
    reads = [r for r in row["reads"] if "error" not in r]
    lines += [f"- {r['error']}" for r in row["reads"] if "error" in r]
    for key, what in (
        ("summary_s", "open, and the run on one line"),
        ("mean_s", "every step's loss, and their mean"),
        ("curve_s", "a curve of 1,000 points"),
        ("plot_s", "drawn and saved by matplotlib"),
        ("all_s", "all of it"),
        ("imports_s", "imports: loopscope's reader, NumPy"),
        ("plot_imports_s", "imports: matplotlib"),
    ):
        seconds = [r[key] for r in reads]
        if seconds:
            middle = statistics.median(seconds)
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            lines.append(f"| {what} | {middle:.3f} | {spread} |")
    return lines


def _memory(rows: Sequence[Row]) -> list[str]:
    known = [r for r in rows if "error" not in r]
    if not known:
        return ["Not measured."]
    lines = [
        f"A model of one Dense layer on 4 features, batch 8, gear {known[0]['gear']} "
        f"on {known[0]['backend']}; {known[0]['steps']:,} steps in 10 epochs. Recorded "
        "with all defaults, so that a checkpoint is made every 2,000 steps. At the "
        "end of each epoch:",
        "",
    ]
    head, rule = "| steps |", "|---|"
    for row in known:
        who = "" if row["recorded"] else "unrecorded: "
        head += f" {who}resident, MB | {who}handles | {who}threads |"
        rule += "---|---|---|"
    lines += [head, rule]
    for points in zip(*(r["table"] for r in known), strict=True):
        cells = "".join(
            f" {_mb(p['VmRSS']):.1f} | {p['handles']} | {p['threads']} |"
            for p in points
        )
        lines.append(f"| {points[0]['step']:,} |{cells}")
    lines.append("")
    for row in known:
        who = "Recorded" if row["recorded"] else "Unrecorded"
        line = (
            f"- {who}: {row['seconds']:.1f} s; after the first fifth resident memory "
            f"grew by {_grown(row):+.2f} MB, anonymous by "
            f"{_grown(row, 'RssAnon'):+.2f} MB."
        )
        if row["recorded"]:
            line += (
                f" The run has {row['files']:,} files and "
                f"{row['size_bytes'] / 1e6:.1f} MB, the journal "
                f"{row['journal_bytes'] / 1e6:.1f} MB."
            )
        lines.append(line)
    return lines


def _checkpoint(rows: Sequence[Row]) -> list[str]:
    known = [r for r in rows if "error" not in r]
    if not known:
        return ["Not measured."]
    row = known[0]
    lines = [
        f"A model of {row['parameters'] / 1e6:.1f} million parameters with Adam: "
        f"{row['size_bytes'] / 1e6:.0f} MB. *Written* is all of it: the copy, the "
        "checksums, both files with fsync, reading back. Beside it, in the same round, "
        "a plain new file of as many bytes with one fsync, and one SHA-256 over them. "
        "*Held up* is what the training thread waits for the state to be captured.",
        "",
        "| backend, gear | written, s | MB/s | plain file, s | SHA-256, s | "
        "held up, ms | ms/step while one is written | ms/step otherwise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in known:
        rate = row["size_bytes"] / 1e6 / statistics.median(row["seconds"])
        lines.append(
            f"| {row['backend']}, {row['gear']} | {_spread(row['seconds'])} | "
            f"{rate:.0f} | {_spread(row['plain_s'])} | {_spread(row['sha256_s'])} | "
            f"{_spread(row['held_ms'])} | {_spread(row['during_ms'], 0)} | "
            f"{_spread(row['idle_ms'], 0)} |"
        )
    lines += [f"- {r['backend']}: {r['error']}" for r in rows if "error" in r]
    return lines


def _loads(found: dict[str, Any]) -> str:
    """Each part's load average before it began."""
    words = []
    for name in ("cost", "rewind", "journal", "memory", "checkpoint"):
        part = found.get(name) or []
        rows = [part] if isinstance(part, dict) else part
        if rows:
            loads = ", ".join(f"{row['load']:.1f}" for row in rows)
            words.append(f"{name} {loads}")
    return "; ".join(words)


def _grown(row: Row, kind: str = "VmRSS") -> float:
    """MB from the end of the first fifth to the end."""
    return _mb(row["table"][-1][kind] - row["table"][1][kind])


def _handles(row: Row) -> int:
    table: list[Row] = row["table"]
    return int(table[-1]["handles"] - table[1]["handles"])


def _mb(mib: float) -> float:
    return mib * 2**20 / 1e6


def _spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    if not values:
        return "-"
    return (
        f"{statistics.median(values):.{digits}f}{unit} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )
