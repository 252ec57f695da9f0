"""`python -m launch doctor`: reports whether this machine or allocation can train.

Alone it checks this machine. Under srun, with a task on each node, each checks its own node, and
the first prints a row per node, including what can only be wrong between nodes: clocks, the shared
file system, the network.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ..core.process import run, say
from ..core.ranks import tasks_of_srun
from ..core.streams import LostAnswerError, answer
from . import checks
from .checks import FAIL, OK, WARN, Row

MAX_SKEW_SECONDS = 1.0
_SUMMARY = ("Python", "MXNet", "Horovod", "GPU", "cores")  # the rows shown for a healthy node
_RESULTS = "doctor"  # scope in the rendezvous store for the tasks' findings


def examine() -> int:
    """Checks this machine or allocation and prints the report; returns 1 if it cannot train."""
    if tasks_of_srun(os.environ) > 1:
        return _examine_allocation()
    local = [sys.executable, "-m", "launch", "local", "-n", "2", "--quiet", "--"]
    rows = [*_node_rows(), checks.host_row(), checks.slurm_row()]
    allreduce = run([*local, *checks.PROBE, "allreduce"], timeout=checks.PROBE_SECONDS)
    return _report([*rows, checks.allreduce_row(allreduce)])


def _report(rows: List[Row]) -> int:
    """Prints the report, whose loss is told; 1 if any check failed, else 0."""
    try:
        answer(page(rows))
    except LostAnswerError as error:
        say(str(error))
    return int(any(row.status == FAIL for row in rows))


def _node_rows() -> List[Row]:
    """The checks of a single node."""
    libraries = checks.ask_libraries()
    return [
        *checks.library_rows(libraries),
        *checks.gpu_rows(libraries),
        checks.cores_row(),
        checks.data_row(),
        checks.write_row(Path.cwd()),
    ]


def page(rows: List[Row]) -> str:
    """The report: the rows as a table, with fixes for those that are not ok, and a verdict."""
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
    """Checks this task's node; the first task prints the report on all nodes, others return 0."""
    marker = Path.cwd() / f".launch-doctor-{os.environ['SLURM_JOB_ID']}"
    first = os.environ["SLURM_PROCID"] == "0"
    rows = _node_rows()
    try:
        if first:
            with suppress(OSError):  # a finding of write_row; the other tasks wait for this one
                marker.touch()
        found, allreduce = _exchange(rows, marker)
    finally:
        if first:
            with suppress(OSError):
                marker.unlink()
    if not first:
        return 0
    tasks = tasks_of_srun(os.environ)
    return _report([*allocation_rows(found, tasks), allreduce])


def _exchange(rows: List[Row], marker: Path) -> Tuple[List[Dict[str, Any]], Row]:
    """Publishes this node's findings; returns those of all nodes and the allreduce between them.

    Only the first task gets the findings of the others.
    """
    from ..slurm.rank import join

    facts, store, environment = join(start_timeout=300)
    node = {
        "host": facts.hostname,
        "rows": [vars(row) for row in rows],
        "clock": time.time(),  # comparable, because all tasks leave join() at the same moment
        "shared": marker.exists(),
    }
    store.request("PUT", _RESULTS, str(facts.rank), json.dumps(node).encode())
    os.environ.update(environment)
    # The allreduce returns after every task has started it, and so after every PUT.
    allreduce = run([*checks.PROBE, "allreduce"], timeout=checks.PROBE_SECONDS)
    ranks = range(facts.world_size) if facts.rank == 0 else []
    answers = [store.request("GET", _RESULTS, str(rank)) for rank in ranks]
    found = [json.loads(body) for status, body in answers if status == 200]
    return found, checks.allreduce_row(allreduce, between_nodes=True)


def allocation_rows(nodes: List[Dict[str, Any]], world_size: int) -> List[Row]:
    """One row for each node, from the tasks' findings; the first node's clock is the reference.

    Each of `nodes` has `host`, `rows` (fields of `Row`), `clock` (seconds since the epoch, read at
    the same moment on all nodes) and `shared` (whether it sees the first node's file; on none if
    that could not be written).
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
