"""Examples in files, and how each worker reads its part of them."""

import os
from pathlib import Path

import numpy as np

from models import BATCH, blobs

BACKEND = os.environ["KERAS_BACKEND"]
FILES = 3
ROWS = 5 * BATCH + 1
"""The last batch has one row: of several workers, one alone has it."""

KINDS = ("arrayrecord", "iterable", *(["tfrecord"] * (BACKEND == "tensorflow")))


def bytes_of(index, x, y):
    return np.concatenate([[index], x, [y]]).astype("float32").tobytes()


def example(record):
    numbers = np.frombuffer(record, np.float32)
    return {"x": numbers[1:-1], "index": numbers[0]}, np.int32(numbers[-1])


def write(folder):
    """The examples in `FILES` files of each kind."""
    from array_record.python.array_record_module import ArrayRecordWriter

    x, y = blobs(ROWS)
    for number, rows in enumerate(np.array_split(np.arange(ROWS), FILES)):
        records = [bytes_of(i, x[i], y[i]) for i in rows]
        writer = ArrayRecordWriter(
            str(folder / f"{number}.arrayrecord"), "group_size:1"
        )
        for record in records:
            writer.write(record)
        writer.close()
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.io.TFRecordWriter(str(folder / f"{number}.tfrecord")) as file:
                for record in records:
                    file.write(record)


def names(folder, kind):
    return [str(folder / f"{number}.{kind}") for number in range(FILES)]


def arrayrecord(folder, batch):
    import grain

    source = grain.sources.ArrayRecordDataSource(names(folder, "arrayrecord"))
    shuffled = grain.MapDataset.source(source).seed(3).shuffle()

    def part(index, count):
        # Read on several threads by Grain itself, in order.
        return shuffled[index::count].map(example).batch(batch // count)

    return part


def tfrecord(folder, batch):
    import tensorflow as tf

    def parsed(record):
        numbers = tf.io.decode_raw(record, tf.float32)
        numbers = tf.ensure_shape(numbers, [blobs(1)[0].shape[1] + 2])
        x, index, y = numbers[1:-1], numbers[0], tf.cast(numbers[-1], tf.int32)
        return {"x": x, "index": index}, y

    def part(index, count):
        files = tf.data.Dataset.from_tensor_slices(names(folder, "tfrecord"))
        records = files.interleave(
            tf.data.TFRecordDataset, num_parallel_calls=2, deterministic=True
        )
        records = records.shuffle(ROWS, seed=3).shard(count, index)
        return records.map(parsed, num_parallel_calls=2).batch(batch // count)

    return part


class Iterated:
    """Batches of one worker, from memory."""

    def __init__(self, index, count, batch):
        x, y = blobs(ROWS)
        rows = np.arange(ROWS)[index::count]
        self.cuts = np.split(rows, range(batch // count, len(rows), batch // count))
        self.x, self.y = x, y

    def __len__(self):
        return len(self.cuts)

    def __iter__(self):
        for rows in self.cuts:
            given = {"x": self.x[rows], "index": rows.astype("float32")}
            yield given, self.y[rows].astype("int32")


def part(kind, folder, batch):
    if kind == "iterable":
        return lambda index, count: Iterated(index, count, batch)
    return {"arrayrecord": arrayrecord, "tfrecord": tfrecord}[kind](folder, batch)


def examples(folder, batch):
    """By Grain: (x, y) alone."""
    made = arrayrecord(Path(folder), batch)
    return lambda index, count: made(index, count).map(lambda b: (b[0]["x"], b[1]))
