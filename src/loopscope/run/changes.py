"""What has changed since a run was recorded, and refusing what can change bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loopscope.data.arrays import ArraySource
from loopscope.errors import RunError
from loopscope.run import about, identity, memory
from loopscope.run.identity import Difference

if TYPE_CHECKING:
    from loopscope.data.source import Source
    from loopscope.loop import Loop


def since(
    manifest: Mapping[str, Any],
    loop: Loop,
    source: Source | None,
    *,
    data: str | None,
    gear: str | None,
    callbacks: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Every difference that can change bits, the likeliest to first.

    Args:
        manifest: Of the run.
        loop: In this process.
        source: Its training data.
        data: Their fingerprint, as the run's journal has it.
        gear: The gear that the run used.
        callbacks: Those of now; `None` where they have no part in what comes.
        arguments: Of `fit`; `None` where they have no part in what comes.
    """
    was = {
        "workers": 1,
        **manifest["identity"],
        "gear": gear,
        "source": _kind(manifest["source"]),
    }
    now = {
        **about.of(loop),
        "gear": loop.gear.name if loop.gear is not None else gear,
        "source": _kind(about.described(source)),
    }
    if source is None or manifest["source"] is None:
        was.pop("source")
        now.pop("source")
    if arguments is not None and manifest["callbacks"] is not None:
        was["arguments"] = _of_data(manifest["arguments"])
        now["arguments"] = _of_data(about.readable(arguments))
    if data is not None and isinstance(source, ArraySource):
        was["data"], now["data"] = data, identity.data_fingerprint(source.arrays)
    if callbacks is not None and manifest["callbacks"] is not None:
        was["callbacks"] = manifest["callbacks"]
        now["callbacks"] = [memory.kind_of(c) for c in callbacks]
    return identity.differences(was, now)


WITH_WORKERS = (
    "workers",
    "device",
    "threads",
    "flags/keras.distribution",
    *(f"flags/{name}" for name in identity.THREADS),
)
"""What another number of workers brings along, by how paths begin."""


def refuse(differences: Sequence[Difference], path: Any) -> None:
    """Refuse to go on with these differences.

    Another number of workers is only noted, and with it what comes along.

    Raises:
        RunError: Naming each; there are some.
    """
    number = [d for d in differences if d.path == "workers"]
    if number:
        differences = [d for d in differences if not _with_workers(d)]
    if differences:
        lines = "".join(f"\n  {d}" for d in differences)
        raise RunError(
            f"The run {str(path)!r} was recorded under other conditions, which can "
            f"change bits:{lines}\nNothing was changed. Go back to them, or go on all "
            "the same: `loopscope resume --anyway`, `fit(..., resume='anyway')`."
        )
    for difference in number:
        was, now = difference.was, difference.now
        warnings.warn(
            f"{path}: was trained by {was} worker{'s' * (was > 1)}, goes on with "
            f"{now}. The batches are the same; sums are made in another order, so that "
            "numbers agree up to rounding and not to the bit.",
            stacklevel=7,
        )


def _with_workers(difference: Difference) -> bool:
    if difference.path == "device":
        # "2 x cpu" is as many of what "cpu" is.
        kinds = {str(d).rpartition(" x ")[2] for d in (difference.was, difference.now)}
        return len(kinds) == 1
    return difference.path.startswith(WITH_WORKERS)


def _of_data(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `fit` that say which batches there are, and when."""
    return {k: v for k, v in arguments.items() if k != "epochs"}


def _kind(described: Mapping[str, Any] | None) -> Any:
    return {k: described[k] for k in ("kind", "specs")} if described else None
