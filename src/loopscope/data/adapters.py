"""Data that Keras knows how to iterate, through Keras's own adapters.

tf.data, `PyDataset` with its workers, torch's DataLoader, Grain, sparse and ragged
arrays: what `fit` takes is for Keras to say. Here is only the door: the one file that
names the adapters, which Keras 3.15 keeps private. Generators go without: Keras's
adapter reads two batches ahead and repeats them in each epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from loopscope.errors import DataError


class Batches(Protocol):
    """What can be iterated for batches, epoch by epoch."""

    @property
    def num_batches(self) -> int | None:
        """How many there are in an epoch, `None` if unknown."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def on_epoch_begin(self) -> None:
        """An epoch begins; before it is iterated."""
        ...

    def on_epoch_end(self) -> None:
        """An epoch has ended."""
        ...


class Adapted:
    """Batches out of one of Keras's data adapters.

    Args:
        adapter: The adapter.
        iterate: Gives the adapter's batches as the backend wants them.
        data: What the user gave.
        shuffles: Whether Keras draws the order, from a generator of its own.
    """

    def __init__(
        self,
        adapter: Any,
        iterate: Callable[[Any], Iterable[Any]],
        data: Any,
        *,
        shuffles: bool,
    ) -> None:
        self._adapter, self._iterate = adapter, iterate
        self.data, self.shuffles = data, shuffles

    @property
    def num_batches(self) -> int | None:
        """How many the data say that there are."""
        count: int | None = self._adapter.num_batches
        return count

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterate(self._adapter))

    def on_epoch_begin(self) -> None:
        """Tell the adapter, which may start its workers."""
        self._adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Tell the adapter, which may stop its workers."""
        self._adapter.on_epoch_end()


class Numbered(Adapted):
    """Batches that can be had by number: those of a `grain.MapDataset`."""

    def starting_at(self, start: int) -> Iterator[Any]:
        """The batches from number `start` on; none before it is made."""
        dataset: Any = self._iterate(self._adapter)
        return iter(dataset[start:])

    def first(self) -> Any:
        """The first batch, and no other: an iterator would read ahead."""
        dataset: Any = self._iterate(self._adapter)
        return dataset[0]


class Plain:
    """Any iterable of batches, with nobody to tell of epochs."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    @property
    def num_batches(self) -> int | None:
        """The iterable's length, where it has one."""
        try:
            return len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def on_epoch_begin(self) -> None:
        """Nobody to tell."""

    def on_epoch_end(self) -> None:
        """Nobody to tell."""


def adapted(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    iterate: Callable[[Any], Iterable[Any]],
    batch_size: int | None,
    steps_per_epoch: int | None,
    shuffle: bool,
    class_weight: dict[int, float] | None,
) -> Adapted | None:
    """The data through Keras's adapter, or `None` where Keras has none for them.

    Raises:
        DataError: Keras refuses the data, or an argument that they do not take.
    """
    from keras.src.trainers import data_adapters

    if not _known(x, y, sample_weight):
        return None
    with _undivided(), warnings.catch_warnings():
        # Shuffling is the default of `fit`: nobody asked for what is ignored here.
        warnings.filterwarnings("ignore", "`shuffle=True` was passed", UserWarning)
        try:
            adapter = data_adapters.get_data_adapter(
                x,
                y,
                sample_weight,
                batch_size=batch_size,
                steps_per_epoch=steps_per_epoch,
                shuffle=shuffle,
                class_weight=class_weight,
            )
        except ValueError as error:
            raise DataError(str(error)) from error
    kind = (
        Numbered if type(x).__module__.startswith("grain") and _is_map(x) else Adapted
    )
    return kind(adapter, iterate, x, shuffles=shuffle and can_slice((x, y)))


@contextmanager
def _undivided() -> Iterator[None]:
    """A block in which Keras's distribution shards no dataset: the loop divides rows.

    Keras would give each process another part of a tf.data dataset, and refuse others.
    """
    import keras

    distribution = keras.distribution.distribution()
    asked = getattr(distribution, "auto_shard_dataset", False)
    if asked:
        distribution.auto_shard_dataset = False
    try:
        yield
    finally:
        if asked:
            distribution.auto_shard_dataset = True


def _is_map(dataset: Any) -> bool:
    return hasattr(dataset, "to_iter_dataset") and hasattr(dataset, "__getitem__")


_SAME_EACH_TIME = frozenset(
    {
        "_TensorSliceDataset",
        "_TensorDataset",
        "_RangeDataset",
        "_BatchDataset",
        "_ParallelBatchDataset",
        "_PaddedBatchDataset",
        "_PrefetchDataset",
        "_TakeDataset",
        "_SkipDataset",
        "_ZipDataset",
        "_OptionsDataset",
        "_ConcatenateDataset",
        "_UnbatchDataset",
    }
)
"""Parts of a tf.data pipeline that remember nothing from one pass to the next."""


def is_pure(data: Any) -> bool:
    """Whether each pass over `data` surely gives the same batches."""
    if isinstance(data, Adapted):
        if data.shuffles:
            return False
        data = data.data
    if isinstance(data, (list, tuple)):
        return True
    if type(data).__module__.startswith("grain"):
        return True  # Its random numbers are functions of a seed and a number.
    parts = list(pipeline(data))
    return bool(parts) and all(type(p).__name__ in _SAME_EACH_TIME for p in parts)


def random_order(data: Any) -> str | None:
    """Why another process would get other batches, as far as the data show it."""
    if isinstance(data, Adapted):
        if data.shuffles:
            return (
                "Keras shuffles sparse, ragged and text arrays by a generator that "
                "cannot be set back; shuffle them once, and give `shuffle=False`"
            )
        data = data.data
    for part in pipeline(data):
        seeds = [getattr(part, name, None) for name in ("_seed", "_seed2")]
        if "Shuffle" in type(part).__name__ and all(_is_zero(s) for s in seeds):
            return "tf.data's `shuffle` has no seed; give it one: `shuffle(n, seed=0)`"
        if getattr(part, "_deterministic", None) == "false":
            return "the tf.data pipeline has a part with `deterministic=False`"
    sampler = getattr(data, "sampler", None)
    drawn = type(sampler).__name__ == "RandomSampler"
    if drawn and getattr(sampler, "generator", None) is None:
        return (
            "torch's DataLoader shuffles without a generator; give it one: "
            "`generator=torch.Generator().manual_seed(0)`"
        )
    return None


@dataclass(frozen=True)
class Shuffled:
    """A part of a pipeline that shuffles.

    Attributes:
        buffer: How many elements it holds.
        size: How many it is given; negative where that is not known.
        of_batches: Whether its elements are batches, rather than examples.
        where: Its place, in words.
    """

    buffer: int
    size: int
    of_batches: bool
    where: str = "the data pipeline"


def shuffles(data: Any) -> list[Shuffled]:
    """The shuffles of a tf.data pipeline, from the last to the first.

    None where the data were shuffled as a whole before.
    """
    data = data.data if isinstance(data, Adapted) else data
    parts = list(pipeline(data))
    if out_of_order(data):
        return []
    found, batches = [], 0
    for at, part in enumerate(parts):
        batches += "Batch" in type(part).__name__
        if type(part).__name__ != "_ShuffleDataset":
            continue
        before = any("Batch" in type(p).__name__ for p in parts[at:])
        # Sequences are cut with `.batch`, shuffled, and batched.
        found.append(
            Shuffled(
                int(part._buffer_size),
                int(part._input_dataset.cardinality()),
                before and not batches,
            )
        )
    return found


def out_of_order(data: Any) -> bool:
    """Whether a tf.data pipeline begins with names or places that are in no order.

    Keras's utilities shuffle them as a whole, once, and what is read with a buffer.
    """
    for part in pipeline(data):
        for tensor in getattr(part, "_tensors", ()):
            places = type(part).__name__ == "_TensorDataset" and tensor.dtype.is_integer
            if len(tensor.shape) == 1 and (places or tensor.dtype.name == "string"):
                few = list(tensor.numpy()[:1000])
                if few != sorted(few):
                    return True
    return False


def caches(data: Any) -> bool:
    """Whether a tf.data pipeline remembers what was slow to make."""
    data = data.data if isinstance(data, Adapted) else data
    return any("Cache" in type(part).__name__ for part in pipeline(data))


def pipeline(data: Any) -> Iterator[Any]:
    """The parts of a tf.data pipeline, none of anything else."""
    if hasattr(data, "element_spec") and hasattr(data, "_inputs"):
        yield data
        for part in data._inputs():
            yield from pipeline(part)


def _is_zero(seed: Any) -> bool:
    try:
        return int(seed) == 0
    except (TypeError, ValueError):
        return False


def is_sparse_or_ragged(value: Any) -> bool:
    """Whether Keras takes `value` as an array that has no dense rows to gather."""
    from keras.src.trainers.data_adapters import data_adapter_utils as kinds

    return bool(
        kinds.is_scipy_sparse(value)
        or kinds.is_jax_sparse(value)
        or kinds.is_tensorflow_sparse(value)
        or kinds.is_tensorflow_ragged(value)
    )


def can_slice(parts: Any) -> bool:
    """Whether Keras takes all of these for arrays, sparse and ragged ones included."""
    from keras.src.trainers.data_adapters import array_data_adapter

    return bool(array_data_adapter.can_convert_arrays(parts))


def split_sparse(parts: Any, share: float) -> tuple[Any, Any]:
    """The first rows and the last `share` of them, where rows cannot be gathered."""
    from keras.src.trainers.data_adapters import array_slicing

    try:
        train, rest = array_slicing.train_validation_split(parts, share)
        return tuple(train), tuple(rest)
    except ValueError as error:
        raise DataError(str(error)) from error


def _known(x: Any, y: Any, sample_weight: Any) -> bool:
    """Whether Keras has an adapter for the data."""
    import keras
    from keras.src.trainers import data_adapters
    from keras.src.trainers.data_adapters import data_adapter

    if x is None:
        return False
    return bool(
        isinstance(x, (keras.utils.PyDataset, data_adapter.DataAdapter))
        or data_adapters.is_tf_dataset(x)
        or data_adapters.is_torch_dataloader(x)
        or data_adapters.is_grain_dataset(x)
        or can_slice((x, y, sample_weight))
    )
