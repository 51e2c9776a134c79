"""A step of JAX on all devices of a `keras.distribution`, which is one program.

The step stays the one for a whole batch. The rows of a batch are laid out over the
devices, variables stay where the distribution has put them, and the compiler divides
the work. So what a step computes does not depend on how many devices there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from loopscope.backend.base import Step
from loopscope.data.feed import Feed
from loopscope.errors import UsageError

map_structure = keras.tree.map_structure


def current() -> Any:
    """The distribution over several devices that is set, or `None`."""
    distribution = keras.distribution.distribution()
    if distribution is None or mesh_of(distribution).size < 2:
        return None
    return distribution


def adopt(model: Any, strategy: Any) -> None:
    """Lay out the variables of a model, and of what trains it, as a distribution says.

    The distribution is set, and stays so; variables keep their values.

    Raises:
        UsageError: None of Keras, or another one is set; nothing was moved.
    """
    known = keras.distribution.DataParallel, keras.distribution.ModelParallel
    if not isinstance(strategy, known):
        raise UsageError(
            "Expected a `keras.distribution.DataParallel` or `ModelParallel`. "
            f"Received: strategy of type {type(strategy).__name__}"
        )
    there = keras.distribution.distribution()
    if there not in (None, strategy):
        raise UsageError(
            "Another distribution is set. Give that one, or call "
            "`keras.distribution.set_distribution(None)` before. "
            f"Received: strategy={named(strategy)}, set is {named(there)}"
        )
    keras.distribution.set_distribution(strategy)
    optimizer = getattr(model, "optimizer", None)
    found = [*model.variables, *getattr(model, "metrics_variables", ())]
    found += list(optimizer.variables) if optimizer is not None else []
    for variable in {id(v): v for v in found}.values():
        if variable._layout is None:
            variable._initialize(np.array(variable.value))


def mesh_of(distribution: Any) -> Mesh:
    """The devices of a distribution."""
    mesh: Mesh = distribution.device_mesh.backend_mesh
    return mesh


def whole(mesh: Mesh) -> NamedSharding:
    """Of an array that each device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def named(distribution: Any) -> str:
    """A distribution in words: bits depend on it."""
    axes = dict(mesh_of(distribution).shape)
    layouts = getattr(distribution, "_layout_map", None)
    found = {name: layout.axes for name, layout in (layouts or {}).items()}
    said = f"{type(distribution).__name__}{axes}"
    return f"{said} {found}" if found else said


def check(model: Any) -> Any:
    """The distribution that is set, once it is sure that the model was made under it.

    Raises:
        UsageError: The model's variables are elsewhere.
    """
    distribution = current()
    variables = [v for v in model.variables if isinstance(v.value, jax.Array)]
    if distribution is None:
        apart = [v for v in variables if len(v.value.sharding.device_set) > 1]
        if not apart:
            return None
        raise UsageError(
            "The model was made under a distribution, and now none is set. Call "
            "`keras.distribution.set_distribution(...)` once, before the model is "
            "made, and leave it set while it is trained (`keras.utils.clear_session` "
            f"takes it away). Received: variable {apart[0].path!r} on "
            f"{len(apart[0].value.sharding.device_set)} devices, no distribution"
        )
    there = set(mesh_of(distribution).devices.flat)
    apart = [v for v in variables if v.value.sharding.device_set != there]
    if apart:
        raise UsageError(
            "The model has to be made under the distribution that it is trained "
            "under. Call `keras.distribution.set_distribution(...)` before the model "
            "is made, or `set_distribution(None)` to train on one device. Received: "
            f"variable {apart[0].path!r} on {len(apart[0].value.sharding.device_set)} "
            f"device(s), {named(distribution)}"
        )
    return distribution


def spread(step: Step, distribution: Any) -> Step:
    """The step with the rows of its batch laid out over the devices.

    A batch whose rows do not divide evenly is on each device as a whole, and so are the
    outputs.
    """
    everywhere = whole(mesh_of(distribution))

    def laid_out(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not leaf.ndim:
            return leaf
        layout = distribution.get_data_layout(leaf.shape).backend_layout
        return jax.lax.with_sharding_constraint(
            leaf, layout if _divides(layout, leaf.shape) else everywhere
        )

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.lax.with_sharding_constraint(leaf, everywhere)

    def on_all(*batch: Any) -> Any:
        return map_structure(gathered, step(*map_structure(laid_out, batch)))

    on_all.__module__ = getattr(step, "__module__", "")
    return on_all


def _divides(layout: Sharding, shape: tuple[int, ...]) -> bool:
    try:
        layout.shard_shape(shape)
    except ValueError:
        return False
    return True


def own(variables: Sequence[Any]) -> list[Sharding] | None:
    """Where each variable lies; `None` where no distribution is set."""
    distribution = current()
    if distribution is None:
        return None
    mesh = mesh_of(distribution)
    there = set(mesh.devices.flat)
    return [
        v.value.sharding if v.value.sharding.device_set == there else whole(mesh)
        for v in variables
    ]


def kept(values: Sequence[Any], layouts: Sequence[Sharding] | None) -> list[Any]:
    """New values of variables, where the variables are."""
    if layouts is None:
        return list(values)
    constrained = jax.lax.with_sharding_constraint
    return [constrained(v, at) for v, at in zip(values, layouts, strict=True)]


def compiled(pure: Callable[..., Any], variables: Sequence[Any]) -> Callable[..., Any]:
    """`jax.jit` of a function that gives new values of variables, and outputs."""
    layouts, distribution = own(variables), current()
    where = {}
    if layouts is not None:
        where = {"out_shardings": (layouts, whole(mesh_of(distribution)))}
    found: Callable[..., Any] = jax.jit(pure, **where)
    return found


def place(array: Any) -> jax.Array:
    """A copy of an array; under a distribution, one on each of its devices.

    Asks no other process: each has the same array.
    """
    # A copy: JAX on CPU may otherwise share the memory of a NumPy array.
    local, distribution = jnp.array(array), current()
    if distribution is None or len(local.sharding.device_set) > 1:
        return local
    mesh = mesh_of(distribution)
    copies = [jax.device_put(local, device) for device in mesh.local_devices]
    return jax.make_array_from_single_device_arrays(local.shape, whole(mesh), copies)


def assembled(feed: Feed) -> Feed:
    """A feed of the whole batches, of which each process gives the rows that it has.

    Raises:
        UsageError: The rows of a batch cannot be divided so over the devices.
    """
    distribution = current()
    mesh = mesh_of(distribution)

    def on_all(leaf: np.ndarray) -> jax.Array:
        steps, rest = len(leaf) // feed.rows, leaf.shape[1:]
        rows = feed.batch_size, *rest
        layout = distribution.get_data_layout(rows).backend_layout
        stacked = NamedSharding(mesh, PartitionSpec(None, *layout.spec))
        leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
        try:
            return jax.make_array_from_process_local_data(
                stacked, leaf.reshape(steps, feed.rows, *rest), (steps, *rows)
            )
        except ValueError as error:
            raise UsageError(
                "Data by worker need batches whose rows are spread evenly over the "
                f"devices: {feed.rows} rows of each worker over its "
                f"{len(mesh.local_devices)} device(s), and a mesh whose batch axis "
                f"goes over the processes in order. Received: {named(distribution)}. "
                f"JAX says: {error}"
            ) from error

    arrays = map_structure(on_all, feed.arrays)
    return replace(feed, kind="stack", arrays=arrays, parts=1)


def to_numpy(array: Any) -> np.ndarray:
    """A copy on the host, put together of what this process has of an array.

    Raises:
        UsageError: Other processes have parts of it that this one has not.
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return np.asarray(array)
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    parts = {str(shard.index): shard for shard in array.addressable_shards}
    if sum(shard.data.size for shard in parts.values()) < array.size:
        raise UsageError(
            "A variable of which each process has but a part cannot be read, nor "
            "recorded, by one of them. Lay out the device mesh so that the axes which "
            "divide variables lie within a process, for example "
            f"`DeviceMesh(({jax.process_count()}, {jax.local_device_count()}), "
            "('batch', 'model'))`. "
            f"Received: shape={array.shape}, sharding={array.sharding}"
        )
    found = np.empty(array.shape, array.dtype)
    for shard in parts.values():
        found[shard.index] = np.asarray(shard.data)
    return found


__all__ = [
    "adopt",
    "assembled",
    "check",
    "compiled",
    "current",
    "kept",
    "mesh_of",
    "named",
    "own",
    "place",
    "spread",
    "to_numpy",
    "whole",
]
