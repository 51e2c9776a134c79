"""What the bits of a run depend on, and what of it has changed.

Within one identity a run repeats bit for bit. Each entry is here because a change of it
has been seen to change bits, or can: versions, device, instruction set, threads, flags,
the model and what trains it, the code, the data.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.backend.base import Backend
from loopscope.cpu import cpu_line

WHOLE_BYTES = 2**30
"""Arrays up to this size count with every bit, larger ones with some rows."""

SAMPLED_ROWS = 1024
BLOCK_BYTES = 4096

THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "NPROC")
"""Environment variables that say how many threads PyTorch, TensorFlow and JAX take."""

FLAGS = (
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_XLA_FLAGS",
    "TF_DETERMINISTIC_OPS",
    "XLA_FLAGS",
    *THREADS,
    "MKL_NUM_THREADS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "CUDA_VISIBLE_DEVICES",
)
"""Environment variables that change how numbers are computed."""

CAUSES = (
    ("workers", "the number of workers is not the same"),
    ("code", "the code of the experiment has changed"),
    ("data", "the data are not the same"),
    ("arguments", "`fit` was called with other arguments"),
    ("model", "the model is not the same"),
    ("training", "the optimizer, the loss or the metrics are not the same"),
    ("callbacks", "the callbacks are not the same"),
    ("gear", "the gear is not the same"),
    ("watch", "the step is watched in one of them and not in the other"),
    ("backend", "the backend is not the same"),
    ("versions", "versions of packages differ"),
    ("device", "the device is not the same"),
    ("instructions", "the processor has other instructions"),
    ("threads", "the number of threads differs"),
    ("flags", "flags in the environment differ"),
    ("precision", "the precision of numbers differs"),
)
"""The first part of a path with what it means, the likeliest cause first."""


@dataclass(frozen=True)
class Difference:
    """One entry that is not what it was.

    Attributes:
        path: Of the entry, such as `versions/keras`.
        was: When the run was recorded.
        now: In this process.
    """

    path: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: was {self.was!r}, is {self.now!r}"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Every entry that differs, the likeliest cause of other bits first."""
    order = [root for root, _ in CAUSES]

    def place(difference: Difference) -> int:
        root = difference.path.partition("/")[0]
        return order.index(root) if root in order else len(order)

    return sorted(_differences("", was, now), key=place)


def _differences(path: str, was: Any, now: Any) -> Iterable[Difference]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*was, *now}):
            under = f"{path}/{key}" if path else str(key)
            yield from _differences(under, was.get(key), now.get(key))
    elif was != now:
        yield Difference(path, was, now)


def identity(
    backend: Backend,
    model: Any,
    *,
    gear: str | None,
    watched: bool,
    workers: int = 1,
    code: Mapping[str, str],
) -> dict[str, Any]:
    """What the bits of a training in this process depend on, data apart.

    Args:
        backend: Where steps run.
        model: What is trained.
        gear: How.
        watched: Whether its signals are measured: that is another program.
        workers: How many processes train it together.
        code: SHA-256 of the code, by what it is of.
    """
    import keras

    return {
        "backend": backend.name,
        "device": backend.device(),
        "threads": backend.threads(),
        "instructions": instructions(),
        "flags": {
            **{name: os.environ[name] for name in FLAGS if name in os.environ},
            **backend.flags(),
        },
        "versions": _versions(backend),
        "precision": {
            "floatx": keras.config.floatx(),
            "policy": str(keras.config.dtype_policy().name),
        },
        "model": digest(_config(model, model.get_config)),
        "training": {name: digest(value) for name, value in training(model).items()},
        "gear": gear,
        **({"watch": True} if watched else {}),
        "workers": workers,
        "code": dict(code),
    }


def training(model: Any) -> dict[str, Any]:
    """What a model was compiled with, as Keras serializes it."""
    config = _config(model, getattr(model, "get_compile_config", dict))
    if isinstance(config, dict):
        names = ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics")
        return {name: config.get(name) for name in names}
    return {"config": config}


def configuration(model: Any) -> dict[str, Any]:
    """The model and what trains it, as Keras serializes them, as far as it can."""
    import keras

    whole = _config(model, lambda: keras.saving.serialize_keras_object(model))
    return {"model": whole, **training(model)}


def digest(value: Any) -> str:
    """A short SHA-256 of a configuration, whatever its objects happen to be called.

    Keras counts names up (`dense`, `dense_1`), so they depend on what else was built.
    """
    names: dict[str, str] = {}
    _find_names(value, names)
    return hashlib.sha256(repr(_plain(value, names)).encode()).hexdigest()[:16]


def _find_names(value: Any, names: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        name = value.get("name")
        if isinstance(name, str):
            names.setdefault(name, f"#{len(names)}")
        for part in value.values():
            _find_names(part, names)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _find_names(part, names)


def _plain(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        skipped = ("build_config", "object_id", "shared_object_id")
        kept = {k: v for k, v in value.items() if k not in skipped}
        return sorted((str(k), _plain(v, names)) for k, v in kept.items())
    if isinstance(value, (list, tuple)):
        return [_plain(part, names) for part in value]
    if isinstance(value, str):
        return names.get(value, value)
    return value if isinstance(value, (int, float, type(None))) else str(type(value))


def _config(model: Any, read: Callable[[], Any]) -> Any:
    """A configuration, or why Keras cannot make one (a model of one's own code)."""
    try:
        return read()
    except Exception as error:
        return f"{type(model).__name__}: {type(error).__name__}"


def code_of(*functions: Callable[..., Any]) -> dict[str, str]:
    """The SHA-256 of the files that functions are written in, packages apart."""
    import inspect

    found = {}
    for function in functions:
        try:
            file = inspect.getsourcefile(inspect.unwrap(function))
        except TypeError:
            file = None
        path = Path(file) if file else None
        if path is not None and path.is_file() and "site-packages" not in path.parts:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def data_fingerprint(arrays: Any) -> str:
    """A SHA-256 over what arrays hold: rows spread evenly, and the sum of each 4 KiB.

    Above 1 GiB the rows alone. Costs about 0.1 s a GiB.
    """
    import keras

    total = hashlib.sha256()
    for path, leaf in keras.tree.flatten_with_path(arrays):
        rows, size = int(leaf.shape[0]), int(np.prod(leaf.shape))
        name = str(getattr(leaf.dtype, "name", leaf.dtype))
        total.update(f"{path} {name} {tuple(leaf.shape)}".encode())
        itemsize = getattr(leaf.dtype, "itemsize", None) or 8
        places = np.unique(np.linspace(0, rows - 1, SAMPLED_ROWS).astype(int))
        if size * itemsize > WHOLE_BYTES:
            for place in places:
                total.update(np.ascontiguousarray(leaf[place]).tobytes())
        else:
            whole = np.ascontiguousarray(np.asarray(leaf))
            total.update(whole[places].tobytes())
            total.update(_block_sums(whole.reshape(-1).view(np.uint8)))
    return total.hexdigest()


def _block_sums(data: np.ndarray) -> bytes:
    """The sum of each 4 KiB, as 64-bit words: any changed bit changes one.

    At the speed of memory; a SHA-256 of everything takes as long as an epoch.
    """
    whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
    words = data[:whole].view(np.uint64).reshape(-1, BLOCK_BYTES // 8)
    sums: np.ndarray = words.sum(axis=1, dtype=np.uint64)
    return sums.tobytes() + data[whole:].tobytes()


@cache
def instructions() -> str:
    """The processor's architecture and the vector instructions that it has."""
    found = set(cpu_line("flags", "Features").partition(":")[2].split())
    wanted = ("sse4_1", "sse4_2", "avx", "avx2", "fma", "asimd", "sve", "amx_tile")
    kept = [f for f in wanted if f in found]
    kept += sorted(f for f in found if f.startswith("avx512"))
    return " ".join([platform.machine(), *kept])


def _versions(backend: Backend) -> dict[str, str]:
    names = ("loopscope", "keras", "numpy", "ml_dtypes", *backend.packages)
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["python"] = ".".join(map(str, sys.version_info[:2]))
    return found
