"""Where a process stands in a team, from the environment that a launcher gave it."""

import json

import pytest

from loopscope import cluster
from loopscope.errors import UsageError

pytestmark = pytest.mark.once


def tf_config(cluster, kind="worker", index=0):
    task = {"type": kind, "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}

SRUN = {
    "SLURM_JOB_ID": "71002",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "node[01-02,07]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_a_process_that_nobody_has_launched_is_alone():
    assert cluster.place({}) is None
    assert cluster.place({"TF_CONFIG": ""}) is None
    assert cluster.place({"RANK": "3"}) is None


@pytest.mark.parametrize(
    "environ",
    [
        tf_config({"worker": ["a:1"]}),
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_worker_is_no_team(environ):
    assert cluster.place(environ) is None


def test_tf_config_names_every_worker():
    found = cluster.place(tf_config({"worker": ["a:1", "b:2"]}, index=1))
    assert (found.rank, found.size) == (1, 2)
    assert found.addresses == ("a:1", "b:2")
    assert found.coordinator == "a:1"


def test_a_chief_of_tf_config_comes_first():
    jobs = {"worker": ["b:1", "c:1"], "chief": ["a:1"]}
    assert cluster.place(tf_config(jobs, "chief")).rank == 0
    found = cluster.place(tf_config(jobs, index=1))
    assert found.rank == 2
    assert found.addresses == ("a:1", "b:1", "c:1")


def test_a_place_said_in_tf_config_is_the_same_place():
    for rank in range(3):
        here = cluster.local(rank, (4001, 4002, 4003))
        assert cluster.place({"TF_CONFIG": cluster.tf_config(here)}) == here


def test_torchrun_tells_where_to_meet_and_on_one_node_where_all_are():
    found = cluster.place(TORCHRUN)
    assert (found.rank, found.size, found.coordinator) == (1, 2, "first:29500")
    assert found.addresses == ("first:29501",)
    with pytest.raises(UsageError, match="torchrun tells only where the chief is"):
        cluster.tf_config(found)
    near = cluster.place({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"})
    assert near.addresses == ("first:29501", "first:29502")


def test_slurm_fills_one_node_after_the_other():
    found = cluster.place(SRUN)
    assert (found.rank, found.size) == (2, 5)
    assert found.addresses == (
        "node01:10032",
        "node01:10033",
        "node02:10032",
        "node02:10033",
        "node07:10032",
    )
    assert found.coordinator == "node01:10032"


def test_ports_that_srun_has_reserved_are_taken():
    found = cluster.place({**SRUN, "SLURM_STEP_RESV_PORTS": "12000-12001"})
    assert found.addresses[:2] == ("node01:12000", "node01:12001")
    with pytest.raises(UsageError, match="2 ports"):
        cluster.place({**SRUN, "SLURM_STEP_RESV_PORTS": "12000"})


def test_tasks_of_slurm_lie_evenly_where_nothing_else_is_said():
    even = {**SRUN, "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5"}
    del even["SLURM_STEP_TASKS_PER_NODE"], even["SLURM_NODEID"]
    hosts = [a.partition(":")[0] for a in cluster.place(even).addresses]
    assert hosts == ["node01"] * 2 + ["node02"] * 2 + ["node07"] * 2


def test_a_batch_script_of_slurm_is_no_worker():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert cluster.place(batch) is None


def test_torchrun_within_srun_counts():
    assert cluster.place({**SRUN, **TORCHRUN}).told_by == "torchrun"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1,3]-ib,x", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib", "x"]),
    ],
)
def test_lists_of_hosts_are_expanded(text, hosts):
    assert cluster.hostlist(text) == hosts


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"TF_CONFIG": "{"}, "Expected: a JSON document such as"),
        ({"TF_CONFIG": "[]"}, "Expected: a JSON document such as"),
        (
            tf_config({"worker": ["a:1", "b:1"]}, index=2),
            "of type 'worker' there are 2",
        ),
        (tf_config({"worker": ["a:1"], "ps": ["b:1"]}), "it has 'ps'"),
        (tf_config({"worker": ["a:1", "b:1"]}, "evaluator"), "it has 'evaluator'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "2"}, "at least 0 and below 2. Received: '2'"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "variable MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "without SLURM_PROCID, SLURM_STEP_NODELIST"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, r"a list such as 'node\[01-03,07\]'"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[3-1]"}, "a range such as '01-03'"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "5 tasks on 3 nodes"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "numbers such as"),
        ({**SRUN, "SLURM_NODEID": "2"}, "--distribution=block"),
    ],
)
def test_a_broken_environment_is_named(environ, text):
    with pytest.raises(UsageError, match=text):
        cluster.place(environ)
