"""Reinforcement learning: a policy learns to balance poles, from what it does itself.

What it shows: a loop whose data are made between its steps. In each epoch 32 poles are
balanced by the policy as it stands, in a game written in NumPy; then it learns from
what happened (a policy gradient with clipped ratios, https://arxiv.org/abs/1707.06347).
What was seen is kept in variables that the step reads; the data of the loop are only
the numbers of its rows. So it is state, like weights: a run that is killed within an
epoch goes on with it, and each step can be rewound, though the game is long over. The
luck of an epoch depends on its number alone.

    python policy_gradient.py
    loopscope train policy_gradient.py:experiment --run runs/poles
"""

import keras
import numpy as np
from keras import layers, ops

import loopscope

POLES, TICKS = 32, 200
"""How many poles are balanced in an epoch, and for how many ticks at most."""


def tick(state, push):
    """0.02 s of CartPole's physics: place, speed, angle and turning of each pole."""
    _, speed, angle, turning = state.T
    sine, cosine = np.sin(angle), np.cos(angle)
    force = (10 * push + 0.05 * turning**2 * sine) / 1.1
    turn = (9.8 * sine - cosine * force) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    pull = force - 0.05 * turn * cosine / 1.1
    return state + 0.02 * np.stack([speed, pull, turning, turn], axis=1)


class Memory:
    """What was seen in an epoch: variables with a row for each tick of each pole."""

    def __init__(self):
        def rows(name, *shape, dtype="float32"):
            zeros = np.zeros((TICKS * POLES, *shape), dtype)
            return keras.Variable(zeros, trainable=False, name=name)

        self.seen = rows("seen", 4)
        self.pushed = rows("pushed", dtype="int32")
        self.chance = rows("chance")
        self.worth = rows("worth")
        self.stood = keras.Variable(0.0, trainable=False, name="stood")


def play(policy, memory, epoch):
    """Balance the poles with the policy as it stands, and remember it."""
    luck = np.random.default_rng((7, epoch))
    state = luck.uniform(-0.05, 0.05, (POLES, 4))
    standing = np.ones(POLES, bool)
    seen = np.zeros((TICKS, POLES, 4), "float32")
    pushed, chance = np.zeros((TICKS, POLES), "int32"), np.ones((TICKS, POLES))
    stood = np.zeros((TICKS, POLES))
    for time in range(TICKS):
        seen[time], stood[time] = state, standing
        chances = ops.convert_to_numpy(ops.softmax(policy(seen[time])))
        pushed[time] = luck.random(POLES) < chances[:, 1]
        chance[time] = chances[np.arange(POLES), pushed[time]]
        state = tick(state, 2 * pushed[time] - 1)
        standing &= (abs(state[:, 0]) < 2.4) & (abs(state[:, 2]) < 0.2095)
        if not standing.any():
            break
    memory.seen.assign(seen.reshape(-1, 4))
    memory.pushed.assign(pushed.reshape(-1))
    memory.chance.assign(chance.reshape(-1))
    memory.worth.assign(worth(stood).reshape(-1))
    memory.stood.assign(stood.sum(0).mean())


def worth(stood, discount=0.98):
    """How much longer than the others each pole stood from a tick on; 0 once down."""
    left = np.zeros_like(stood)
    for time in reversed(range(TICKS)):
        later = left[time + 1] if time + 1 < TICKS else 0
        left[time] = stood[time] * (1 + discount * later)
    mean = left.sum(1, keepdims=True) / np.maximum(stood.sum(1, keepdims=True), 1)
    above = stood * (left - mean)
    return above / (np.sqrt(np.square(above).sum() / stood.sum()) + 1e-6)


class Play(keras.callbacks.Callback):
    """Plays before each epoch, where the outer loop is not one's own."""

    def __init__(self, policy, memory):
        super().__init__()
        self.policy, self.memory = policy, memory

    def on_epoch_begin(self, epoch, logs=None):
        """Play; where a run goes on, what it had seen comes back after this."""
        play(self.policy, self.memory, epoch)


def experiment(epochs=20, batch_size=256, gear="auto"):
    """The training.

    Args:
        epochs: How often the poles are balanced and learnt from.
        batch_size: Ticks of a step.
        gear: As in `loopscope.Loop`.
    """
    keras.utils.set_random_seed(0)
    policy = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(32, activation="tanh"),
            layers.Dense(32, activation="tanh"),
            layers.Dense(2),
        ],
        name="policy",
    )
    memory, optimizer = Memory(), keras.optimizers.Adam(3e-3)
    loop = loopscope.Loop(policy, gear=gear, seed=0)

    @loop.train_step
    def train_step(rows):
        def of(variable):
            return ops.take(variable, rows, axis=0)

        def compute_loss():
            chances = ops.softmax(policy(of(memory.seen), training=True))
            chance = ops.sum(chances * ops.one_hot(of(memory.pushed), 2), axis=-1)
            # How much likelier the push has become since the poles were balanced.
            ratio, near = chance / of(memory.chance), of(memory.worth)
            return -ops.mean(
                ops.minimum(ratio * near, ops.clip(ratio, 0.8, 1.2) * near)
            )

        loss, gradients = loopscope.value_and_grad(
            compute_loss, policy.trainable_variables
        )
        optimizer.apply(gradients, policy.trainable_variables)
        return {"loss": loss, "stood": ops.convert_to_tensor(memory.stood)}

    return loopscope.Experiment(
        loop,
        x=np.arange(TICKS * POLES, dtype="int32"),
        batch_size=batch_size,
        epochs=epochs,
        callbacks=[Play(policy, memory)],
    )


def main():
    """The same in an outer loop of one's own."""
    made = experiment()
    loop, (player,) = made.loop, made.arguments["callbacks"]
    rows = made.train_source()
    for epoch in loop.epochs(made.arguments["epochs"]):
        if loop.cursor.index == 0:  # Not where a run goes on within an epoch.
            play(player.policy, player.memory, epoch.index)
        for _ in epoch.train(rows, every=None):
            pass
        if epoch.index % 5 == 0 or epoch.index + 1 == epoch.epochs:
            stood = epoch.metrics["stood"]
            print(f"epoch {epoch.index:3d}: a pole stood {stood:5.1f} of {TICKS} ticks")


if __name__ == "__main__":
    main()
