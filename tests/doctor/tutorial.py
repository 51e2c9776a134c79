"""The training loop of the tutorial, as a script that knows nothing of loopscope."""

import time

import keras
import numpy as np
import tensorflow as tf

inputs = keras.Input(shape=(784,), name="digits")
hidden = keras.layers.Dense(64, activation="relu", name="dense_1")(inputs)
hidden = keras.layers.Dense(64, activation="relu", name="dense_2")(hidden)
outputs = keras.layers.Dense(10, activation="softmax", name="predictions")(hidden)
model = keras.Model(inputs=inputs, outputs=outputs)

optimizer = keras.optimizers.RMSprop(learning_rate=1e-3)
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
train_acc_metric = keras.metrics.SparseCategoricalAccuracy()

(x_train, y_train), _ = keras.datasets.mnist.load_data()
x_train = np.reshape(x_train, (-1, 784))
x_train, y_train = x_train[:50000], y_train[:50000]
train_dataset = tf.data.Dataset.from_tensor_slices((x_train, y_train))
train_dataset = train_dataset.shuffle(buffer_size=1024).batch(64)

for epoch in range(2):
    print(f"Start of epoch {epoch}")
    began = time.time()
    for step, (x_batch, y_batch) in enumerate(train_dataset):
        with tf.GradientTape() as tape:
            logits = model(x_batch, training=True)
            loss_value = loss_fn(y_batch, logits)
        grads = tape.gradient(loss_value, model.trainable_weights)
        optimizer.apply_gradients(zip(grads, model.trainable_weights, strict=True))
        train_acc_metric.update_state(y_batch, logits)
        if step % 200 == 0:
            print(f"Training loss at step {step}: {float(loss_value):.4f}")
    print(f"Training accuracy: {float(train_acc_metric.result()):.4f}")
    train_acc_metric.reset_state()
    print(f"Time taken: {time.time() - began:.2f}s")
