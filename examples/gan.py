"""A GAN: two models, two optimizers, two losses in one step.

What it shows: a step of one's own that updates twice. The critic learns to tell MNIST's
digits from made ones, the generator to be taken for real. Both are found by the names
that the step uses, and so are their optimizers and the seeds of the noise: all of them
are state, so a run goes on, and any step of it can be rewound. What the step returns, a
dict of scalars, becomes the curves.

    python gan.py
    loopscope train gan.py:experiment --run runs/gan
    loopscope rewind runs/gan --step 1000
"""

import keras
import numpy as np
from keras import layers, ops

import loopscope

NOISE = 32


def build_generator():
    """From noise to a picture in -1..1."""
    return keras.Sequential(
        [
            keras.Input((NOISE,)),
            layers.Dense(7 * 7 * 32, activation="relu"),
            layers.Reshape((7, 7, 32)),
            layers.Conv2DTranspose(16, 4, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="tanh"),
        ],
        name="generator",
    )


def build_critic():
    """From a picture to a number: above zero for a real one."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 4, strides=2, padding="same", activation="leaky_relu"),
            layers.Conv2D(32, 4, strides=2, padding="same", activation="leaky_relu"),
            layers.Flatten(),
            layers.Dropout(0.3, seed=2),
            layers.Dense(1),
        ],
        name="critic",
    )


def experiment(epochs=4, examples=60_000, gear="auto"):
    """The training.

    Args:
        epochs: Passes over the data.
        examples: How many of MNIST's digits are trained on.
        gear: As in `loopscope.Loop`.
    """
    keras.utils.set_random_seed(0)
    (x, _), _ = loopscope.datasets.mnist()
    generator, critic = build_generator(), build_critic()
    of_generator = keras.optimizers.Adam(5e-4, beta_1=0.5, name="of_generator")
    of_critic = keras.optimizers.Adam(5e-4, beta_1=0.5, name="of_critic")
    loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
    seeds = keras.random.SeedGenerator(3)
    loop = loopscope.Loop(generator, gear=gear, seed=0)

    @loop.train_step
    def train_step(pictures):
        real = ops.cast(pictures, "float32") / 127.5 - 1
        batch = real.shape[0]
        fake = generator(keras.random.normal((batch, NOISE), seed=seeds), training=True)
        yes, no = ops.ones((batch, 1)), ops.zeros((batch, 1))

        def critic_loss():
            of_real, of_fake = critic(real, training=True), critic(fake, training=True)
            right = ops.mean(
                ops.cast(of_real > 0, "float32") + ops.cast(of_fake <= 0, "float32")
            )
            # Real ones count 0.9: a critic that is never quite sure teaches longer.
            return loss_fn(0.9 * yes, of_real) + loss_fn(no, of_fake), right / 2

        (lost, right), gradients = loopscope.value_and_grad(
            critic_loss, critic.trainable_variables, has_aux=True
        )
        of_critic.apply(gradients, critic.trainable_variables)

        def generator_loss():
            noise = keras.random.normal((batch, NOISE), seed=seeds)
            return loss_fn(yes, critic(generator(noise, training=True), training=True))

        fooled, gradients = loopscope.value_and_grad(
            generator_loss, generator.trainable_variables
        )
        of_generator.apply(gradients, generator.trainable_variables)
        return {"critic": lost, "generator": fooled, "critic_right": right}

    return loopscope.Experiment(
        loop, x=x[:examples, :, :, None], batch_size=64, epochs=epochs
    )


def distance(real, made, parts=32):
    """How far two sets of pictures are apart: Fréchet's distance of two Gaussians.

    In the space of the real ones' principal components, each set is described by its
    mean and covariance. 0 for two sets of the same kind.
    """
    real, made = (a.reshape(len(a), -1).astype("float64") for a in (real, made))
    axes = np.linalg.svd(real - real.mean(0), full_matrices=False)[2][:parts].T
    real, made = real @ axes, made @ axes
    a, b = np.cov(real.T), np.cov(made.T)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    shift = np.square(real.mean(0) - made.mean(0)).sum()
    return float(shift + np.trace(a) + np.trace(b) - 2 * mixed)


def drawn(pictures):
    """Pictures in -1..1 beside each other, as text."""
    rows = np.concatenate(list(pictures[:, ::2, :, 0]), axis=1)
    shades = " .:-=+*#%@"
    marks = np.clip((rows + 1) * 5, 0, 9).astype(int)
    return "\n".join("".join(shades[mark] for mark in row) for row in marks)


def main():
    """Train, and say how far what the generator makes is from MNIST."""
    made = experiment()
    real = made.arguments["x"][:4000] / 127.5 - 1
    noise = np.random.default_rng(0).normal(size=(2000, NOISE)).astype("float32")
    print(f"real digits from real digits: {distance(real[:2000], real[2000:]):.2f}")
    for epoch in made.loop.epochs(made.arguments["epochs"]):
        for step in epoch.train(made.train_source(), every=300):
            told = "  ".join(f"{k} {v:.3f}" for k, v in step.outputs.items())
            print(f"step {step.number:5d}  {told}")
        pictures = made.loop.predict(noise, batch_size=500, verbose=0)
        far = distance(real[:2000], pictures)
        print(f"epoch {epoch.index + 1}: {epoch.seconds:.1f} s, distance {far:.2f}")
    print(drawn(pictures[:4]))


if __name__ == "__main__":
    main()
