"""The experiment under Ray Train: `python ray_train.py --workers 2 --run /shared/run`.

Ray starts the workers and tells each where it stands; `loopscope.join` reads that.
"""

import argparse
import os
from pathlib import Path

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig

os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def trainer():
    """Ray's own trainer for the framework that Keras runs on."""
    if os.environ["KERAS_BACKEND"] == "torch":
        from ray.train.torch import TorchTrainer

        return TorchTrainer
    from ray.train.tensorflow import TensorflowTrainer

    return TensorflowTrainer


def work(config):
    """What each worker does: what a script for one machine does, within `join`."""
    os.environ["KERAS_BACKEND"] = config["backend"]
    from experiment import experiment

    import loopscope

    with loopscope.join():
        made = experiment()
    # If Ray starts the workers again, they go on from the last checkpoint.
    history = made.fit(run=config["run"], resume=True, verbose=0)
    ray.train.report({name: values[-1] for name, values in history.history.items()})


def main():
    """Train, and say how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/ray"))
    given = parser.parse_args()
    ray.init()
    made = trainer()(
        work,
        train_loop_config={
            "run": str(given.run.resolve()),
            "backend": os.environ["KERAS_BACKEND"],
        },
        scaling_config=ScalingConfig(num_workers=given.workers),
        run_config=RunConfig(
            storage_path=str(given.run.resolve().parent / "ray"),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    made.fit()
    from loopscope import open_run

    for epoch in open_run(given.run).epochs:
        print(f"epoch {epoch['epoch'] + 1}: val_accuracy {epoch['val_accuracy']:.4f}")


if __name__ == "__main__":
    main()
