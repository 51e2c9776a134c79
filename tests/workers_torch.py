"""Trains on one process and then as one worker of several; run once for each of them.

The environment says which worker this is, as torchrun says it.
"""

import json
import os
import signal
import sys
import warnings
from datetime import timedelta

import keras
import numpy as np
import torch
import torch.distributed as dist
from keras import layers
from torch.nn.parallel import DistributedDataParallel

import loopscope
import models
from loopscope import backend
from loopscope.errors import UsageError, WorkerError
from models import BATCH, apart, blobs, clipped, fresh

TOLD = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}
RANK, SIZE = int(TOLD["RANK"]), int(TOLD["WORLD_SIZE"])


def join():
    """From here on this process is a worker."""
    os.environ.update(TOLD)
    return backend.current().team(None)


def trained(make, gear, *data, **options):
    loop = fresh(make, gear)
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    history = loop.fit(*data, **options).history
    return history, loop.state.numpy(), loop


def with_backward(wrap=None):
    """The step of Keras's own guide to loops on PyTorch."""

    def build():
        def make(gear, **options):
            loop = models.small_loop(gear, **options)
            model, optimizer = loop.model, loop.model.optimizer
            called = wrap(model) if wrap and dist.is_initialized() else model
            seen = keras.metrics.SparseCategoricalAccuracy(name="seen")

            @loop.train_step
            def train_step(x, y):
                model.zero_grad()
                logits = called(x)
                loss = model.compute_loss(x, y, logits)
                loss.backward()
                variables = model.trainable_weights
                gradients = [v.value.grad for v in variables]
                with torch.no_grad():
                    optimizer.apply(gradients, variables)
                seen.update_state(y, logits)
                return {"loss": loss, "rows": torch.tensor(len(x))}

            return loop

        return make, blobs(BATCH)

    return build


def functional():
    """Gradients that come by other means than a backward pass."""

    def make(gear, **options):
        loop = models.small_loop(gear, **options)
        model, optimizer = loop.model, loop.model.optimizer

        @loop.train_step
        def train_step(x, y):
            names = [v.path for v in model.trainable_variables]

            def compute(values):
                pairs = zip(model.trainable_variables, values, strict=True)
                with keras.StatelessScope(state_mapping=list(pairs)):
                    return model.compute_loss(x, y, model(x, training=True))

            values = [v.value.detach() for v in model.trainable_variables]
            grads, loss = torch.func.grad_and_value(compute)(values)
            assert len(grads) == len(names)
            with torch.no_grad():
                optimizer.apply(grads, model.trainable_variables)
            return loss

        return loop

    return make, blobs(BATCH)


def scaled():
    """Loss scaling sees the gradients of the whole batch."""

    def make(gear, **options):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=8.0, dynamic_growth_steps=2
        )
        return models.small_loop(gear, optimizer=optimizer, **options)

    return make, blobs(BATCH)


class Guided(keras.Model):
    """Keras's guide: a model's own `train_step`, whose logs are metrics' results."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)

    def train_step(self, data):
        x, y = data
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        self.zero_grad()
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=len(x))
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


def guided():
    def make(gear, **options):
        return models.small_loop(gear, model=Guided(), **options)

    return make, blobs(BATCH)


def recorded(name):
    """A model of the gear tests, its gradients kept by a portable step."""

    def build():
        make, data = getattr(models, name)()

        def recording(gear, **options):
            loop = make(gear, **options)
            models.record_gradients(loop, data[0])
            return loop

        return recording, data

    return build


OWN = {
    "with_backward": with_backward(),
    "with_ddp": with_backward(DistributedDataParallel),
    "functional": functional,
    "clipped": clipped,
    "scaled": scaled,
    "guided": guided,
}


def built(name):
    if name.startswith("recorded "):
        return recorded(name.removeprefix("recorded "))()
    return (OWN.get(name) or getattr(models, name))()


def once_alone(train):
    """What a training gives: to the chief in one process, then to all workers."""
    alone = None if RANK else train()
    join()
    return alone, train()


def agrees(names, gear):
    """Two steps, the second one of five rows: one worker has two, the other three."""

    def train():
        return {name: of_five(name) for name in names.split(",")}

    def of_five(name):
        make, data = built(name)
        rows = keras.tree.map_structure(
            lambda a: np.concatenate([a] * 2)[: BATCH + 5], data
        )
        return trained(make, gear, *rows)

    alone, divided = once_alone(train)
    return {
        name: {
            "sha256": run[2].state.sha256(),
            **(apart(alone[name], run) if alone else {}),
        }
        for name, run in divided.items()
    }


def uses(gear):
    """Validation, prediction and batches with fewer rows than workers."""
    x, y = blobs(2 * BATCH + 1)

    def train():
        data = blobs(13, seed=8)
        run = trained(models.small_loop, gear, x, y, validation_data=data)
        return run, run[2].predict(x, batch_size=5, verbose=0)

    alone, (run, predicted) = once_alone(train)
    found = {"rows": len(predicted), "sha256": run[2].state.sha256()}
    if alone:
        found |= apart(alone[0], run)
        found["predicted"] = float(models.relative(alone[1], predicted))
    return found


def taken(gear):
    """The examples of two epochs that this worker has trained on, by number."""
    join()
    seen = []

    def make(gear):
        loop = models.small_loop(gear)
        model = loop.model

        @loop.train_step
        def train_step(x, y):
            seen.extend(int(number) for number in y)
            logits = model(x, training=True)
            loss = keras.ops.mean(keras.ops.square(logits))
            model.zero_grad()
            loss.backward()
            variables = model.trainable_weights
            with torch.no_grad():
                model.optimizer.apply([v.value.grad for v in variables], variables)
            return loss

        return loop

    loop = fresh(make, gear)
    x, y = blobs(29)[0], np.arange(29)
    loop.fit(x, y, batch_size=BATCH, epochs=2, verbose=0)
    return seen


def mixed(gear):
    """BatchNorm and Dropout: variables of one value, and masks of each its own."""
    join()
    masks = []

    def make(gear):
        loop = models.mixed_loop(gear)
        model, optimizer = loop.model, loop.model.optimizer
        dropped = layers.Dropout(0.5)

        @loop.train_step
        def train_step(x, y):
            mask = dropped(keras.ops.ones((32,)), training=True)
            masks.append([int(number) for number in mask])

            def compute_loss():
                return model.compute_loss(x, y, model(x, training=True))

            loss, grads = loopscope.value_and_grad(
                compute_loss, model.trainable_variables
            )
            optimizer.apply(grads, model.trainable_variables)
            return loss

        return loop

    _, state, loop = trained(make, gear, *blobs(21))
    mean = next(v for path, v in state.items() if path.endswith("moving_mean"))
    return {
        "sha256": loop.state.sha256(),
        "masks": masks,
        "moved": bool(np.abs(mean).max() > 0),
    }


def said(message="what the chief has decided"):
    """What `agree` gives, for short and long messages."""
    team = join()
    messages = [b"", message.encode(), bytes(range(256)) * 40]
    mine = messages if team.rank == 0 else [b"mine"] * 3
    return [team.agree(m) == told for m, told in zip(mine, messages, strict=True)]


def refused():
    """Workers that start from other variables."""
    join()
    loop = fresh(models.small_loop, "eager", seed=RANK)
    try:
        loop.fit(*blobs(BATCH), batch_size=BATCH, verbose=0)
    except UsageError as error:
        return str(error)
    return None


def lost(gear, timeout_s, ending):
    """A worker that ends, or hangs, in mid-training; the others say what they see."""
    os.environ.update(TOLD)
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(timeout_s)))
    x, y = blobs(64)
    loop = fresh(models.small_loop, gear)

    def listener(event):
        if type(event).__name__ == "ChunkEnd" and loop.step >= 5 and RANK == SIZE - 1:
            os.kill(os.getpid(), getattr(signal, ending))

    loop.subscribe(listener, chunk_steps={"train": 1})
    try:
        loop.fit(x, y, batch_size=BATCH, epochs=10_000, verbose=0)
    except WorkerError as error:
        return {"said": str(error), "step": loop.step, "notes": error.__notes__}
    return None


def quick():
    """What the quick suite asks, in one process for each worker."""
    names = "subclassed,with_backward,with_ddp,functional,clipped,scaled,guided"
    found = {"agrees": agrees(names, "eager")}
    asked = {"said": said, "refused": refused, "taken": taken, "mixed": mixed}
    for name, ask in asked.items():
        found[name] = ask("eager") if name in ("taken", "mixed") else ask()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *arguments = sys.argv[1:]
    print(json.dumps(globals()[what](*arguments)), flush=True)
