"""Where a process stands among those that train together, as its launcher has said it.

Reads the environment that a process was started in, and nothing else. Known are
`TF_CONFIG` (TensorFlow's own, which `loopscope train --workers` and Kubernetes' jobs
set too), what torchrun sets, and what SLURM's srun sets. How a framework is told of it
is the part of its room: `Backend.join`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopscope.errors import UsageError

TF_CONFIG = "TF_CONFIG"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")

SLURM_PORTS = 10_000, 1_000, 16
"""Ports of a step of SLURM: from the first on, one of so many stretches of so many.

Below 32768, where Linux takes the ports of outgoing connections from.
"""


@dataclass(frozen=True)
class Place:
    """One of the processes that train together.

    Attributes:
        rank: Of this process; 0 is the chief.
        size: How many there are; at least two.
        addresses: `host:port` of each worker by rank; of the chief alone, where the
            launcher does not tell the others'.
        coordinator: `host:port` where they meet; the chief or its launcher listens.
        told_by: What said so.
    """

    rank: int
    size: int
    addresses: tuple[str, ...]
    coordinator: str
    told_by: str


def place(environ: Mapping[str, str]) -> Place | None:
    """Where a process with this environment stands; `None` where it is alone.

    The first of `TF_CONFIG`, torchrun's variables and SLURM's that is there counts:
    torchrun may itself have been started by srun, on each node once.

    Raises:
        UsageError: What is there is incomplete or contradicts itself.
    """
    for read in (_of_tf_config, _of_torchrun, _of_slurm):
        found = read(environ)
        if found is not None:
            return found if found.size > 1 else None
    return None


def local(rank: int, ports: tuple[int, ...]) -> Place:
    """One of several processes on this machine, each with a port of its own."""
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    return Place(rank, len(ports), addresses, addresses[0], TF_CONFIG)


def tf_config(here: Place) -> str:
    """A place in the words of `TF_CONFIG`.

    Raises:
        UsageError: The addresses of the others are not known.
    """
    if len(here.addresses) != here.size:
        raise UsageError(
            f"Expected the address of each of the {here.size} workers. "
            f"{here.told_by} tells only where the chief is: {here.coordinator!r}. On "
            f"several nodes set {TF_CONFIG}, or start the workers with srun."
        )
    task = {"type": "worker", "index": here.rank}
    return json.dumps({"cluster": {"worker": list(here.addresses)}, "task": task})


def _of_tf_config(environ: Mapping[str, str]) -> Place | None:
    text = environ.get(TF_CONFIG, "")
    try:
        config: Any = json.loads(text or "{}")
        cluster, task = config.get("cluster", {}), config.get("task", {})
        jobs = {kind: list(where) for kind, where in cluster.items()}
        kind, index = task.get("type", "worker"), int(task.get("index", 0))
    except (ValueError, AttributeError, TypeError) as error:
        raise _broken(
            TF_CONFIG,
            text,
            'a JSON document such as {"cluster": {"worker": ["host1:2222", '
            '"host2:2222"]}, "task": {"type": "worker", "index": 0}}',
        ) from error
    if not any(jobs.values()):
        return None
    other = sorted({*jobs, kind} - {"chief", "worker"})
    if other:
        raise _broken(
            TF_CONFIG,
            text,
            "tasks of the types 'chief' and 'worker', which all train; it has "
            f"{', '.join(map(repr, other))}",
        )
    chiefs, workers = jobs.get("chief", []), jobs.get("worker", [])
    addresses = tuple(map(str, [*chiefs, *workers]))
    there = len(chiefs if kind == "chief" else workers)
    if len(chiefs) > 1 or not 0 <= index < there:
        raise _broken(
            TF_CONFIG,
            text,
            f"at most one chief, and the index of a task that there is: of type "
            f"{kind!r} there are {there}",
        )
    rank = index if kind == "chief" else len(chiefs) + index
    return Place(rank, len(addresses), addresses, addresses[0], TF_CONFIG)


def _of_torchrun(environ: Mapping[str, str]) -> Place | None:
    if "WORLD_SIZE" not in environ or environ["WORLD_SIZE"] == "1":
        return None
    missing = [name for name in TORCHRUN if name not in environ]
    if missing:
        raise UsageError(
            f"Expected all of {', '.join(TORCHRUN)} in the environment, as torchrun "
            f"sets them. Received: WORLD_SIZE={environ['WORLD_SIZE']!r} without "
            f"{', '.join(missing)}. Set these too, or take WORLD_SIZE away to train "
            "alone."
        )
    size = _number(environ, "WORLD_SIZE", least=1)
    rank = _number(environ, "RANK", below=size)
    port, host = _number(environ, "MASTER_PORT", least=1), environ["MASTER_ADDR"]
    # The port itself is taken by torchrun, or by PyTorch on the chief.
    near = size if environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"] else 1
    addresses = tuple(f"{host}:{port + 1 + other}" for other in range(near))
    return Place(rank, size, addresses, f"{host}:{port}", "torchrun")


def _of_slurm(environ: Mapping[str, str]) -> Place | None:
    # Only srun sets the first two for what it starts: a batch script alone is no step.
    if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    missing = [name for name in SLURM if name not in environ]
    if missing:
        raise UsageError(
            f"Expected all of {', '.join(SLURM)} in the environment, as srun sets "
            "them. Received: "
            f"SLURM_STEP_NUM_TASKS={environ['SLURM_STEP_NUM_TASKS']!r} without "
            f"{', '.join(missing)}. Start the workers with srun."
        )
    size = _number(environ, "SLURM_STEP_NUM_TASKS", least=1)
    rank = _number(environ, "SLURM_PROCID", below=size)
    hosts = hostlist(environ["SLURM_STEP_NODELIST"])
    tasks = _tasks(environ, len(hosts), size)
    ports = _ports(environ, max(tasks))
    places = [(node, own) for node, many in enumerate(tasks) for own in range(many)]
    node = places[rank][0]
    if environ.get("SLURM_NODEID", str(node)) != str(node):
        raise UsageError(
            f"Expected task {rank} on node {node} of {len(hosts)}, since tasks fill "
            "one node after the other. Received: "
            f"SLURM_NODEID={environ['SLURM_NODEID']!r}. "
            "Start the workers with `srun --distribution=block`."
        )
    addresses = tuple(f"{hosts[node]}:{ports[own]}" for node, own in places)
    return Place(rank, size, addresses, addresses[0], "SLURM")


def hostlist(text: str) -> list[str]:
    """The hosts that a list of SLURM's names: `n[1-2,05]` is n1, n2 and n05.

    Raises:
        UsageError: It is none.
    """
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            ends = (
                [plain] if plain else [n for r in ranges.split(",") for n in _range(r)]
            )
            names = [name + end for name in names for end in ends]
        found += names
    # What no part has taken is a bracket without its other half.
    if (
        not found
        or text.count("[") != text.count("]")
        or re.search(r"\[[^\]]*\[", text)
    ):
        raise _broken("SLURM_STEP_NODELIST", text, "a list such as 'node[01-03,07]'")
    return found


def _range(text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise _broken(
            "SLURM_STEP_NODELIST", text, "a number or a range such as '01-03'"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]


def _tasks(environ: Mapping[str, str], nodes: int, size: int) -> list[int]:
    """How many tasks each node has, from `2(x3),1`."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = environ.get(name)
    if text is None:
        if size % nodes:
            raise _broken(name, text, f"how {size} tasks lie on {nodes} nodes")
        return [size // nodes] * nodes
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise _broken(name, text, "numbers such as '2(x3),1'")
        found += [int(match[1])] * int(match[2] or 1)
    if len(found) != nodes or sum(found) != size:
        raise _broken(name, text, f"{size} tasks on {nodes} nodes")
    return found


def _ports(environ: Mapping[str, str], many: int) -> list[int]:
    """Ports of the tasks on one node: those that srun has reserved, or by the job."""
    reserved = environ.get("SLURM_STEP_RESV_PORTS")
    if reserved:
        found = [int(port) for part in reserved.split(",") for port in _range(part)]
        if len(found) < many:
            raise _broken(
                "SLURM_STEP_RESV_PORTS",
                reserved,
                f"{many} ports (`--resv-ports={many}`)",
            )
        return found
    first, stretches, each = SLURM_PORTS
    job = int(environ.get("SLURM_JOB_ID", "0")) % stretches
    return [first + job * each + own for own in range(many)]


def _number(
    environ: Mapping[str, str], name: str, *, least: int = 0, below: int | None = None
) -> int:
    text = environ[name]
    limit = "" if below is None else f" and below {below}"
    if not text.isdecimal() or int(text) < least or (below and int(text) >= below):
        raise _broken(name, text, f"a whole number of at least {least}{limit}")
    return int(text)


def _broken(name: str, received: object, expected: str) -> UsageError:
    return UsageError(
        f"The environment variable {name} says where this worker stands. Expected: "
        f"{expected}. Received: {received!r}. Correct it, or take it away to train "
        "alone."
    )


__all__ = ["Place", "hostlist", "local", "place", "tf_config"]
