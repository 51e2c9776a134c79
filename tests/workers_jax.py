"""One of several processes of JAX that train together: `WHAT RANK SIZE PORT [...]`.

Each has two devices. What a process has found is the last line that it writes.
"""

import json
import os
import sys
import warnings

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

what, rank, size, port, *arguments = sys.argv[1:]
rank, size = int(rank), int(size)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", size, rank, heartbeat_timeout_seconds=10
)

import keras  # noqa: E402

import models  # noqa: E402
from loopscope import backend  # noqa: E402
from models import BATCH, blobs, differences, fresh  # noqa: E402

distribution = keras.distribution


def data_parallel():
    """Rows over all devices of all processes."""
    return distribution.DataParallel()


def within():
    """Rows over the processes, kernels over the devices of each."""
    return _divided_by("batch", "model")


def across():
    """Kernels over the processes, of which each has a part."""
    return _divided_by("model", "batch")


def _divided_by(*axes):
    mesh = distribution.DeviceMesh((size, 2), axes)
    layouts = distribution.LayoutMap(mesh)
    layouts[".*dense.*kernel"] = ("model", None)
    return distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def together(make, over):
    """The same loop, made under a distribution over all processes."""

    def under(gear, **options):
        distribution.set_distribution(over())
        return make(gear, **options)

    return under


def batchnorm_and_dropout(gear, **options):
    """What a process with its own rows only would compute otherwise."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    return models.small_loop(gear, model=model, **options)


def batchnorm(gear, **options):
    """The same without random numbers, which take long to compile."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, use_bias=False),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    )
    return models.small_loop(gear, model=model, **options)


def agrees(gear, over, make=batchnorm_and_dropout):
    """Two steps, the second one of one row, which each process computes."""
    x, y = blobs(BATCH + 1)
    states, predicted = [], []
    for way in (make, together(make, over)):
        loop = fresh(way, gear)
        loop.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        states.append(loop.state.numpy())
        predicted.append(loop.predict(x, batch_size=BATCH, verbose=0))
    found = differences(*states)
    worst = max(found, key=found.get)
    return {
        "path": worst,
        "difference": float(found[worst]),
        "predicted": float(models.relative(*predicted)),
        "sha256": loop.state.sha256(),
    }


def said(team):
    """Messages of several lengths: what the chief gives, and what all of them get."""
    lengths = (0, 1, 1016, 1017, 5000)
    own = [bytes([65 + rank]) * (n if rank == 0 else 7) for n in lengths]
    heard = [team.agree(message) for message in own]
    return [h == b"A" * n for h, n in zip(heard, lengths, strict=True)]


def alone(loop, team):
    """What the chief does and the others do not: nobody waits for them."""
    read = None
    if team.rank == 0:
        loop.model.optimizer.learning_rate = 0.025
        loop.model.layers[0].set_weights(loop.model.layers[0].get_weights())
        loop.state.set(loop.state.numpy())
        read = {m.name: float(m.result()) for m in loop.model.metrics[:1]}
        read["rate"] = float(loop.model.optimizer.learning_rate)
    return read if team.agree(b"done") == b"done" else None


def quick():
    """What the quick suite asks."""
    x, y = blobs(BATCH)
    loop = fresh(together(batchnorm, data_parallel), "fused-xla")
    loop.fit(x, y, batch_size=BATCH, verbose=0)
    state, team = loop.state.numpy(), backend.current().team(loop.model)
    found = {}
    if rank == 0:
        distribution.set_distribution(None)
        single = fresh(batchnorm, "fused-xla")
        single.fit(x, y, batch_size=BATCH, verbose=0)
        found = differences(single.state.numpy(), state)
    return {
        "team": [team.rank, team.size],
        "sha256": loop.state.sha256(),
        "difference": float(max(found.values(), default=0.0)),
        "said": said(team),
        "alone": alone(loop, team),
    }


def slow(gear):
    """Every layout, in one gear."""
    return {over.__name__: agrees(gear, over) for over in (data_parallel, within)}


def refused():
    """Parts of a variable that are in another process."""
    loop = fresh(together(models.small_loop, across), "xla")
    loop.fit(*blobs(BATCH), batch_size=BATCH, verbose=0)
    try:
        loop.state.numpy()
    except ValueError as error:
        return str(error)


def endless(gear):
    """Trains until it is killed, or another one is."""
    loop = fresh(together(models.small_loop, data_parallel), gear)
    x, y = blobs(50 * BATCH)
    loop.fit(x, y, batch_size=BATCH, verbose=0)
    print("training", flush=True)
    loop.fit(x, y, batch_size=BATCH, epochs=10**6, verbose=0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(globals()[what](*arguments)), flush=True)
