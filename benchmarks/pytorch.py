"""PyTorch: loopscope's gears beside Keras's own `fit` and loops written by hand.

Each has a process of its own, since the threads of one would wait for work while
another one works; they take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from target import Target, table_of

WORKLOADS = ("mlp", "convnet", "transformer")
FIT, HAND = "keras.fit", "loop by hand"
GRAPH, EAGER, AUTO = "loopscope graph", "loopscope eager", "loopscope auto"

Row = dict[str, Any]


def measure(
    backends: Sequence[str],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """Every workload, one after the other."""
    rows = []
    for workload in WORKLOADS[:1] if quick else WORKLOADS:
        say(f"pytorch: {workload}")
        few = 3 if quick or workload != "mlp" else 9
        rows.append({"workload": workload, **_speeds(workload, rounds or few)})
    return rows


def _speeds(workload: str, rounds: int) -> Row:
    """Seconds of an epoch of everyone, round by round, and what a start takes."""
    from run import Worker

    who = [("peers_torch", FIT), *(("ours", name) for name in (AUTO, GRAPH, EAGER))]
    if workload == "mlp":
        who += [("peers_torch", HAND), ("peers_torch", f"{HAND}, torch.compile")]
    workers = {peer: Worker("torch") for _, peer in who}
    steps: dict[str, int] = {}
    row: Row = {"seconds": {}, "first_s": {}, "first_losses": {}, "auto": ""}
    try:
        for module, peer in who:
            made = workers[peer].ask(
                "make", workload=workload, module=module, peer=peer
            )
            checked = workers[peer].ask("check", peer=peer)
            for answer in (made, checked):
                if "error" in answer:
                    return {"error": f"{peer}: {answer['error']}"}
            row["first_s"][peer] = made["first_s"]
            row["first_losses"][peer] = made["first_loss"]
            row["seconds"][peer] = []
            if peer == AUTO:
                row["auto"] = checked["about"]
            steps[peer] = checked["steps"]
        names = [peer for _, peer in who]
        for number in range(rounds):
            turn = number % len(names)
            for peer in names[turn:] + names[:turn]:
                seconds = workers[peer].ask("time", peer=peer)["seconds"]
                row["seconds"][peer].append(seconds / steps[peer])
    finally:
        for worker in workers.values():
            worker.close()
    return row


def page(rows: Sequence[Row], about: str) -> str:
    """results-pytorch.md."""
    lines = [
        "# On PyTorch",
        "",
        about,
        "",
        "Everyone trains the same, each in a process of its own, in turns, from the "
        "same weights, on arrays. *By hand* is a loop in plain PyTorch whose data lie "
        "on the device; with `torch.compile` its model, loss and optimizer are "
        "compiled. Ratios are taken within each round: median, least and most.",
        "",
        *table_of([t for row in rows for t in _targets(row)]),
        "",
        "## Everyone",
        "",
        "| workload | who | ms/step | first step, s | times as fast as keras.fit |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['workload']} | {row['error']} | - | - | - |")
            continue
        for name, seconds in row["seconds"].items():
            ratio = statistics.median(_ratios(row, FIT, name))
            lines.append(
                f"| {row['workload']} | {name} | {1e3 * statistics.median(seconds):.3f}"
                f" | {row['first_s'][name]:.1f} | {ratio:.2f} |"
            )
    lines += ["", "What `auto` said:", ""]
    lines += [f"- {row['workload']}: {row.get('auto', '-')}" for row in rows]
    return "\n".join(lines) + "\n"


def _targets(row: Row) -> list[Target]:
    if row["workload"] != "mlp":
        return []
    statements = [
        ("at least twice as fast as `keras.fit`", FIT, 2.0),
        ("no slower than a loop by hand (10 %)", HAND, 1 / 1.1),
    ]
    made = []
    for words, other, least in statements:
        statement = f"tutorial MLP, `auto`: {words}"
        if "error" in row:
            made.append(Target(statement, row["error"], None))
            continue
        ratios = _ratios(row, other, AUTO)
        reached = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) times as fast"
        )
        made.append(Target(statement, reached, statistics.median(ratios) >= least))
    return made


def _ratios(row: Row, slow: str, fast: str) -> list[float]:
    pairs = zip(row["seconds"][slow], row["seconds"][fast], strict=True)
    return [s / f for s, f in pairs]
