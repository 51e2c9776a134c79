"""The examples: one experiment, under SLURM, Kubernetes and Ray Train."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import keras
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import loopscope
from loopscope import cluster

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKEND = keras.backend.backend()

# Kubernetes: what the reference of its API (v1, batch/v1) has for the fields in use.
# Anything else is refused, a name that is misspelt too.

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+(m|[KMGTPE]i?|k)?$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    labels: dict[str, str] = {}


class Labels(Strict):
    labels: dict[str, str]


class ServicePort(Strict):
    name: Name
    port: Port


class ServiceSpec(Strict):
    clusterIP: Literal["None"]
    publishNotReadyAddresses: bool
    selector: dict[str, str]
    ports: list[ServicePort]


class Service(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class Requests(Strict):
    requests: dict[Literal["cpu", "memory", "storage"], Quantity]


class ClaimSpec(Strict):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]]
    resources: Requests


class Claim(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class FieldRef(Strict):
    fieldPath: str


class ValueFrom(Strict):
    fieldRef: FieldRef


class Env(Strict):
    name: Variable
    value: str | None = None
    valueFrom: ValueFrom | None = None


class ContainerPort(Strict):
    containerPort: Port


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern="^/")]


class Container(Strict):
    name: Name
    image: str
    command: list[str]
    args: list[str]
    ports: list[ContainerPort]
    env: list[Env]
    resources: Requests
    volumeMounts: list[Mount]


class ClaimSource(Strict):
    claimName: Name


class Volume(Strict):
    name: Name
    persistentVolumeClaim: ClaimSource


class PodSpec(Strict):
    subdomain: Name
    restartPolicy: Literal["OnFailure", "Never"]
    terminationGracePeriodSeconds: Annotated[int, Field(ge=0)]
    containers: list[Container]
    volumes: list[Volume]


class Pod(Strict):
    metadata: Labels
    spec: PodSpec


class JobSpec(Strict):
    completionMode: Literal["Indexed", "NonIndexed"]
    completions: Annotated[int, Field(ge=1)]
    parallelism: Annotated[int, Field(ge=1)]
    backoffLimit: Annotated[int, Field(ge=0)]
    template: Pod


class Job(Strict):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


Manifest: TypeAdapter[Any] = TypeAdapter(
    Annotated[Service | Claim | Job, Field(discriminator="kind")]
)


def manifests():
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    return [Manifest.validate_python(d) for d in yaml.safe_load_all(text)]


@pytest.mark.once
def test_the_manifest_keeps_the_schema_and_its_parts_fit_together():
    service, claim, job = manifests()
    pod, template = job.spec.template.spec, job.spec.template
    assert service.spec.selector.items() <= template.metadata.labels.items()
    assert pod.subdomain == service.metadata.name
    (container,), (volume,) = pod.containers, pod.volumes
    assert volume.persistentVolumeClaim.claimName == claim.metadata.name
    assert [m.name for m in container.volumeMounts] == [volume.name]
    assert job.spec.completions == job.spec.parallelism
    assert job.spec.completionMode == "Indexed"
    run = container.args[container.args.index("--run") + 1]
    assert run.startswith(container.volumeMounts[0].mountPath + "/")


@pytest.mark.once
def test_each_pod_is_told_where_it_stands():
    service, _, job = manifests()
    (container,) = job.spec.template.spec.containers
    (index,) = [e for e in container.env if e.valueFrom]
    annotation = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert index.valueFrom.fieldRef.fieldPath == annotation
    places = [e.name for e in container.env]
    assert places.index(index.name) < places.index(
        "TF_CONFIG"
    )  # Or it is not filled in.
    (port,) = [p.port for p in service.spec.ports]
    for rank in range(job.spec.completions):
        environ = {
            e.name: e.value.replace(f"$({index.name})", str(rank))
            for e in container.env
            if e.value is not None
        }
        here = cluster.place(environ)
        assert (here.rank, here.size) == (rank, job.spec.completions)
        host = f"{job.metadata.name}-{rank}.{service.metadata.name}"
        assert here.addresses[rank] == f"{host}:{port}"


@pytest.mark.once
def test_the_commands_of_the_examples_are_commands_of_the_program():
    from click.testing import CliRunner

    from loopscope.cli import main

    (container,) = manifests()[2].spec.template.spec.containers
    script = (EXAMPLES / "slurm.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"loopscope (train .*)", script)
    for words in (container.command[1:] + container.args, line.split()):
        options = [word for word in words if word.startswith("--")]
        shown = CliRunner().invoke(main, [words[0], "--help"]).output
        assert all(option in shown for option in options)


SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
assert words.pop(0) == "loopscope"
tasks = [
    subprocess.Popen(
        [sys.executable, "-m", "loopscope.cli", *words, "--epochs", "1"],
        env={
            **os.environ,
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": "2",
        },
    )
    for rank in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


def free_stretch(size: int) -> tuple[int, int]:
    """Ports beside each other, such as srun reserves for a step."""
    for first in range(20_000, 30_000, size):
        try:
            for port in range(first, first + size):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first, first + size - 1
    raise AssertionError("no free ports")


@pytest.mark.slow
def test_the_script_for_slurm_trains_on_two_tasks(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(f"#!{sys.executable}\n{SRUN}")
    srun.chmod(0o755)
    first, last = free_stretch(2)
    run = tmp_path / "run"
    for _ in range(2):  # Queued again, it finds nothing left to do.
        done = subprocess.run(
            ["bash", "slurm.sh"],
            cwd=EXAMPLES,
            env={
                **os.environ,
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                "PYTHONDONTWRITEBYTECODE": "1",
                "RUN": str(run),
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_RESV_PORTS": f"{first}-{last}",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "nothing is left to do" in done.stdout
    found = loopscope.open_run(run)
    assert found.manifest["identity"]["workers"] == 2
    (epoch,) = found.epochs
    assert epoch["val_accuracy"] > 0.85


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_train_trains_on_two_workers(tmp_path):
    done = subprocess.run(
        [sys.executable, "ray_train.py", "--run", str(tmp_path / "run")],
        cwd=EXAMPLES,
        env={
            **os.environ,
            "KERAS_BACKEND": BACKEND,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "",
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = loopscope.open_run(tmp_path / "run")
    assert found.manifest["identity"]["workers"] == 2
    assert [e["epoch"] for e in found.epochs] == [0, 1, 2]
    assert found.epochs[-1]["val_accuracy"] > 0.9
    assert "epoch 3: " in done.stdout
