"""The crash test: kill a training at any instant, go on, and compare its end.

    python tests/crash/run.py --kills 200 --backend both

child.py trains. It is killed several times over, each time in another way, and
started again on the same folder, until it comes to its end. That must be, bit for
bit, what the same training comes to when nobody disturbs it: its state, its history,
its CSV log and its journal. Two trainings run at a time.
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from child import CASES
from training import ENDS, KINDS, Training, drawn

from loopscope.errors import LoopscopeError
from loopscope.run import checkpoint, files, reading

WEIGHTS = {"early": 2, "random": 6, "SIGTERM": 2, "SIGINT": 2}
"""How often a kind is in the deck; once, where nothing is said."""

WHEN_RESUMED = {"cut-before", "cut-after", "checkpoints-cut", "log-shortened"}
AT_THE_END = {"close-before", "close-after"}


def differences(now, before):
    """Where a training's end is not that of another one."""
    mine, other = _journal(now.run), _journal(before.run)
    apart = [n for n in ENDS if now.result[n] != before.result[n]]
    apart += [f"{n} of the journal" for n in mine if mine[n] != other[n]]
    return [f"not the same: {', '.join(apart)}"] if apart else []


def _journal(run):
    """What a journal says that is the same however often a run was ended."""
    steps = reading.steps(run)
    epochs = [
        {name: value for name, value in epoch.items() if name != "seconds"}
        for epoch in reading.epochs(run)
    ]
    with reading.journal(run) as journal:
        writes = journal.rows("writes")
    return {
        "steps": {n: (a.dtype.str, a.tobytes()) for n, a in steps.items()},
        "epochs": epochs,
        # In how many turns depends on when a checkpoint was made between them.
        "writes": {(step, path): rest for step, _, path, *rest in writes},
    }


def disorder(run):
    """What is in a finished run's folder that should not be, or should and is not."""
    folder = run.checkpoints_path
    found, wrong = checkpoint.entries(folder)
    for entry in found:
        try:
            checkpoint.check(folder, entry.name)
        except LoopscopeError as error:
            wrong.append(str(error))
    whole = {f"{e.name}{suffix}" for e in found for suffix in (".json", ".safetensors")}
    left = {path.name for path in folder.iterdir()} - whole
    left |= {path.name for path in run.path.glob(f"*{files.TEMPORARY}")}
    wrong += [f"{name} is left over" for name in sorted(left)]
    best = min(reading.epochs(run), key=lambda epoch: epoch["val_loss"])
    end = best["first_step"] + best["steps"]
    # A signal may have had it made between the epoch's last step and its validation.
    ends = [(best["epoch"] + 1, 0), (best["epoch"], best["steps"])]
    cursors = [e.content["cursor"] for e in found if e.step == end]
    if not any((c["epoch"], c["index"]) in ends for c in cursors):
        wrong.append(f"the best checkpoint, at step {end}, is gone")
    return wrong


class CrashTest:
    """So many kills, over as many trainings as they need.

    Args:
        place: A folder.
        cases: Names in `CASES`.
        kinds: Names in `KINDS`.
        kills: How many.
        seed: Of what is killed how and when.
        brief: Whether to leave out to start what is over once more.
    """

    def __init__(self, place, cases, kinds, kills, seed, *, brief):
        self._place, self._cases, self._kinds = place, cases, kinds
        self._left, self._seed, self._brief = kills, seed, brief
        self._most = 2 * kills  # Trainings: kills that always miss come to an end.
        self._deck = []
        self._shuffle = random.Random(seed)
        self._lock = threading.Lock()
        self.references = {}
        self.trainings = []

    def through(self, jobs):
        with ThreadPoolExecutor(jobs) as pool:
            self.references = {c: pool.submit(self._reference, c) for c in self._cases}
            workers = [pool.submit(self._work) for _ in range(jobs)]
            for future in [*self.references.values(), *workers]:
                future.result()

    def _reference(self, case):
        """The training that nobody disturbs; a finished one is as it was."""
        training = Training(case, self._place / case)
        training.through()
        if training.result and not self._brief:
            again = training.again()
            training.problems += [f"started once more, {line}" for line in again]
        if training.result:
            training.problems += disorder(training.run)
        _say(training, "undisturbed")
        return training

    def _work(self):
        while (training := self._next()) is not None:
            training.through()
            reference = self.references[training.case].result()
            try:
                if training.result and reference.result:
                    training.problems += differences(training, reference)
                    training.problems += disorder(training.run)
            except LoopscopeError as error:
                training.problems.append(str(error))
            with self._lock:
                self._left += len(training.missed)
                self._deck = [k.kind for k in training.missed] + self._deck
            _say(training, "the same end")

    def _next(self):
        with self._lock:
            number = len(self.trainings)
            if not self._left or number == self._most:
                return None
            draw = random.Random(f"{self._seed}/{number}")
            kinds = [self._card() for _ in range(min(draw.randint(4, 8), self._left))]
            self._left -= len(kinds)
            # A few need a training that goes on, or one that comes to its end.
            first = [k for k in kinds if k not in WHEN_RESUMED | AT_THE_END]
            middle = [k for k in kinds if k in WHEN_RESUMED]
            last = [k for k in kinds if k in AT_THE_END]
            rest = first[1:] + middle
            draw.shuffle(rest)
            case = self._cases[number % len(self._cases)]
            training = Training(
                case,
                self._place / f"{case}-{number}",
                [drawn(kind, draw) for kind in (*first[:1], *rest, *last)],
            )
            self.trainings.append(training)
            return training

    def _card(self):
        if not self._deck:
            self._deck = [k for k in self._kinds for _ in range(WEIGHTS.get(k, 1))]
            self._shuffle.shuffle(self._deck)
        return self._deck.pop()


def _say(training, good):
    kills = "".join(f"{kill} " for kill in training.killed)
    end = "; ".join(training.problems) or good
    print(f"{training.path.name:<14} {kills}-> {end}", flush=True)


def table(trainings, cases):
    """Kills by kind and case; how many came too late for a training."""
    killed = Counter((k.kind, t.case) for t in trainings for k in t.killed)
    missed = Counter(k.kind for t in trainings for k in t.missed)
    kinds = [k for k in KINDS if missed[k] or any(killed[k, c] for c in cases)]
    rows = [["", *cases, "too late"]]
    for kind in kinds:
        rows.append([kind, *(str(killed[kind, c]) for c in cases), str(missed[kind])])
    sums = [sum(killed[kind, case] for kind in kinds) for case in cases]
    rows.append(["all", *map(str, sums), str(missed.total())])
    widths = [len(cell) + 2 for cell in rows[0][1:]]
    return "\n".join(
        f"{name:<16}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        for name, *cells in rows
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many; 200")
    parser.add_argument("--seed", type=int, default=0, help="of how and when; 0")
    parser.add_argument(
        "--backend", choices=("tensorflow", "jax", "both"), default="both"
    )
    parser.add_argument("--case", choices=CASES, nargs="+", help="only these")
    parser.add_argument("--kind", choices=KINDS, nargs="+", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; 2")
    parser.add_argument(
        "--keep", action="store_true", help="leave the folders of what failed"
    )
    parser.add_argument(
        "--brief", action="store_true", help="start no finished training once more"
    )
    options = parser.parse_args()
    cases = [
        name
        for name, case in CASES.items()
        if options.backend in (case.backend, "both")
        and (options.case is None or name in options.case)
    ]
    place = Path(tempfile.mkdtemp(prefix="loopscope-crash-"))
    test = CrashTest(
        place,
        cases,
        options.kind or KINDS,
        options.kills,
        options.seed,
        brief=options.brief,
    )
    began, failed = time.monotonic(), []
    try:
        test.through(options.jobs)
        done = [future.result() for future in test.references.values()]
        failed = [t for t in (*done, *test.trainings) if t.problems]
    finally:
        kept = [t.path for t in failed] if options.keep else []
        for path in place.iterdir():
            if path not in kept:
                shutil.rmtree(path)
        if not kept:
            place.rmdir()
    print(f"\n{table(test.trainings, cases)}\n")
    kills = sum(len(t.killed) for t in test.trainings)
    same = sum(not t.problems for t in test.trainings)
    print(
        f"{kills} kills in {time.monotonic() - began:.0f} s; of "
        f"{len(test.trainings)} trainings, {same} came to the same end"
    )
    for training in failed:
        where = f" ({training.path})" if options.keep else ""
        print(f"FAILED {training.path.name}{where}: " + "; ".join(training.problems))
    return 1 if failed or kills < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
