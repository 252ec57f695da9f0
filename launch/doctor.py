"""`python -m launch doctor`: one page that tells whether this machine or allocation can train.

Alone it looks at this machine. Under `srun --ntasks-per-node=1` each task looks at its own node
and the first one shows a row a node, with what only several nodes can have wrong between them:
clocks, the shared file system, the network.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Tuple

from launch import checks
from launch.checks import FAIL, OK, WARN, Row

MAX_SKEW_SECONDS = 1.0
_SUMMARY = ("Python", "MXNet", "Horovod", "GPU")  # shown of a node without faults
_RESULTS = "doctor"  # scope of the store in which tasks leave their findings


def examine() -> int:
    """Looks at this machine, prints its page; 1 when training cannot work, else 0."""
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _examine_allocation()
    rows = [*_node_rows(), checks.host_row(), checks.slurm_row(), _local_allreduce()]
    print(page(rows))
    return exit_code(rows)


def _node_rows() -> List[Row]:
    """What every node has for itself."""
    libraries = checks.ask_libraries()
    return [
        *checks.library_rows(libraries),
        *checks.gpu_rows(libraries),
        checks.data_row(),
        checks.write_row(Path.cwd()),
    ]


def _local_allreduce() -> Row:
    probe = ["--", sys.executable, "-m", "launch.probe_allreduce"]
    local = [sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", *probe]
    return checks.allreduce_row(checks.run(local))


def exit_code(rows: List[Row]) -> int:
    return int(any(row.status == FAIL for row in rows))


def page(rows: List[Row]) -> str:
    """The rows as a table, each that is not ok with its fix, and a verdict."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.status:4}  {row.name:{width}}  {row.found}")
        if row.status != OK and row.fix:
            lines.append(f"{'':4}  {'':{width}}  fix: {row.fix}")
    red = [row.name for row in rows if row.status == FAIL]
    verdict = f"training cannot work: {', '.join(red)}" if red else "training can work here"
    return "\n".join([*lines, verdict])


# ------------------------------------------------------------------------------- an allocation


def _examine_allocation() -> int:
    """Looks at this task's node; the first task prints the page of all nodes, others return 0."""
    marker = Path.cwd() / f".launch-doctor-{os.environ['SLURM_JOB_ID']}"
    first = os.environ["SLURM_PROCID"] == "0"
    rows = _node_rows()
    try:
        if first:
            with suppress(OSError):  # told by the row on writing; the others wait for this task
                marker.touch()
        found, allreduce = _meet(rows, marker)
    finally:
        if first:
            with suppress(OSError):
                marker.unlink()
    if not first:
        return 0
    rows = [*allocation_rows(found, int(os.environ["SLURM_STEP_NUM_TASKS"])), allreduce]
    print(page(rows))
    return exit_code(rows)


def _meet(rows: List[Row], marker: Path) -> Tuple[List[Dict[str, Any]], Row]:
    """Tells the other tasks what was found here; what they found, and the allreduce between all.

    Only the first task waits for the others' findings.
    """
    from launch.slurm_rank import join

    facts, store, environment = join(start_timeout=300)
    node = {
        "host": facts.hostname,
        "rows": [vars(row) for row in rows],
        "clock": time.time(),  # comparable: all tasks leave the check-in at the same moment
        "shared": marker.exists(),
    }
    store.request("PUT", _RESULTS, str(facts.rank), json.dumps(node).encode())
    os.environ.update(environment)
    # The allreduce ends only after every task has come so far, and so after every PUT.
    allreduce = checks.run([sys.executable, "-m", "launch.probe_allreduce"])
    ranks = range(facts.world_size) if facts.rank == 0 else []
    answers = [store.request("GET", _RESULTS, str(rank)) for rank in ranks]
    found = [json.loads(body) for status, body in answers if status == 200]
    return found, checks.allreduce_row(allreduce)


def allocation_rows(nodes: List[Dict[str, Any]], world_size: int) -> List[Row]:
    """One row for each node, from what the tasks found; the first node's clock is the reference.

    Each of `nodes` has `host`, `rows` (fields of `Row`), `clock` (seconds since the epoch, taken
    at one moment on all nodes) and `shared` (whether the first node's file is seen; by none where
    it could not be written).
    """
    rows = [_node_row(node, nodes[0]) for node in nodes]
    if len(nodes) < world_size:
        missing = f"{len(nodes)} of {world_size} nodes answered"
        rows.append(Row("nodes", FAIL, missing, "look at the job's log for the others"))
    return rows


def _node_row(node: Dict[str, Any], first: Dict[str, Any]) -> Row:
    rows = [Row(**row) for row in node["rows"]]
    skew = node["clock"] - first["clock"]
    if first["shared"] and not node["shared"]:
        fix = "start from a folder that all nodes share, or set output to one"
        rows.append(Row("shared folder", WARN, f"{Path.cwd()} is not the first node's", fix))
    if abs(skew) > MAX_SKEW_SECONDS:
        fix = "run chrony or ntpd on the nodes: logs and checkpoints are told apart by time"
        rows.append(Row("clock", WARN, f"{skew:+.1f} s off", fix))
    worst = next((s for s in (FAIL, WARN) if any(row.status == s for row in rows)), OK)
    if worst == OK:
        summary = "; ".join(f"{row.name} {row.found}" for row in rows if row.name in _SUMMARY)
        return Row(node["host"], OK, f"{summary}; clock {skew:+.2f} s")
    bad = [row for row in rows if row.status != OK]
    return Row(
        node["host"],
        worst,
        "; ".join(f"{row.name}: {row.found}" for row in bad),
        "; ".join(row.fix for row in bad if row.fix),
    )
