"""Slurm's lists and variables -> rank facts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.slurm.environment import (
    PORT_RANGE,
    PORT_TRIES,
    expand_nodes,
    expand_tasks,
    facts_from_slurm,
    rendezvous_ports,
    step_launch_id,
    step_token,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-11,7],login", ["gpu08", "gpu09", "gpu10", "gpu11", "gpu7", "login"]),
        ("a,b-1.site", ["a", "b-1.site"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
    ],
)
def test_node_lists(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "node[1-", "node[a-b]", "node]1["])
def test_unreadable_node_list_is_named(text):
    with pytest.raises(ValueError, match="node list"):
        expand_nodes(text)


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("4,2(x2)", [4, 2, 2])]
)
def test_task_counts(text, counts):
    assert expand_tasks(text) == counts


@pytest.mark.parametrize("text", ["", "2x3", "2(x)", "two"])
def test_unreadable_task_count_is_named(text):
    with pytest.raises(ValueError, match="tasks per node"):
        expand_tasks(text)


def task_environment(tasks, node, local_rank, rank):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": str(sum(tasks)),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, tasks)),
        "SLURM_STEP_NODELIST": f"n[1-{len(tasks)}]",
    }


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_facts_agree_over_all_tasks_whatever_their_distribution(tasks):
    places = [(node, local) for node, count in enumerate(tasks) for local in range(count)]
    everyone = [
        facts_from_slurm(task_environment(tasks, node, local, rank))
        for rank, (node, local) in enumerate(places)
    ]
    for (node, local), facts in zip(places, everyone):
        assert facts.hostname == f"n{node + 1}"
        assert (facts.local_rank, facts.local_size) == (local, tasks[node])
        assert facts.world_size == len(everyone)
    for local_rank in range(max(tasks)):
        # The ranks with one local rank form Horovod's "cross" group: numbered without gaps.
        group = [facts for facts in everyone if facts.local_rank == local_rank]
        assert [facts.cross_rank for facts in group] == list(range(len(group)))
        assert {facts.cross_size for facts in group} == {len(group)}


def test_outside_of_srun_the_message_says_how():
    with pytest.raises(ValueError, match="SLURM_PROCID is not set: slurm-rank runs inside srun"):
        facts_from_slurm({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "3"),
        ("SLURM_PROCID", "one"),
        ("SLURM_NODEID", "2"),
        ("SLURM_LOCALID", "2"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_STEP_NUM_TASKS", ""),
    ],
)
def test_variables_of_several_jobs_are_told_apart(name, value):
    with pytest.raises(ValueError, match=f"^{name} is '{value}', .*`unset "):
        facts_from_slurm({**task_environment([2, 1], 0, 1, 1), name: value})


def test_a_heterogeneous_job_counts_its_nodes_in_the_order_of_its_parts():
    """`salloc -w n2 -n1 : -w n1 -n2`, then `srun --het-group=0,1`: lists stay sorted by name."""
    third = {**task_environment([2, 1], 1, 1, 2), "SLURMD_NODENAME": "n1"}
    assert facts_from_slurm(third)[:6] == (2, 3, 1, 2, 0, 1)
    assert facts_from_slurm(third).hostname == "n1"


FIRST = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


def test_steps_restarts_and_users_differ_in_ports_and_token():
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"}, {"SLURM_RESTART_COUNT": "1"}]
    tokens = [step_token({**FIRST, **other}, lambda: b"secret") for other in [{}, *others]]
    tokens.append(step_token(FIRST, lambda: b"another's"))
    assert len(set(tokens)) == 5
    ports = [rendezvous_ports(token) for token in tokens]
    assert len({tuple(of_step) for of_step in ports}) == 5
    assert ports[0] == rendezvous_ports(tokens[0])
    assert len(set(ports[0])) == PORT_TRIES and set(ports[0]) <= set(PORT_RANGE)


def test_a_requeued_step_is_of_the_same_launch():
    first = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert step_launch_id(first) == step_launch_id({**first, "SLURM_RESTART_COUNT": "1"})
    for name, other in (("JOB_ID", "8"), ("STEP_ID", "1"), ("CLUSTER_NAME", "d")):
        assert step_launch_id(first) != step_launch_id({**first, f"SLURM_{name}": other})
    again = {**first, "SLURM_STEP_ID": "1", "LAUNCH_STEP": "0"}  # its ranks could not connect
    assert step_launch_id(first) == step_launch_id(again)


def test_a_job_scripts_secret_token_wins_and_its_steps_differ():
    def secret():
        raise AssertionError("not needed")

    given = {**FIRST, "LAUNCH_TOKEN": "s"}
    tokens = [step_token({**given, "SLURM_STEP_ID": step}, secret) for step in "01"]
    tokens += [step_token({**given, "LAUNCH_TOKEN": "t"}, secret)]
    assert len({tuple(rendezvous_ports(token)) for token in tokens}) == 3
