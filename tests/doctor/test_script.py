"""Scripts with a loop of their own: bugs are found, with the lines of the script."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import pytest

import loopscope
from loopscope.errors import ExperimentError, UsageError
from models import TENSORFLOW

if not TENSORFLOW:

    def test_on_jax_a_script_is_refused(tmp_path):
        from loopscope.doctor.script import examine_script

        (tmp_path / "a.py").write_text("pass\n")
        with pytest.raises(UsageError, match="TensorFlow only"):
            examine_script(tmp_path / "a.py")

else:
    from loopscope.doctor.script import examine_script

    pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

    MS = re.MULTILINE | re.DOTALL

    def slow(value):
        return pytest.param(value, marks=pytest.mark.slow)

    TUTORIAL = Path(__file__).parent / "tutorial.py"

    SCRIPT = """
    import keras
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 512)
    x = (rng.normal(size=(3, 8))[y] + rng.normal(size=(512, 8))).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shuffle(512).batch(16)  # data

    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-3)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metric = keras.metrics.SparseCategoricalAccuracy()


    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)  # model
            loss = loss_fn(y, logits)  # loss
        grads = tape.gradient(loss, model.trainable_weights)
        optimizer.apply_gradients(zip(grads, model.trainable_weights))  # optimizer
        metric.update_state(y, logits)
        return loss


    for epoch in range(50):
        for batch in dataset:
            loss = train_step(*batch)  # step
        print(epoch, float(loss), float(metric.result()))
        metric.reset_state()
    """

    BUGS = {
        "from_logits": (
            "layers.Dense(3)",
            'layers.Dense(3, activation="softmax")',
            "loss",
        ),
        "labels": ("slices((x, y))", "slices((x, y + 1))", "loss"),
        "inputs": ('.astype("float32")', '.astype("float32") * 100', "model"),
        "training_flag": ("training=True", "training=False", "model"),
        "metrics": (
            "        return loss\n",
            "        metric.update_state(y, logits)\n        return loss\n",
            "optimizer",
        ),
        "variables": (
            "model.trainable_weights",
            "model.trainable_weights[2:]",
            "optimizer",
        ),
        "update_ratio": ("Adam(1e-3)", "Adam(10.0)", "optimizer"),
        "order": ("shuffle(512).batch(16)", "shuffle(64).batch(16)", "data"),
        "uncompiled": ("    @tf.function\n", "", "optimizer"),
        "retracing": (
            "train_step(*batch)  # step",
            "tf.function(train_step)(*batch)  # step",
            "step",
        ),
    }

    def examined(tmp_path, text):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return examine_script(path, steps=12), path

    @pytest.fixture
    def mnist(monkeypatch):
        monkeypatch.setattr(keras.datasets.mnist, "load_data", loopscope.datasets.mnist)

    def test_in_the_tutorial_its_four_flaws_are_found_and_nothing_else(mnist):
        found = examine_script(TUTORIAL, steps=12)
        lines = TUTORIAL.read_text().splitlines()
        by_check = {f.check: f for f in found.findings}
        assert sorted(by_check) == ["from_logits", "inputs", "order", "uncompiled"]
        assert len(found.findings) == 4
        assert not found.failed

        def line(finding):
            name, number = finding.where.split(",")[0].split(":")
            assert name == "tutorial.py"
            return lines[int(number) - 1]

        assert "loss_fn(y_batch, logits)" in line(by_check["from_logits"])
        assert "model(x_batch" in line(by_check["inputs"])
        assert "shuffle(buffer_size=1024)" in line(by_check["order"])
        assert by_check["order"].measured == {"buffer": 1024, "examples": 50000}
        assert "apply_gradients" in line(by_check["uncompiled"])
        measured = by_check["uncompiled"].measured
        assert measured["eager_ms"] > 2 * measured["compiled_ms"] > 0

    def test_in_a_healthy_script_nothing_is_found(tmp_path):
        found, _ = examined(tmp_path, SCRIPT)
        assert not found.findings, str(found)
        assert not found.failed

    VALIDATED = (
        SCRIPT.replace("512", "64")
        .replace(
            "        metric.reset_state()\n",
            """        metric.reset_state()
        validation.reset_state()
        for batch in dataset:
            logits = model(batch[0], training=False)
            validation_loss = loss_fn(batch[1], logits)
            validation.update_state(batch[1], logits)
    """,
        )
        .replace(
            "    @tf.function\n",
            "    validation = keras.metrics.SparseCategoricalAccuracy()\n"
            "\n\n    @tf.function\n",
        )
    )

    def test_validation_between_the_steps_is_not_taken_for_training(tmp_path):
        assert VALIDATED.count("validation") == 4
        found, _ = examined(tmp_path, VALIDATED)
        assert not found.findings, str(found)
        text = VALIDATED.replace("training=True", "training=False")
        found, _ = examined(tmp_path, text)
        assert [f.check for f in found.findings] == ["training_flag"]

    @pytest.mark.parametrize("check", BUGS)
    def test_a_bug_of_a_script_is_found_with_its_line(check, tmp_path):
        was, now, mark = BUGS[check]
        assert was in SCRIPT
        found, path = examined(tmp_path, SCRIPT.replace(was, now))
        finding = next((f for f in found.findings if f.check == check), None)
        assert finding is not None, str(found)
        number = int(finding.where.split(",")[0].split(":")[1])
        assert f"# {mark}" in path.read_text().splitlines()[number - 1]

    METRIC = "    metric = keras.metrics.SparseCategoricalAccuracy()\n"

    NEVER_RESET = SCRIPT.replace("        metric.reset_state()\n", "")

    def test_a_metric_that_is_never_reset_is_found(tmp_path):
        found, path = examined(tmp_path, NEVER_RESET)
        (finding,) = found.findings
        assert finding.check == "metrics"
        assert "never reset" in finding.message
        assert finding.measured["loops_around_its_update"] == 2
        number = int(finding.where.split(",")[0].split(":")[1])
        assert "metric.update_state" in path.read_text().splitlines()[number - 1]

    @pytest.mark.parametrize(
        "text",
        [
            # Made anew in each epoch.
            NEVER_RESET.replace(METRIC, "").replace(
                "    for epoch in range(50):\n",
                f"    for epoch in range(50):\n    {METRIC}",
            ),
            # A single loop: what it counts is meant to be everything.
            NEVER_RESET.replace("for epoch in range(50)", "if epoch := 1"),
        ],
        ids=["made anew", "one loop"],
    )
    def test_a_metric_that_need_not_be_reset_is_none(text, tmp_path):
        assert text != NEVER_RESET
        found, _ = examined(tmp_path, text)
        assert not found.findings, str(found)

    REPLICAS = Path(__file__).parents[2] / "docs" / "doctor" / "replicas.md"

    @pytest.mark.parametrize(
        "loss",
        [
            slow("tf.reduce_mean(losses)"),
            slow("keras.ops.mean(losses)"),
            slow("tf.nn.compute_average_loss(losses, global_batch_size=16)"),
            slow("keras.losses.SparseCategoricalCrossentropy(True)(y, logits)"),
        ],
    )
    def test_a_loss_that_is_not_scaled_for_replicas_is_found(loss, tmp_path):
        blocks = re.findall(r"^```python notest\n(.*?)^```$", REPLICAS.read_text(), MS)
        broken, mended = blocks
        was = "tf.reduce_mean(losses)"
        now = "tf.nn.compute_average_loss(losses, global_batch_size=16)"
        assert broken.replace(was, now) == mended
        script = tmp_path / "script.py"
        script.write_text(broken.replace(was, loss))
        # In a process of its own: devices can be made of a processor only once.
        arguments = ["doctor", str(script), "--steps", "6", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "loopscope.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(done.stdout)["findings"]
        wrong = ".mean(" in loss or "reduce_mean" in loss
        assert [f["check"] for f in found] == ["replicas"] * wrong, done.stderr
        if wrong:
            assert found[0]["measured"] == {"replicas": 2, "examples_of_a_replica": 8}
            number = int(found[0]["where"].partition(":")[2])
            assert "tape.gradient" in script.read_text().splitlines()[number - 1]

    def test_shuffling_after_batching_is_found(tmp_path):
        text = SCRIPT.replace("shuffle(512).batch(16)", "batch(16).shuffle(32)")
        found, _ = examined(tmp_path, text)
        assert [f.check for f in found.findings] == ["order"]
        assert "not examples" in found.findings[0].message

    def test_frameworks_are_as_they_were_after_a_script(tmp_path):
        import tensorflow as tf

        kept = tf.function, tf.data.Dataset.shuffle, tf.GradientTape.gradient
        examined(tmp_path, SCRIPT)
        assert (tf.function, tf.data.Dataset.shuffle, tf.GradientTape.gradient) == kept
        assert not tf.config.functions_run_eagerly()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("import keras\n", "no loop to look at"),
            ("1 / 0\n", "ZeroDivisionError"),
            ("raise SystemExit(3)\n", "SystemExit"),
        ],
    )
    def test_a_script_without_a_loop_is_refused(text, said, tmp_path):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(ExperimentError, match=said):
            examine_script(tmp_path / "a.py")

    def test_a_script_that_is_not_there_is_refused(tmp_path):
        with pytest.raises(ExperimentError, match="no file"):
            examine_script(tmp_path / "a.py")
