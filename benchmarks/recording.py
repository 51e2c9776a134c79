"""What it costs to record a run, and what can be had from one.

`run.py` calls `measure`, which runs each part in a process of its own:

    recording.py PART ARGUMENTS

with the arguments as JSON; a part prints one JSON document. Runs are recorded into
temporary folders, which must lie on a disk, and are removed.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from part import in_process

FAST = {"tensorflow": "fused-xla", "jax": "fused-xla"}
"""The gear that `auto` chooses for the tutorial's MLP."""

PLAIN = {"tensorflow": "graph", "jax": "xla"}

SETTLED = 3
"""Epochs of a piece after which it is in its steady state."""

ROW_STEPS = 1000
"""Steps of a row, as the writer makes them of the MLP with all defaults."""


def measure(
    backends: Sequence[str],
    rounds: int | None,
    quick: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every part, one after the other."""
    found: dict[str, Any] = {"folder": disk_of(tempfile.gettempdir())}
    found["settings"] = {"rounds": rounds, "quick": quick}

    def ask(about: str, part: str, backend: str, **arguments: Any) -> dict[str, Any]:
        say(f"recording: {about}")
        load = os.getloadavg()[0]
        row = {"backend": backend, "part": part, "load": load, **arguments}
        return row | in_process(
            "recording.py",
            *(part, json.dumps(arguments)),
            backend=backend,
            failed=lambda error: say(f"recording: {about}: {error}"),
        )

    pieces = [("mlp", b, FAST[b], 20, 11) for b in backends]
    if "tensorflow" in backends and not quick:
        pieces.append(("convnet", "tensorflow", "fused-graph", 10, 7))
    found["cost"] = [
        ask(
            f"its cost, {workload} in {gear} on {backend}",
            "cost",
            backend,
            workload=workload,
            gear=gear,
            epochs=8 if quick else epochs,
            rounds=rounds or (3 if quick else usual),
        )
        for workload, backend, gear, epochs, usual in pieces
    ]
    found["rewind"] = [
        ask(
            f"rewind, in {gear} on {backend}",
            "rewind",
            backend,
            gear=gear,
            count=10 if quick else 40,
        )
        for backend in backends
        for gear in ("auto", FAST[backend], PLAIN[backend])
    ]
    with tempfile.TemporaryDirectory() as folder:
        steps = 10**6 if quick else 10**7
        found["journal"] = ask(
            f"a journal of {steps:,} steps",
            "write_journal",
            backends[0],
            path=folder,
            steps=steps,
        )
        # The first one fills the caches, of matplotlib's fonts too.
        found["journal"]["reads"] = [
            ask(
                "open, sum up, draw a curve",
                "read_journal",
                backends[0],
                path=folder,
                steps=steps,
            )
            for _ in range(1 + (rounds or 5))
        ][1:]
    found["memory"] = [
        ask(
            f"memory and handles, {'' if recorded else 'not '}recorded",
            "memory",
            backends[0],
            steps=10**5 if quick else 10**6,
            recorded=recorded,
        )
        for recorded in (True, False)
    ]
    found["checkpoint"] = [
        ask(
            f"a checkpoint of a large model on {backend}",
            "checkpoint",
            backend,
            gear=PLAIN[backend],
            rounds=rounds or (3 if quick else 7),
        )
        for backend in backends
    ]
    return found


def disk_of(path: str) -> str:
    """The kind of file system that a folder lies on."""
    best, kind = "", "unknown"
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, name, *_ = line.split()
            inside = Path(path).resolve().is_relative_to(place)
            if inside and len(place) >= len(best):
                best, kind = place, name
    except OSError:
        pass
    return kind


class Watch:
    """What the recorder does, by the thread that does it.

    Attributes:
        held: (event, whether a checkpoint was asked for, seconds, when it ended) of
            each time that the thread that trains was in the recorder.
        saves: (bytes, seconds, seconds of writing the two files) of each checkpoint.
        writer_cpu_s: What the writing thread computed.
        asked: Checkpoints that were asked for.
    """

    def __init__(self) -> None:
        self.held: list[tuple[str, bool, float, float]] = []
        self.saves: list[tuple[int, float, float]] = []
        self.writer_cpu_s = 0.0
        self.asked = 0

    @property
    def idle(self) -> bool:
        return len(self.saves) == self.asked

    @contextmanager
    def on(self) -> Iterator[Watch]:
        from loopscope.run import checkpoint
        from loopscope.run.recorder import Recorder
        from loopscope.run.writer import Writer

        files: list[tuple[int, float]] = []

        def hearing(real: Callable[..., None]) -> Callable[..., None]:
            def hear(recorder: Any, event: Any) -> None:
                before, began = self.asked, time.perf_counter()
                real(recorder, event)
                now = time.perf_counter()
                kind, saved = type(event).__name__, self.asked > before
                self.held.append((kind, saved, now - began, now))

            return hear

        def asking(real: Callable[..., None]) -> Callable[..., None]:
            def save(writer: Any, *arguments: Any, **named: Any) -> None:
                self.asked += 1
                real(writer, *arguments, **named)

            return save

        def saving(real: Callable[..., bool]) -> Callable[..., bool]:
            def save(writer: Any, *arguments: Any) -> bool:
                began = time.perf_counter()
                there = real(writer, *arguments)
                seconds = time.perf_counter() - began
                self.saves.append((files[-1][0], seconds, files[-1][1]))
                return there

            return save

        def writing(real: Callable[..., Any]) -> Callable[..., Any]:
            def write(*arguments: Any) -> Any:
                began = time.perf_counter()
                written = real(*arguments)
                _, size = written
                files.append((size, time.perf_counter() - began))
                return written

            return write

        def running(real: Callable[..., None]) -> Callable[..., None]:
            def run(writer: Any) -> None:
                real(writer)
                self.writer_cpu_s += time.thread_time()

            return run

        changes = (
            (Recorder, "_hear_first", hearing),
            (Recorder, "_hear_last", hearing),
            (Writer, "save", asking),
            (Writer, "_save", saving),
            (Writer, "_run", running),
            (checkpoint, "write", writing),
        )
        real = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        for owner, name, around in changes:
            setattr(owner, name, around(getattr(owner, name)))
        try:
            yield self
        finally:
            for owner, name, function in real:
                setattr(owner, name, function)


# What it costs.

KINDS = ("unrecorded", "journal", "defaults", "unrecorded again")


def cost(*, workload: str, gear: str, epochs: int, rounds: int) -> dict[str, Any]:
    """One loop trains the same again and again: recorded, and not.

    A piece is a call of `fit` from the initial weights. `unrecorded` is there twice:
    how the two differ is what the machine makes of nothing. `journal` makes no
    checkpoints but the first and the one at the end: those at the ends of epochs,
    which no option leaves out, are left out by the share of the time they may take.
    """
    from loopscope import Recording
    from loopscope.events import EpochEnd
    from loopscope.run import recorder
    from ours import loop_of
    from workloads import WORKLOADS, Training

    of = WORKLOADS[workload]
    training = Training(of)
    loop = loop_of(training, gear)
    x, y = of.data
    share = recorder.COST
    ends: list[tuple[float, float]] = []

    def hear(event: Any) -> None:
        if isinstance(event, EpochEnd):
            ends.append((time.perf_counter(), time.process_time()))

    loop.subscribe(hear)

    def piece(kind: str, epochs: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            run: Any = None
            if kind == "journal":
                run = Recording(path, replay_steps=10**9, every_s=1e9)
            elif kind == "defaults":
                run = path
            recorder.COST = 1e-12 if kind == "journal" else share
            training.restore()
            ends.clear()
            gc.collect()
            cpu_s, began = time.process_time(), time.perf_counter()
            loop.fit(x, y, batch_size=of.batch_size, epochs=epochs, verbose=0, run=run)
            seconds = time.perf_counter() - began
            cpu_s = time.process_time() - cpu_s
            state = loop.state.sha256()
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        steady = [b - a for a, b in zip(ends[SETTLED - 1], ends[-1], strict=True)]
        return {
            "whole_s": seconds,
            "whole_cpu_s": cpu_s,
            "steady_s": steady[0],
            "steady_cpu_s": steady[1],
            "state": state,
            "size_bytes": size,
        }

    for kind in KINDS:
        piece(kind, SETTLED + 1)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        # Nobody always follows the same neighbour, nor always comes first.
        turn = number // 2 % len(KINDS)
        order = [*KINDS[turn:], *KINDS[:turn]]
        for kind in order if number % 2 == 0 else reversed(order):
            found[kind].append(piece(kind, epochs))
    states = {p["state"] for pieces in found.values() for p in pieces}
    where = {}
    for kind in ("journal", "defaults"):
        with Watch().on() as watch:
            took = piece(kind, epochs)
        inside = [h for h in watch.held if ends[SETTLED - 1][0] < h[3] <= ends[-1][0]]
        where[kind] = {
            "whole_s": took["whole_s"],
            "held_ms": 1e3 * sum(seconds for *_, seconds, _ in watch.held),
            "epoch_ms": {
                name: 1e3
                * sum(h[2] for h in inside if h[0] == name)
                / len(ends[SETTLED:])
                for name in dict.fromkeys(h[0] for h in inside)
            },
            "writer_cpu_ms": 1e3 * watch.writer_cpu_s,
            "saves": len(watch.saves),
            "save_ms": 1e3
            * statistics.median(seconds for _, seconds, _ in watch.saves),
        }
    loop.unsubscribe(hear)
    return {
        "steps": of.steps,
        "settled": SETTLED,
        "pieces": found,
        "same_state": len(states) == 1,
        "where": where,
    }


# What can be had from a run.


def rewind(*, gear: str, count: int) -> dict[str, Any]:
    """Some steps of a five-epoch MNIST run, each run again."""
    import numpy as np

    import loopscope
    from ours import loop_of
    from workloads import WORKLOADS, Training, mnist_validation

    of = WORKLOADS["mlp"]
    loop = loop_of(Training(of), gear)
    x, y = of.data
    arguments = {"x": x, "y": y, "batch_size": of.batch_size, "epochs": 5}
    arguments |= {"validation_data": mnist_validation(), "verbose": 0}
    with tempfile.TemporaryDirectory() as folder:
        loop.fit(**arguments, run=folder)
        experiment = loopscope.Experiment(loop, **arguments)
        run = loopscope.open_run(folder, experiment=experiment)
        steps = run.summary.steps
        began = time.perf_counter()
        run.rewind(0)
        first_s = time.perf_counter() - began
        seconds, replayed, identical = [], [], 0
        for step in np.random.default_rng(0).integers(0, steps, count):
            began = time.perf_counter()
            rewound = run.rewind(int(step))
            seconds.append(time.perf_counter() - began)
            replayed.append(rewound.replayed_steps)
            identical += rewound.identical
        run.close()
    return {
        "chosen": loop.gear.name,
        "steps": steps,
        "first_s": first_s,
        "seconds": seconds,
        "replayed": replayed,
        "identical": identical,
    }


def write_journal(*, path: str, steps: int) -> dict[str, Any]:
    """A journal of so many steps: a row and a transaction every `ROW_STEPS`."""
    import numpy as np

    from loopscope.run.folder import Folder
    from loopscope.run.journal import JournalWriter

    folder = Folder(Path(path))
    folder.make()
    folder.write_manifest(
        {
            "id": "0" * 32,
            "created": "2026-01-01T00:00:00Z",
            "origin": {},
            "script": ["long.py"],
            "first_step": 0,
            "identity": {"backend": "none", "gear": "fused-xla"},
        }
    )
    random = np.random.default_rng(0)
    began = time.perf_counter()
    journal = JournalWriter(folder.journal_path)
    for first in range(0, steps, ROW_STEPS):
        loss = 1 / (1 + 1e-3 * np.arange(first, first + ROW_STEPS))
        loss = (loss * random.uniform(0.5, 1.5, ROW_STEPS)).astype("<f4")
        row = (first, "loss", ROW_STEPS, "<f4", loss.tobytes(), time.time())
        with journal.transaction():
            journal.put("steps", [row])
    journal.close()
    return {
        "written_s": time.perf_counter() - began,
        "size_bytes": folder.journal_path.stat().st_size,
    }


def read_journal(*, path: str, steps: int) -> dict[str, Any]:
    """Seconds of each thing that is done with it, in a fresh process."""
    began = time.perf_counter()
    from loopscope.run import reading
    from loopscope.run.folder import Folder

    imports_s = time.perf_counter() - began
    began = time.perf_counter()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot_imports_s = time.perf_counter() - began
    marks = [time.perf_counter()]
    folder = Folder(Path(path))
    summary = reading.summary(folder)
    marks.append(time.perf_counter())
    loss = reading.steps(folder)["loss"]
    mean = float(loss.mean(dtype="f8"))
    marks.append(time.perf_counter())
    step, middle, low, high = reading.curve(folder, "loss", 1000)
    marks.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as pictures:
        figure, panel = pyplot.subplots()
        panel.fill_between(step, low, high, alpha=0.3)
        panel.plot(step, middle)
        panel.set(xlabel="step", ylabel="loss", yscale="log")
        figure.savefig(Path(pictures) / "loss.png")
    marks.append(time.perf_counter())
    assert summary.steps == len(loss) == steps
    assert 0 < mean < 1
    names = ("summary_s", "mean_s", "curve_s", "plot_s")
    parts = [b - a for a, b in pairwise(marks)]
    return {
        **dict(zip(names, parts, strict=True)),
        "all_s": marks[-1] - marks[0],
        "imports_s": imports_s,
        "plot_imports_s": plot_imports_s,
    }


# What it takes of the process and the disk.


def memory(*, steps: int, recorded: bool) -> dict[str, Any]:
    """Memory and handles at each tenth of a long recorded training."""
    import keras
    import numpy as np

    from long_run import memory_mib
    from loopscope import Loop
    from loopscope.events import EpochEnd

    batch, tenths = 8, 10
    random = np.random.default_rng(0)
    x = random.standard_normal((steps // tenths * batch, 4)).astype("float32")
    y = x.sum(1, keepdims=True)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    gear = FAST[keras.config.backend()]
    loop = Loop(model, "sgd", "mse", gear=gear, seed=0, cache=False)
    table: list[dict[str, Any]] = []

    def hear(event: Any) -> None:
        if isinstance(event, EpochEnd):
            table.append(
                {
                    "step": loop.step,
                    "seconds": time.perf_counter() - began,
                    "VmRSS": memory_mib("VmRSS"),
                    "RssAnon": memory_mib("RssAnon"),
                    "handles": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                }
            )

    loop.subscribe(hear)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = Path(folder) / "run" if recorded else None
        loop.fit(x, y, batch_size=batch, epochs=tenths, verbose=0, run=run)
        seconds = time.perf_counter() - began
        files = [f for f in Path(folder).rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files)
        journal = Path(folder) / "run" / "journal.sqlite"
        journal_bytes = journal.stat().st_size if recorded else 0
    return {
        "gear": gear,
        "table": table,
        "seconds": seconds,
        "files": len(files),
        "size_bytes": size,
        "journal_bytes": journal_bytes,
    }


def checkpoint(*, gear: str, rounds: int) -> dict[str, Any]:
    """Checkpoints of a model of 25 million parameters with Adam.

    One is asked for at the first step of an epoch. The steps after it run while it is
    written; then it is waited for, and as many run in peace. In each round a plain
    new file of as many bytes is written too.
    """
    import hashlib

    import keras
    import numpy as np

    from loopscope import Loop, Recording

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((1000,)),
            keras.layers.Dense(4000, activation="relu"),
            keras.layers.Dense(4000, activation="relu"),
            keras.layers.Dense(1000, activation="relu"),
            keras.layers.Dense(1000),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loop = Loop(model, "adam", loss, gear=gear, seed=0, cache=False)
    random = np.random.default_rng(0)
    batch, half = 32, 4
    steps = 2 * half + 1
    x = random.standard_normal((steps * batch, 1000)).astype("float32")
    y = random.integers(0, 1000, steps * batch)
    during: list[float] = []
    idle: list[float] = []
    plain: list[float] = []
    hashing: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Watch().on() as watch:
        path = Path(folder) / "run"
        how = Recording(path, replay_steps=10**9, every_s=1e9)
        source = loop.source(x, y, batch_size=batch)
        first = 0
        for epoch in loop.epochs(1 + rounds, run=how):
            while not watch.idle:
                time.sleep(0.001)
            if epoch.index == 1:  # Everything is compiled, the first file is there.
                watch.held.clear()
                first = watch.asked
            loop.save()
            began, writing = time.perf_counter(), False
            for step in epoch.train(source, every=1):
                seconds = time.perf_counter() - began
                if epoch.index > 0:
                    if writing and not watch.idle:
                        during.append(seconds)
                    elif not writing and step.index > half:
                        idle.append(seconds)
                writing = step.index < half
                while not writing and not watch.idle:
                    time.sleep(0.001)
                writing = writing and not watch.idle
                began = time.perf_counter()
            while not watch.idle:
                time.sleep(0.001)
            if epoch.index > 0:
                size = watch.saves[-1][0]
                data = random.bytes(size)
                began = time.perf_counter()
                # A new one: to write over an old one takes a fraction of the time.
                beside = Path(folder) / f"plain-{epoch.index}"
                with beside.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                plain.append(time.perf_counter() - began)
                beside.unlink()
                began = time.perf_counter()
                hashlib.sha256(data).hexdigest()
                hashing.append(time.perf_counter() - began)
        saves = watch.saves[first:]
        # At the end of training the last one is waited for.
        heard = [h for h in watch.held if h[0] != "TrainEnd"]
        held = [s for _, asked, s, _ in heard if asked]
        rest = [s for _, asked, s, _ in heard if not asked]
    return {
        "parameters": model.count_params(),
        "size_bytes": saves[-1][0],
        "seconds": [seconds for _, seconds, _ in saves],
        "files_s": [seconds for *_, seconds in saves],
        "held_ms": [1e3 * s for s in held],
        "other_held_ms": 1e3 * max(rest),
        "during_ms": [1e3 * s for s in during],
        "idle_ms": [1e3 * s for s in idle],
        "plain_s": plain,
        "sha256_s": hashing,
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    part.__name__: part
    for part in (cost, rewind, write_journal, read_journal, memory, checkpoint)
}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes to standard error.
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))), file=answers)
    answers.close()
