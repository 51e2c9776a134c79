"""One of the processes that scaling.py starts: the engine alone beside loopscope.

`scaling_peers.py BACKEND DEVICES RANK SIZE PORT ROUNDS STEPS`. Both train the
tutorial's model on the same batches, in turns; the chief prints the seconds of each
turn as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

BACKEND = sys.argv[1]
DEVICES, RANK, SIZE, PORT, ROUNDS, STEPS = (int(word) for word in sys.argv[2:])
os.environ["KERAS_BACKEND"] = BACKEND
if BACKEND == "tensorflow" and SIZE > 1:
    os.environ["TF_CONFIG"] = json.dumps(
        {
            "cluster": {"worker": [f"127.0.0.1:{PORT + i}" for i in range(SIZE)]},
            "task": {"type": "worker", "index": RANK},
        }
    )
if BACKEND == "jax":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import keras  # noqa: E402
import numpy as np  # noqa: E402

from loopscope import Loop  # noqa: E402
from workloads import WORKLOADS, Training  # noqa: E402

MLP = WORKLOADS["mlp"]
BATCH = MLP.batch_size
X, Y = (part[: STEPS * BATCH] for part in MLP.data)

Epoch = Callable[[], float]
"""Trains one epoch from where it stands; gives its mean loss."""


def ours(gear: str) -> Epoch:
    """`Loop.fit` in a gear; arrays are brought to the device once, as the peer's."""
    made = Training(MLP)
    metrics = [made.metric]
    loop = Loop(made.model, made.optimizer, made.loss, metrics, gear=gear, seed=0)

    source = loop.source(X, Y, batch_size=BATCH, shuffle=True)

    def epoch() -> float:
        history = loop.fit(source, verbose=0, doctor=False)
        return float(history.history["loss"][0])

    return epoch


def order(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(len(X)).astype(np.int32)


def tensorflow() -> tuple[Epoch, Epoch]:
    """`tf.distribute`, all steps of an epoch in one call."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
    )
    strategy = tf.distribute.get_strategy()
    if SIZE > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    elif DEVICES > 1:
        names = [f"CPU:{i}" for i in range(DEVICES)]
        strategy = tf.distribute.MirroredStrategy(names)
    with strategy.scope():
        made, mean = Training(MLP), keras.metrics.Mean()
        mine = ours("fused-graph")
    x, y, drawn = tf.constant(X), tf.constant(Y), 0

    def replica_step(rows: Any) -> None:
        labels = tf.gather(y, rows)
        with tf.GradientTape() as tape:
            logits = made.model(tf.gather(x, rows), training=True)
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, logits, from_logits=True
            )
            loss = tf.nn.compute_average_loss(losses, global_batch_size=BATCH)
        weights = made.model.trainable_weights
        grads = tape.gradient(loss, weights)
        made.optimizer.apply_gradients(zip(grads, weights, strict=True))
        mean.update_state(losses)
        made.metric.update_state(labels, logits)

    @tf.function
    def steps(rows: Any, count: Any) -> None:
        index = tf.constant(0)
        while index < count:
            batch = rows[index * BATCH : (index + 1) * BATCH]

            def on_one(batch: Any = batch) -> None:
                context = tf.distribute.get_replica_context()
                own, all_of_them = (
                    tf.get_static_value(context.replica_id_in_sync_group),
                    context.num_replicas_in_sync,
                )
                own = 0 if own is None else int(own)
                first = BATCH * own // all_of_them
                last = BATCH * (own + 1) // all_of_them
                replica_step(batch[first:last])

            strategy.run(on_one)
            index += 1

    def epoch() -> float:
        nonlocal drawn
        mean.reset_state()
        made.metric.reset_state()
        steps(tf.constant(order(drawn)), tf.constant(STEPS))
        drawn += 1
        float(made.metric.result())
        return float(mean.result())

    return epoch, mine


def jax() -> tuple[Epoch, Epoch]:
    """`keras.distribution`, all steps of an epoch in one compiled loop."""
    import jax as engine
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    if SIZE > 1:
        engine.config.update("jax_cpu_collectives_implementation", "gloo")
        engine.distributed.initialize(f"127.0.0.1:{PORT}", SIZE, RANK)
    whole = rows_apart = None
    if SIZE * DEVICES > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        mesh = keras.distribution.distribution().device_mesh.backend_mesh
        whole = NamedSharding(mesh, PartitionSpec())
        rows_apart = NamedSharding(mesh, PartitionSpec("batch"))
    made, mean = Training(MLP), keras.metrics.Mean()
    mine = ours("fused-xla")
    groups = [
        made.model.trainable_variables,
        made.model.non_trainable_variables,
        made.optimizer.variables,
        mean.variables,
        made.metric.variables,
    ]

    def placed(array: Any) -> Any:
        if whole is None:
            return jnp.array(array)
        return engine.make_array_from_callback(array.shape, whole, lambda i: array[i])

    x, y, drawn = placed(X), placed(Y), 0

    def laid_out(array: Any) -> Any:
        if rows_apart is None:
            return array
        return engine.lax.with_sharding_constraint(array, rows_apart)

    def steps(state: Any, x: Any, y: Any, rows: Any, count: Any) -> Any:
        def body(carry: Any) -> Any:
            index, (trained, others, slots, means, seen) = carry
            batch = engine.lax.dynamic_slice_in_dim(rows, index * BATCH, BATCH)
            bx, labels = (laid_out(a[batch]) for a in (x, y))

            def loss_of(trained: Any) -> Any:
                logits, new = made.model.stateless_call(
                    trained, others, bx, training=True
                )
                return made.loss(labels, logits), (logits, new)

            differentiate = engine.value_and_grad(loss_of, has_aux=True)
            (loss, (logits, new)), grads = differentiate(trained)
            trained, slots = made.optimizer.stateless_apply(slots, grads, trained)
            means = mean.stateless_update_state(means, loss)
            seen = made.metric.stateless_update_state(seen, labels, logits)
            return index + 1, (trained, new, slots, means, seen)

        return engine.lax.while_loop(
            lambda carry: carry[0] < count, body, (jnp.int32(0), state)
        )[1]

    where = {} if whole is None else {"out_shardings": whole}
    compiled = engine.jit(steps, **where)

    def epoch() -> float:
        nonlocal drawn
        for metric in (mean, made.metric):
            metric.reset_state()
        state = tuple([v.value for v in group] for group in groups)
        new = compiled(state, x, y, placed(order(drawn)), np.int32(STEPS))
        for variables, values in zip(groups, new, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        drawn += 1
        float(made.metric.result())
        return float(mean.result())

    return epoch, mine


def torch() -> tuple[Epoch, Epoch]:
    """`DistributedDataParallel` around the same layers in plain PyTorch."""
    import torch as engine
    from torch.nn.parallel import DistributedDataParallel

    engine.set_num_threads(max(1, (os.cpu_count() or 1) // SIZE))
    if SIZE > 1:
        at = f"tcp://127.0.0.1:{PORT}"
        engine.distributed.init_process_group(
            "gloo", init_method=at, rank=RANK, world_size=SIZE
        )
    mine = ours("graph")
    engine.manual_seed(0)
    sizes = [(784, 64), (64, 64), (64, 10)]
    layers: list[Any] = []
    for inner, outer in sizes:
        layers += [engine.nn.Linear(inner, outer), engine.nn.ReLU()]
    network: Any = engine.nn.Sequential(*layers[:-1])
    network = DistributedDataParallel(network) if SIZE > 1 else network
    optimizer = engine.optim.RMSprop(network.parameters(), lr=1e-3, alpha=0.9)
    loss_fn = engine.nn.CrossEntropyLoss()
    x = engine.tensor(X, dtype=engine.float32)
    y, drawn = engine.tensor(Y, dtype=engine.int64), 0
    first, last = BATCH * RANK // SIZE, BATCH * (RANK + 1) // SIZE

    def epoch() -> float:
        nonlocal drawn
        rows, drawn = engine.tensor(order(drawn), dtype=engine.int64), drawn + 1
        total, right = engine.zeros(()), engine.zeros(())
        for index in range(STEPS):
            batch = rows[index * BATCH : (index + 1) * BATCH][first:last]
            optimizer.zero_grad()
            logits, labels = network(x[batch]), y[batch]
            loss = loss_fn(logits, labels)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            right += (logits.argmax(1) == labels).sum()
        return float(total) / STEPS

    return epoch, mine


def main() -> None:
    both = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[BACKEND]()
    losses = [[epoch() for _ in range(2)] for epoch in both]
    seconds: list[list[float]] = []
    for number in range(ROUNDS):
        turn: list[float] = [0.0, 0.0]
        for who in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.perf_counter()
            both[who]()
            turn[who] = time.perf_counter() - began
        seconds.append(turn)
    if RANK == 0:
        print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)


if __name__ == "__main__":
    main()
