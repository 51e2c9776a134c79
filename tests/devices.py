"""Trains on one device and on several of JAX; run in a process of its own.

XLA divides a CPU into devices before anything else is done with it.
"""

import json
import os
import sys
import tempfile
import warnings

COUNT = 4
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={COUNT}"

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

# Small programs are made again and again: compiling each once is enough.
COMPILED = tempfile.TemporaryDirectory(prefix="loopscope-tests-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

DOUBLE = os.environ.get("DEVICES_DOUBLE") == "1"
if DOUBLE:
    jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")

import models  # noqa: E402
from models import BATCH, blobs, differences, fresh  # noqa: E402

distribution = keras.distribution


def data_parallel(count=2):
    return distribution.DataParallel(devices=distribution.list_devices()[:count])


def model_parallel():
    """Two ways to divide rows, two to divide the kernels of dense layers."""
    mesh = distribution.DeviceMesh((2, 2), ("batch", "model"))
    layouts = distribution.LayoutMap(mesh)
    layouts[".*dense.*kernel"] = ("model", None)
    return distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def divided(make, over):
    """The same loop, made under a distribution."""

    def under(gear, **options):
        distribution.set_distribution(over())
        return make(gear, **options)

    return under


def both(make, gear, *data, over=data_parallel, also=lambda loop: None, **options):
    """Histories, states and what else is asked: on one device, and on several."""
    found = []
    for way in (make, divided(make, over)):
        loop = fresh(way, gear)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
        history = loop.fit(*data, **options).history
        found.append((history, loop.state.numpy(), also(loop)))
    return found


def apart(one, other):
    """The largest relative difference of two trainings' variables and histories."""
    (history, state, _), (others, other_state, _) = one, other
    logs = {
        name: models.relative(history[name], others[name]) for name in sorted(history)
    }
    found = {**differences(state, other_state), **logs}
    worst = max(found, key=found.get)
    return {
        "path": worst,
        "difference": float(found[worst]),
        "logs": float(max(logs.values())),
    }


def batchnorm_and_dropout():
    """What a device with its own rows only would compute otherwise."""

    def make(gear, **options):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8, use_bias=False),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(3),
            ]
        )
        return models.small_loop(gear, model=model, **options)

    return make, blobs(BATCH)


def trained(name, gear, count, over="data_parallel"):
    """A model after so many rows, on one device and on several."""
    own = {"batchnorm_and_dropout": batchnorm_and_dropout}
    make, data = own.get(name, getattr(models, name, None))()
    rows = keras.tree.map_structure(lambda a: np.concatenate([a] * 2)[:count], data)
    return both(make, gear, *rows, over=globals()[over])


def agrees(name, gear, over="data_parallel"):
    """Two steps, the second one of five rows, which two devices cannot divide."""
    return apart(*trained(name, gear, BATCH + 5, over))


def first_steps(gear, *names):
    """The norm of what a variable differs by after one step, relative to its own.

    Of each model: the variable for which it is largest.
    """
    found = {}
    for name in names:
        (_, one, _), (_, other, _) = trained(name, gear, BATCH)
        norms = {p: np.linalg.norm(one[p].astype("float64")) for p in one}
        of = {p: np.linalg.norm(one[p] - other[p].astype("float64")) for p in one}
        of = {p: float(of[p] / max(norms[p], 1e-30)) for p in one}
        worst = max(of, key=of.get)
        found[name] = {"path": worst, "difference": of[worst]}
    return found


def agree(gear, *names):
    """Many models in one process."""
    over = os.environ.get("DEVICES_OVER", "data_parallel")
    return {name: agrees(name, gear, over) for name in names}


def divides(gear):
    """What each device has of a batch and of a kernel, as the compiled step has it."""
    seen = []

    def note(leaf, name):
        jax.debug.inspect_array_sharding(
            leaf, callback=lambda at: seen.append((name, at.shard_shape(leaf.shape)))
        )

    def make(gear, **options):
        model = models.small_model()
        loop = models.small_loop(gear, model=model, **options)

        @loop.train_step
        def train_step(x, y):
            note(x, "x")
            loss = models.built_in_by_hand(model, x, y)
            note(model.layers[0].kernel.value, "kernel")
            return loss

        return loop

    loop = fresh(divided(make, model_parallel), gear)
    loop.fit(*blobs(BATCH), batch_size=BATCH, verbose=0)
    kernel = loop.model.layers[0].kernel.value
    slot = next(v for v in loop.model.optimizer.variables if v.shape == kernel.shape)
    return {
        "seen": sorted(set(seen)),
        "kernel": kernel.sharding.shard_shape(kernel.shape),
        "slot": slot.value.sharding.shard_shape(kernel.shape),
    }


def uses(gear, over="data_parallel"):
    """Validation and prediction; the last batches have fewer rows than devices."""
    make, _ = batchnorm_and_dropout()
    x, y = blobs(BATCH + 1)
    found = both(
        make,
        gear,
        *(x, y),
        over=globals()[over],
        also=lambda loop: loop.predict(x, batch_size=BATCH, verbose=0),
        validation_data=blobs(BATCH + 1, seed=8),
    )
    predicted = [outputs for _, _, outputs in found]
    return {
        **apart(*found),
        "predicted": float(models.relative(*predicted)),
        "rows": [len(outputs) for outputs in predicted],
    }


def streamed(gear, over="data_parallel"):
    """A stream of batches of several lengths."""
    x, y = blobs(14)
    batches = models.Batches([(x[:6], y[:6]), (x[6:13], y[6:13]), (x[:1], y[:1])])
    options = {"batch_size": None, "over": globals()[over]}
    return apart(*both(models.small_loop, gear, batches, **options))


def watched(gear):
    """The signals of a step on several devices are those of one."""
    found = []
    for way in (models.small_loop, divided(models.small_loop, data_parallel)):
        loop, seen = fresh(way, gear, watch=1), []
        loop.subscribe(seen.append)
        loop.fit(*blobs(2 * BATCH), batch_size=BATCH, verbose=0)
        (signals,) = [e.signals for e in seen if type(e).__name__ == "ChunkEnd"]
        found.append(signals.values)
    return {n: float(models.relative(v, found[1][n])) for n, v in found[0].items()}


def resumed(gear, over="data_parallel"):
    """A run left in the middle of an epoch, and one that was not: do they end alike?"""
    make = divided(models.mixed_loop, globals()[over])
    return {"ends": models.left_and_not(make, gear, blobs(6 * BATCH))}


def refusals():
    """What is refused, each with its message."""
    x, y = blobs(BATCH)
    said = []

    def train(loop):
        try:
            loop.fit(x, y, batch_size=BATCH, verbose=0)
        except ValueError as error:
            said.append(str(error))

    loop = fresh(divided(models.small_loop, data_parallel), "xla")
    distribution.set_distribution(None)
    train(loop)
    loop = fresh(models.small_loop, "xla")
    distribution.set_distribution(data_parallel())
    train(loop)
    return said


def kept():
    """What is kept of the devices that bits depend on."""
    loop = fresh(divided(models.small_loop, model_parallel), "xla")
    return {"device": loop.backend.device(), **loop.backend.flags()}


def chosen():
    """The gear that `auto` takes for a long training."""
    loop = fresh(divided(models.small_loop, data_parallel), "auto", cache=False)
    source = loop.source(*blobs(BATCH), batch_size=BATCH)
    return loop.prepare("train", source, epochs_left=100_000).name


def adopted():
    """A model that was made for one device, and is given to two."""
    ends = []
    x, y = blobs(3 * BATCH + 5)
    for given in (False, True):
        make = models.mixed_loop if given else divided(models.mixed_loop, data_parallel)
        keras.utils.clear_session()
        options = {"strategy": data_parallel()} if given else {}
        loop = fresh(make, "xla", **options)
        loop.fit(x, y, batch_size=BATCH, epochs=2, verbose=0)
        ends.append(loop.state.sha256())
    return ends


def quick():
    """What the quick suite asks, in one process."""
    gear = "fused-xla"
    return {
        "divides": divides("xla"),
        "uses": uses(gear),
        "resumed": resumed(gear),
        "refusals": refusals(),
        "kept": kept(),
        "adopted": adopted(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *arguments = sys.argv[1:]
    print(json.dumps(globals()[what](*arguments)))
