"""A model of a hundred million parameters: what of it is in memory, in every gear.

`run.py` calls `measure`, which runs each part in a process of its own:

    memory.py PART ARGUMENTS

with the arguments as JSON; a part prints one JSON document. Runs are recorded into
temporary folders, which must lie on a disk, and are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from part import in_process
from target import Target, table_of

GEARS = {
    "tensorflow": ("eager", "graph", "xla", "fused-graph", "fused-xla"),
    "jax": ("eager", "xla", "fused-xla"),
    "torch": ("eager", "graph"),
}

KINDS = ("unrecorded", "recorded", "resumed")

LONGER = {"tensorflow": "graph", "jax": "xla", "torch": "eager"}
"""The gears in which steps are timed in more than one round."""

WIDTH, QUICK_WIDTH = 5000, 1500
DEPTH = 4
"""Layers of WIDTH * WIDTH weights: each is a twelfth of the state."""

BATCH, HALF = 8, 2
"""Steps while a checkpoint may be written, and as many after it."""

SPARE = 0.1
"""Of a state: so much more than was to be is put down to the allocator."""

Row = dict[str, Any]


def measure(
    backends: Sequence[str],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every gear, one after the other: unrecorded, recorded, gone on with."""
    from recording import disk_of

    width = QUICK_WIDTH if quick else WIDTH
    rows: list[Row] = []
    for backend in (*backends, "torch"):
        for gear in GEARS[backend]:
            row: Row = {"backend": backend, "gear": gear, "load": os.getloadavg()[0]}
            many = 2 if gear == LONGER[backend] and not quick else 1
            common = {"gear": gear, "width": width, "rounds": rounds or many}
            with tempfile.TemporaryDirectory() as folder:
                for part in KINDS:
                    say(f"memory: {part}, in {gear} on {backend}")
                    row[part] = in_process(
                        "memory.py",
                        *(part, json.dumps(common | {"path": folder})),
                        backend=backend,
                        failed=lambda error: say(f"memory: {error}"),
                    )
            rows.append(row)
    size_bytes = next(
        (r["recorded"]["size_bytes"] for r in rows if "error" not in r["recorded"]), 0
    )
    say("memory: the disk, and the checksum")
    disk = in_process(
        "memory.py",
        *("disk", json.dumps({"size_bytes": size_bytes, "rounds": rounds or 3})),
        backend=backends[0],
        failed=lambda error: say(f"memory: {error}"),
    )
    return {"folder": disk_of(tempfile.gettempdir()), "rows": rows, "disk": disk}


# One process.


def peak_mib() -> float:
    """The most memory that this process has had, since `forget_peak`."""
    from long_run import memory_mib

    return memory_mib("VmHWM")


def forget_peak() -> None:
    """Let the next `peak_mib` be of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def _loop(gear: str, width: int) -> tuple[Any, Any]:
    import keras
    import numpy as np

    from loopscope import Loop

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [
            keras.Input((100,)),
            *(dense(width, activation="relu") for _ in range(DEPTH + 1)),
            dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, keras.optimizers.Adam(1e-4), loss, gear=gear, seed=0)
    random = np.random.default_rng(0)
    rows = (2 * HALF + 1) * BATCH
    x = random.standard_normal((rows, 100)).astype("float32")
    y = random.integers(0, 10, rows)
    return loop, loop.source(x, y, batch_size=BATCH)


def _about(loop: Any) -> Row:
    sizes = [loop.backend.to_numpy(v).nbytes for v in loop.state.snapshot()]
    return {
        "parameters": loop.model.count_params(),
        "state_mib": sum(sizes) / 2**20,
        "largest_mib": max(sizes) / 2**20,
        "state": loop.state.sha256(),
    }


def unrecorded(*, gear: str, width: int, rounds: int, path: str) -> Row:
    """The training without a run: its peak, and what it ends in."""
    loop, source = _loop(gear, width)
    for epoch in loop.epochs(1 + rounds):
        for _ in epoch.train(source, every=1):
            pass
    peak = peak_mib()
    return {"peak_mib": peak, **_about(loop)}


def recorded(*, gear: str, width: int, rounds: int, path: str) -> Row:
    """The same with a run. It is left in its last epoch.

    A checkpoint is asked for at the first step of an epoch. The steps after it run
    while it is written; then it is waited for, and as many run in peace.
    """
    from loopscope import Recording
    from recording import Watch

    loop, source = _loop(gear, width)
    how = Recording(path, replay_steps=10**9, replay_s=1e9, every_s=1e9)
    found: Row = {"during_ms": [], "idle_ms": [], "saving_mib": [], "peace_mib": []}
    meanwhile = []
    with Watch().on() as watch:

        def wait() -> None:
            while not watch.idle:
                time.sleep(0.001)

        for epoch in loop.epochs(1 + rounds, run=how):
            wait()
            if epoch.index == 1:  # Everything is compiled, the first file is there.
                watch.held.clear()
                watch.saves.clear()
                watch.asked = 0
            loop.save()
            steps, saving = _timed(epoch.train(source, every=1)), True
            forget_peak()
            done = 0
            for index, seconds in steps:
                kind = "during_ms" if saving and index > 0 else "idle_ms"
                if epoch.index > 0 and index > 0 and not (saving and watch.idle):
                    found[kind].append(1e3 * seconds)
                    done += kind == "during_ms"
                if saving and (index == HALF or (index > 0 and watch.idle)):
                    wait()
                    if epoch.index > 0:
                        found["saving_mib"].append(peak_mib())
                        meanwhile.append(done)
                    saving = False
                    forget_peak()
                if epoch.index == rounds and index == 2 * HALF - 1:
                    break
            if epoch.index > 0:
                found["peace_mib"].append(peak_mib())
            if epoch.index == rounds:
                break
        saves = list(watch.saves)
        heard = list(watch.held)
    return {
        **found,
        "meanwhile": meanwhile,
        "size_bytes": saves[-1][0],
        "seconds": [seconds for _, seconds, _ in saves],
        "held_ms": [1e3 * s for _, asked, s, _ in heard if asked],
    }


def _timed(steps: Iterator[Any]) -> Iterator[tuple[int, float]]:
    """The steps of an epoch, and what each took."""
    began = time.perf_counter()
    for step in steps:
        yield step.index, time.perf_counter() - began
        began = time.perf_counter()


def resumed(*, gear: str, width: int, rounds: int, path: str) -> Row:
    """That run, gone on with to its end."""
    from loopscope import Recording

    loop, source = _loop(gear, width)
    how = Recording(path, replay_steps=10**9, replay_s=1e9, every_s=1e9)
    first = None
    for epoch in loop.epochs(1 + rounds, run=how, resume=True):
        for step in epoch.train(source, every=1):
            first = step.index if first is None else first
    return {"peak_mib": peak_mib(), "first": first, **_about(loop)}


def disk(*, size_bytes: int, rounds: int) -> Row:
    """Seconds of a plain file of that size, written in blocks, and of its checksum."""
    block = os.urandom(2**22)
    written, hashed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            began = time.perf_counter()
            with (Path(folder) / str(number)).open("wb") as file:
                for _ in range(size_bytes // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            written.append(time.perf_counter() - began)
            digest, began = hashlib.sha256(), time.perf_counter()
            for _ in range(size_bytes // len(block)):
                digest.update(block)
            hashed.append(time.perf_counter() - began)
    return {"written_s": written, "sha256_s": hashed}


# The page.


def page(found: dict[str, Any], about: str) -> str:
    """results-memory.md."""
    rows = found["rows"]
    whole = next((r["resumed"] for r in rows if "error" not in r["resumed"]), None)
    if whole is None:
        return "\n".join(["# A large model", "", about, "", "Nothing was measured."])
    lines = [
        "# A large model",
        "",
        about,
        "",
        f"{whole['parameters']:,} parameters in float32 with Adam: a state of "
        f"{whole['state_mib']:,.0f} MiB, whose largest variable has "
        f"{whole['largest_mib']:,.0f} MiB. Batches of {BATCH}. Every figure is of a "
        "process of its own, by the kernel's count (`VmHWM`): all that the process has "
        "in memory, framework and compiler included.",
        "",
        *table_of([t for row in rows for t in _targets(row)]),
        "",
        "## Peaks",
        "",
        "*Unrecorded* is the whole training without a run. *In peace* and *while a "
        "checkpoint is written* are the same recorded process, between two checkpoints "
        "and from one step before a checkpoint until it is on the disk: least and most "
        "of the rounds. *Adds* is the difference, in states. *Going on* is a process "
        "that opens the run and trains to the end.",
        "",
        "| backend, gear | unrecorded, MiB | in peace, MiB | while a checkpoint is "
        "written, MiB | adds, states | going on, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['backend']}, {row['gear']} | {_mib(row['unrecorded'])} | "
            + _recorded_cells(row)
            + f" | {_mib(row['resumed'])} |"
        )
    lines += [
        "",
        "## In the background",
        "",
        "*Takes* is from the beginning of the writing until the file was read back. "
        "*Steps meanwhile* are those that ended before; a checkpoint that outlasts "
        f"{HALF} steps is waited for, so there are no more. *Held* is what the thread "
        "that trains spent in asking for it. Steps are slower meanwhile since they "
        "share the processor and the memory with checksums and copies.",
        "",
        "| backend, gear | a checkpoint, MB | takes, s | MB/s | steps meanwhile | "
        "held, ms | a step in peace, ms | meanwhile, ms | slower, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_background(row) for row in rows]
    disk = found["disk"]
    if "error" not in disk:
        size = next(
            r["recorded"]["size_bytes"] for r in rows if "error" not in r["recorded"]
        )
        plain, sha256 = (statistics.median(disk[k]) for k in ("written_s", "sha256_s"))
        lines += [
            "",
            f"A plain file of that size takes {plain:.1f} s ({size / plain / 1e6:.0f} "
            f"MB/s) with one fsync at its end; one SHA-256 of as much {sha256:.1f} s "
            f"({size / sha256 / 1e6:.0f} MB/s). A checkpoint has three: of the state, "
            "of the file, and of the file that is read back.",
        ]
    loads = ", ".join(f"{row['load']:.1f}" for row in rows)
    lines += ["", f"Load of the machine before each gear: {loads}."]
    return "\n".join(lines) + "\n"


def _targets(row: Row) -> list[Target]:
    who = f"{row['backend']}, {row['gear']}"
    statements = [
        f"{who}: a checkpoint adds no more than one state and its largest variable",
        f"{who}: steps go on while it is written",
        f"{who}: going on takes no more than training unrecorded and one variable",
        f"{who}: gone on with, the run ends in the same bits",
    ]
    bad = next((row[p]["error"] for p in KINDS if "error" in row[p]), None)
    if bad is not None:
        return [Target(s, bad, None) for s in statements]
    of, plain, after = row["recorded"], row["unrecorded"], row["resumed"]
    added = max(of["saving_mib"]) - min(of["peace_mib"])
    state, largest = plain["state_mib"], plain["largest_mib"]
    spare = SPARE * state
    grown = after["peak_mib"] - plain["peak_mib"]
    same = plain["state"] == after["state"]
    return [
        Target(
            statements[0],
            f"{added:,.0f} MiB, {added / state:.2f} states",
            added <= state + largest + spare,
        ),
        Target(
            statements[1],
            f"{statistics.median(of['meanwhile']):.0f} steps",
            min(of["meanwhile"]) > 0,
        ),
        Target(statements[2], f"{grown:+,.0f} MiB", grown <= largest + spare),
        Target(statements[3], "the same" if same else "others", same),
    ]


def _mib(part: Row) -> str:
    return f"{part['peak_mib']:,.0f}" if "error" not in part else part["error"]


def _recorded_cells(row: Row) -> str:
    of = row["recorded"]
    if "error" in of:
        return f"{of['error']} | - | -"
    cells = [
        f"{min(of[k]):,.0f} to {max(of[k]):,.0f}" for k in ("peace_mib", "saving_mib")
    ]
    added = [
        (s - min(of["peace_mib"])) / row["unrecorded"].get("state_mib", float("nan"))
        for s in of["saving_mib"]
    ]
    return " | ".join([*cells, f"{min(added):.2f} to {max(added):.2f}"])


def _background(row: Row) -> str:
    of, who = row["recorded"], f"| {row['backend']}, {row['gear']} |"
    if "error" in of:
        return f"{who} {of['error']} | - | - | - | - | - | - | - |"
    seconds = statistics.median(of["seconds"])
    idle = statistics.median(of["idle_ms"])
    during = statistics.median(of["during_ms"] or [float("nan")])
    cells = [
        f"{of['size_bytes'] / 1e6:,.0f}",
        f"{seconds:.1f} ({min(of['seconds']):.1f} to {max(of['seconds']):.1f})",
        f"{of['size_bytes'] / seconds / 1e6:.0f}",
        f"{min(of['meanwhile'])} to {max(of['meanwhile'])}",
        f"{statistics.median(of['held_ms']):.1f}",
        f"{idle:.0f}",
        f"{during:.0f}",
        f"{100 * (during / idle - 1):+.0f}",
    ]
    return f"{who} {' | '.join(cells)} |"


PARTS: dict[str, Callable[..., Row]] = {
    part.__name__: part for part in (unrecorded, recorded, resumed, disk)
}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes to standard error.
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))), file=answers)
    answers.close()
