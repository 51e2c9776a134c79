"""Writes docs/doctor-results.md: what the doctor finds of what was planted.

    python tests/doctor/results.py examine > build/doctor-tensorflow.json
    python tests/doctor/results.py page build/doctor-*.json > docs/doctor-results.md

`make doctor-results` does both, on every backend.
"""

import contextlib
import json
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def examine():
    """Every planted bug and every healthy loop, on this backend, as JSON."""
    import keras
    from planted import BUGS, FAMILIES
    from test_healthy import SMALL
    from test_planted import examined

    warnings.simplefilter("ignore")
    policy = keras.config.dtype_policy()
    seconds, planted, healthy = defaultdict(list), [], []

    def clean():
        keras.utils.clear_session(free_memory=False)
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)

    for name, (check, _) in BUGS.items():
        for family in FAMILIES:
            clean()
            found = examined(name, family)
            planted.append(
                {
                    "bug": name,
                    "family": family.name,
                    "check": check,
                    "named": any(f.check == check for f in found.findings),
                    "also": sorted({f.check for f in found.findings} - {check}),
                    "failed": dict(found.failed),
                }
            )
            for made, took in found.seconds.items():
                seconds[made].append(took)
    for make in SMALL:
        clean()
        loop, data = make()
        found = loop.doctor(*data, **({} if len(data) == 1 else {"batch_size": 32}))
        healthy.append(
            {
                "loop": make.__name__,
                "findings": [str(f) for f in found.findings],
                "failed": dict(found.failed),
            }
        )
        for made, took in found.seconds.items():
            seconds[made].append(took)
    return json.dumps(
        {
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "planted": planted,
            "healthy": healthy,
            "seconds": {name: median(took) for name, took in seconds.items()},
        }
    )


def page(paths):
    """The page, from what was found on each backend."""
    found = [json.loads(Path(path).read_text("utf-8")) for path in paths]
    print("# What the doctor finds\n")
    print(
        "Written by `make doctor-results`. Each bug is planted in a dense, a "
        "convolutional and a recurrent\nmodel; the healthy loops are those of "
        "`tests/doctor/test_healthy.py`. *Named* is: the check that the bug\nbelongs "
        "to has reported it. Others may see a consequence of it, and say so too.\n"
    )
    print("| backend | planted | named | healthy loops | false findings |")
    print("|---|---|---|---|---|")
    for one in found:
        named = sum(p["named"] for p in one["planted"])
        false = sum(len(h["findings"]) for h in one["healthy"])
        who, many = f"{one['backend']}, Keras {one['keras']}", len(one["planted"])
        print(f"| {who} | {many} | {named} | {len(one['healthy'])} | {false} |")
    print("\n## Planted\n")
    backends = [one["backend"] for one in found]
    print(f"| check | bug | {' | '.join(backends)} | others that see it |")
    print(f"|---|---|{'---|' * len(backends)}---|")
    bugs = list(dict.fromkeys((p["check"], p["bug"]) for p in found[0]["planted"]))
    for check, bug in bugs:
        cells, also = [], Counter()
        for one in found:
            rows = [p for p in one["planted"] if p["bug"] == bug]
            cells.append(f"{sum(r['named'] for r in rows)} of {len(rows)}")
            also.update(name for r in rows for name in r["also"])
        words = bug.replace("_", " ")
        print(
            f"| {check} | {words} | {' | '.join(cells)} | {', '.join(sorted(also))} |"
        )
    print("\n## Healthy\n")
    for one in found:
        names = ", ".join(h["loop"].replace("_", " ") for h in one["healthy"])
        print(f"- {one['backend']}: {names}.")
        for h in one["healthy"]:
            for finding in h["findings"]:
                print(f"  - **{h['loop']}**: {finding}")
    print("\n## Seconds of each check\n")
    print(
        "Medians over all of these loops. The first check takes the time of the "
        "measurements that all share.\n"
    )
    print(f"| check | {' | '.join(backends)} |")
    print(f"|---|{'---|' * len(backends)}")
    for name in found[0]["seconds"]:
        cells = [f"{one['seconds'].get(name, 0):.4f}" for one in found]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1] == "examine":
        with contextlib.redirect_stdout(sys.stderr):  # Steps that print are among them.
            found = examine()
        print(found)
    else:
        page(sys.argv[2:])
