"""`make bench`: everyone side by side, round after round, in one go.

Each backend has a worker process, and they take turns: in a round every peer of
every backend trains one epoch, while all others idle, so that a slow spell of the
machine meets all of them. What is reported are medians, their spread, and ratios
taken within a round. Nothing is timed before everyone has compiled, and everyone
must have trained to the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from workloads import WORKLOADS

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax")
ONE_THREAD = "one thread"
"""Stands in a row's `backend` for the floor, which belongs to none."""

PATIENCE_S = 60.0
"""How long a program that may be hopeless can take for its first step, or epoch."""

TOO_SLOW = 3.0
"""What is so many times slower than the best is measured once, not in rounds."""

# Compiling or running these can take minutes on a CPU (convolutions and random
# numbers inside of a loop under XLA). Each gets a process of its own, which is ended
# when it takes too long; what was measured until then is reported.
RISKY = {
    ("tensorflow", "loopscope fused-xla"): (
        "convnet",
        "batchnorm",
        "dropout",
        "transformer",
    ),
    ("jax", "loopscope fused-xla"): ("convnet", "batchnorm", "transformer"),
    ("jax", "lax.scan by hand"): ("convnet", "batchnorm", "transformer"),
}

Row = dict[str, Any]
Say = Callable[[str], None]
Who = Callable[[str, str], list[tuple[str, str]]]
"""Of a backend and a workload: (module, peer) of everyone who is to train."""


class Worker:
    """A process that has one backend loaded and trains when told to.

    Args:
        backend: Keras's backend in it.
        one_thread: One core and one BLAS thread, for the floor.
    """

    def __init__(self, backend: str, *, one_thread: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "TMPDIR": self._folder.name,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "LOOPSCOPE_CACHE": "0",
        }
        if one_thread:
            environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            environment |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=HERE,
        )
        if one_thread and hasattr(os, "sched_setaffinity"):
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(self._process.pid, {max(cores)})

    def ask(
        self, do: str, *, patience_s: float | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Send a command, wait for its answer; end the process if it is late."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"the worker has ended: {self._last_words()}"}
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(patience_s):
                self.close()
                return {"error": f"no answer within {patience_s:.0f} s", "late": do}
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"the worker has ended: {self._last_words()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().splitlines()[-2:])[-300:]

    def close(self) -> None:
        """End the process; what it has written to temporary files goes with it."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def peers_of(
    backend: str, workload: str, *, quick: bool = False
) -> list[tuple[str, str]]:
    """(module, peer) of everyone who trains a workload on a backend."""
    if backend == ONE_THREAD:
        floors = ("floor, NumPy", "floor, XLA") if workload == "mlp" else ()
        return [("floor", peer) for peer in floors]
    gears = ["auto", "graph", "fused-graph", "xla", "fused-xla", "eager"]
    by_hand = ["eager loop", "tf.function loop", "tf.function loop, XLA, prefetch"]
    fits = ["keras.fit", "keras.fit, best setting"]
    if backend == "tensorflow":
        theirs = [*by_hand, *fits, "whole epoch by hand"]
    else:
        gears = ["auto", "xla", "fused-xla"]
        theirs = [*fits, "jit by hand", "lax.scan by hand"]
    around: list[str] = []
    if workload == "mlp":
        around = ["bare fused loop", "bare fused loop and validation"]
        around += ["loopscope fit with validation"]
        around += ["loopscope fit with validation, 1,000 a batch"]
        if backend == "tensorflow":
            theirs.append("whole epoch by hand, TensorFlow operations only")
    if quick:
        gears = [g for g in gears if g not in ("eager", "graph")]
        theirs.remove("keras.fit")
        around = around if backend == "tensorflow" else []
    return [
        *((f"peers_{backend}", peer) for peer in theirs),
        *(("ours", f"loopscope {gear}") for gear in gears),
        *(("ours", peer) for peer in around),
    ]


def fits_with_callbacks(backend: str, workload: str) -> list[tuple[str, str]]:
    """(module, peer) of everyone who is compared with the usual callbacks."""
    peers = ["keras.fit", "keras.fit, no autotuning", "loopscope.fit"]
    if backend != "tensorflow":
        peers.remove("keras.fit, no autotuning")
    return [] if backend == ONE_THREAD else [("callbacks", peer) for peer in peers]


@contextmanager
def workers_for(
    workload: str, backends: list[str], who: Who
) -> Iterator[list[tuple[Worker, Row]]]:
    """Everyone who is to train, each with the process that it trains in.

    New processes for each workload: what one has compiled is no weight on the next.
    """
    started: list[Worker] = []
    made: list[tuple[Worker, Row]] = []

    def start(backend: str) -> Worker:
        alone = backend == ONE_THREAD
        started.append(Worker("jax" if alone else backend, one_thread=alone))
        return started[-1]

    def add(worker: Worker, backend: str, module: str, peer: str) -> None:
        row = {"workload": workload, "backend": backend, "module": module}
        made.append((worker, {**row, "peer": peer, "ms": [], "cpu_ms": []}))

    try:
        for backend in (*backends, ONE_THREAD):
            peers = who(backend, workload)
            if not peers:
                continue
            worker = start(backend)
            for module, peer in peers:
                risky = workload in RISKY.get((backend, peer), ())
                own = start(backend) if risky else worker
                add(own, backend, module, peer)
        yield made
    finally:
        for worker in started:
            worker.close()


def prepare(worker: Worker, row: Row, best_ms: float) -> None:
    """Let a peer compile, and train from the start as a check and to warm up."""
    names = {"workload": row["workload"], "module": row["module"], "peer": row["peer"]}
    risky = row["workload"] in RISKY.get((row["backend"], row["peer"]), ())
    patience_s = PATIENCE_S if risky else None
    row |= worker.ask("make", patience_s=patience_s, **names)
    if "error" not in row:
        row |= worker.ask("check", patience_s=patience_s, peer=row["peer"])
    if row.get("late") == "check":
        # The second first step, of a program that was compiled by then.
        row["once_ms"] = 1e3 * row["again_s"]
    if "error" in row or row["peer"] == "eager loop":
        return
    check_ms = 1e3 * row["seconds"] / row["steps"]
    if risky and check_ms > TOO_SLOW * best_ms:
        row["once_ms"] = check_ms


def measure(
    workload: str, backends: list[str], rounds: int, who: Who, say: Say
) -> list[Row]:
    """Everyone's milliseconds per step on one workload."""
    with workers_for(workload, backends, who) as everyone:
        best_ms = float("inf")
        # The hopeless ones last: by then it is known what they lose against.
        for worker, row in sorted(
            everyone,
            key=lambda e: workload in RISKY.get((e[1]["backend"], e[1]["peer"]), ()),
        ):
            say(f"{workload}: {row['backend']}: {row['peer']}: compiles and trains")
            prepare(worker, row, best_ms)
            if "error" in row:
                say(f"{workload}: {row['backend']}: {row['peer']}: {row['error']}")
            else:
                best_ms = min(best_ms, 1e3 * row["seconds"] / row["steps"])
        timed = [e for e in everyone if "error" not in e[1] and "once_ms" not in e[1]]
        for number in range(rounds):
            say(f"{workload}: round {number + 1} of {rounds}")
            # Forth and back: nobody always follows the same neighbour.
            for worker, row in timed if number % 2 == 0 else reversed(timed):
                answer = worker.ask("time", peer=row["peer"])
                if "error" in answer:
                    row["error"] = answer["error"]
                else:
                    row["ms"].append(1e3 * answer["seconds"] / row["steps"])
                    row["cpu_ms"].append(1e3 * answer["cpu_s"] / row["steps"])
                    row["last_loss"] = answer["loss"]
        rows = [row for _, row in everyone]
    for row in rows:
        if row["ms"] and "error" not in row:
            row["median"] = statistics.median(row["ms"])
    return rows


def versions_of(backends: list[str]) -> dict[str, Any]:
    """Versions of everything that is timed."""
    worker = Worker(backends[0])
    try:
        return worker.ask("versions")
    finally:
        worker.close()


def long_run(quick: bool, say: Say) -> dict[str, Any]:
    """What `long_run.py` measures, in a process of its own."""
    say("long run: cost per step, memory, data on disk")
    steps = ["100000"] if quick else []
    done = subprocess.run(
        [sys.executable, str(HERE / "long_run.py"), *steps],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def choosing(backends: list[str], rounds: int, say: Say) -> list[Row]:
    """What `choosing.py` measures, in a process for each backend."""
    rows: list[Row] = []
    for backend in backends:
        say(f"choosing: whole trainings in auto and in the plain gear on {backend}")
        done = subprocess.run(
            [sys.executable, str(HERE / "choosing.py"), str(rounds)],
            capture_output=True,
            text=True,
            check=False,
            cwd=HERE,
            env={**os.environ, "KERAS_BACKEND": backend},
        )
        if done.returncode:
            raise RuntimeError(f"choosing.py failed:\n{done.stderr[-2000:]}")
        rows += json.loads(done.stdout)
    return rows


def with_callbacks(chosen: argparse.Namespace, say: Say) -> list[Row]:
    """Everyone's milliseconds per step with the usual callbacks."""
    rows: list[Row] = []
    for workload in chosen.workloads:
        rounds, who = rounds_of(workload, chosen), fits_with_callbacks
        rows += measure(workload, chosen.backends, rounds, who, say)
    return rows


def page_alone(chosen: argparse.Namespace, say: Say) -> None:
    """Measure a section that has a page of its own; print the page, or write it."""
    import memory
    import pytorch
    import recording
    import report_recording
    import scaling
    import viewing
    import watching
    from report import machine

    began = time.perf_counter()
    name = chosen.only
    sections: dict[str, tuple[Callable[..., Any], Callable[..., str]]] = {
        "memory": (memory.measure, memory.page),
        "pytorch": (pytorch.measure, pytorch.page),
        "recording": (recording.measure, report_recording.page),
        "scaling": (scaling.measure, scaling.page),
        "viewing": (viewing.measure, viewing.page),
        "watching": (watching.measure, watching.page),
    }
    measure, page = sections[name]
    found: Any = measure(chosen.backends, chosen.rounds, chosen.quick, say)
    minutes = (time.perf_counter() - began) / 60
    command = f"benchmarks/run.py --only {name}"
    command += f" --rounds {chosen.rounds}" if chosen.rounds else ""
    command += " --quick" if chosen.quick else ""
    versions = versions_of(["torch"] if name == "pytorch" else chosen.backends)
    recorded = name in ("memory", "recording")
    on = f"; runs were recorded on {found['folder']}" if recorded else ""
    text = page(
        found,
        f"Machine: {machine()}{on}. "
        f"{', '.join(f'{k} {v}' for k, v in sorted(versions.items()))}. Written by "
        f"`{command}` in {minutes:.0f} minutes.",
    )
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / f"results-{name}.md").write_text(text)
        say(f"wrote {chosen.out / f'results-{name}.md'}")
    if chosen.json:
        print(json.dumps(found))
    elif chosen.out is None:
        print(text)


def rounds_of(workload: str, chosen: argparse.Namespace) -> int:
    """How many rounds a workload is measured in."""
    usual = 3 if chosen.quick else 11 if workload == "mlp" else 5
    return int(chosen.rounds or usual)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the tutorial's MLP and a short long run, 3 rounds; writes no files "
        "unless --out is given",
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument(
        "--rounds",
        type=int,
        help="default: 11 for the MLP, 5 for the rest, with --quick 3",
    )
    parser.add_argument(
        "--only",
        choices=(
            "callbacks",
            "memory",
            "pytorch",
            "recording",
            "scaling",
            "viewing",
            "watching",
        ),
        help="measure this section alone and print its tables; writes no files, but "
        "results-SECTION.md where --out is given (not for callbacks)",
    )
    parser.add_argument(
        "--no-callbacks", action="store_true", help="leave fit with callbacks out"
    )
    parser.add_argument("--no-long-run", action="store_true")
    parser.add_argument(
        "--no-recording", action="store_true", help="leave recorded runs out"
    )
    parser.add_argument(
        "--no-choosing", action="store_true", help="leave whole trainings in auto out"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep what an earlier run has measured on other workloads",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.md, results.png and results.json (default: here)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON document"
    )
    chosen = parser.parse_args()
    chosen.workloads = chosen.workloads or (["mlp"] if chosen.quick else [*WORKLOADS])
    if chosen.out is None and not (chosen.quick or chosen.only):
        chosen.out = HERE
    return chosen


def main() -> None:
    chosen = options()
    began = time.perf_counter()

    def say(text: str) -> None:
        elapsed = time.strftime("%M:%S", time.gmtime(time.perf_counter() - began))
        print(f"[{elapsed}] {text}", file=sys.stderr, flush=True)

    if chosen.only == "callbacks":
        from report import callbacks_alone

        rows = with_callbacks(chosen, say)
        print(json.dumps(rows) if chosen.json else callbacks_alone(rows))
        return
    if chosen.only is not None:
        page_alone(chosen, say)
        return
    file = chosen.out / "results.json" if chosen.out else None
    document: dict[str, Any] = {}
    if chosen.keep and file is not None and file.exists():
        document = json.loads(file.read_text())
    document["quick"] = chosen.quick
    document["versions"] = versions_of(chosen.backends)
    rows = document.setdefault("rows", [])
    for workload in chosen.workloads:
        rows[:] = [r for r in rows if r["workload"] != workload]
        rounds, who = rounds_of(workload, chosen), partial(peers_of, quick=chosen.quick)
        rows += measure(workload, chosen.backends, rounds, who, say)
    if not (chosen.no_callbacks or chosen.quick):
        kept = document.get("callbacks") or []
        kept = [r for r in kept if r["workload"] not in chosen.workloads]
        document["callbacks"] = kept + with_callbacks(chosen, say)
    if not chosen.no_long_run:
        document["long_run"] = long_run(chosen.quick, say)
    if not (chosen.no_choosing or chosen.quick):
        document["choosing"] = choosing(chosen.backends, 3, say)
    if not (chosen.no_recording or chosen.quick):
        import recording

        document["recording"] = recording.measure(
            chosen.backends, chosen.rounds, chosen.quick, say
        )
    from report import chart, machine, markdown

    document["machine"] = machine()
    document["wall_s"] = document.get("wall_s", 0.0) + time.perf_counter() - began
    text = markdown(document)
    if chosen.out is not None and file is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n")
        (chosen.out / "results.md").write_text(text)
        chart(document["rows"], chosen.out / "results.png")
        say(f"wrote {chosen.out / 'results.md'}, results.png, results.json")
    if chosen.json:
        print(json.dumps(document))
    elif chosen.quick:
        print(text)


if __name__ == "__main__":
    main()
