"""Distillation: a small student learns what a large teacher thinks of each picture.

What it shows: a step of one's own with a model that is only asked, and a loss of two
parts, each reported by its name. The teacher has learnt from all labels. The student
has 2,000 labels, and of the other pictures the teacher's opinion: which digits each of
them resembles, and how much. A label of -1 says that there is none.

    python distillation.py
    loopscope train distillation.py:experiment
"""

import keras
import numpy as np
from keras import layers, ops

import loopscope

TEMPERATURE = 4.0
"""Softens the teacher's opinion, so that the small numbers in it count as well."""


def build_teacher():
    """A convnet."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(16, 5, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ],
        name="teacher",
    )


def build_student():
    """A perceptron with one hidden layer."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ],
        name="student",
    )


def taught(x, y, gear):
    """A teacher that has seen all labels twice."""
    loop = loopscope.Loop(
        build_teacher(),
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        gear=gear,
        seed=0,
    )
    loop.fit(x, y, batch_size=64, epochs=2, verbose=0, doctor=False)
    return loop.model


def experiment(epochs=5, examples=50_000, labels=2_000, gear="auto", listen=1.0):
    """The student's training; the teacher's comes first, within this function.

    Args:
        epochs: Passes over the data.
        examples: How many of MNIST's first 50,000 are seen.
        labels: How many of them the student has a label for.
        gear: As in `loopscope.Loop`, of both.
        listen: How much the teacher counts; 0: not at all.
    """
    keras.utils.set_random_seed(0)
    (x, y), _ = loopscope.datasets.mnist()
    x, y = x[..., None], y.astype("int32")
    x, x_val, y, y_val = x[:examples], x[50_000:], y[:examples], y[50_000:]
    teacher = taught(x, y, gear) if listen else build_teacher()
    student = build_student()
    optimizer = keras.optimizers.Adam(2e-3)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    loop = loopscope.Loop(student, gear=gear, seed=0)

    def opinion(logits):
        return ops.log_softmax(logits / TEMPERATURE)

    def label_loss(label, logits):
        """The mean over those that have a label."""
        has_one = ops.cast(label >= 0, "float32")
        each = keras.losses.sparse_categorical_crossentropy(
            ops.maximum(label, 0), logits, from_logits=True
        )
        return ops.sum(has_one * each) / ops.maximum(ops.sum(has_one), 1.0)

    @loop.train_step
    def train_step(pictures, label):
        of_teacher = opinion(teacher(pictures, training=False))

        def compute_loss():
            logits = student(pictures, training=True)
            hard = label_loss(label, logits)
            apart = ops.exp(of_teacher) * (of_teacher - opinion(logits))
            # Gradients of softened opinions are smaller by the temperature squared.
            soft = TEMPERATURE**2 * ops.mean(ops.sum(apart, axis=-1))
            return hard + listen * soft, (hard, soft)

        (loss, (hard, soft)), gradients = loopscope.value_and_grad(
            compute_loss, student.trainable_variables, has_aux=True
        )
        optimizer.apply(gradients, student.trainable_variables)
        return {"loss": loss, "hard": hard, "soft": soft}

    @loop.test_step
    def test_step(pictures, label):
        logits = student(pictures, training=False)
        accuracy.update_state(label, logits)
        return label_loss(label, logits)

    return loopscope.Experiment(
        loop,
        x=x,
        y=np.where(np.arange(len(y)) < labels, y, -1),
        batch_size=64,
        epochs=epochs,
        validation_data=(x_val, y_val),
        validation_batch_size=500,
    )


def main():
    """The student by itself, and the student that listens."""
    for listen in (0.0, 1.0):
        made = experiment(listen=listen)
        print("with a teacher" if listen else "by itself, 2,000 labels")
        for epoch in made.loop.epochs(made.arguments["epochs"]):
            for _ in epoch.train(made.train_source(), every=None):
                pass
            epoch.validate(made.arguments["validation_data"], batch_size=500)
            told = "  ".join(f"{k} {v:.4f}" for k, v in epoch.metrics.items())
            print(f"epoch {epoch.index + 1}: {told}")


if __name__ == "__main__":
    main()
