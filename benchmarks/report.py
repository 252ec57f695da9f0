"""Writes the results of a benchmark with its machine, date and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

RESULTS = Path(__file__).parent / "results"
KEPT_LINES = 12  # of a command's output


def machine() -> Dict[str, Any]:
    """The hardware and versions that figures depend on."""
    import mxnet
    import numpy

    about = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in about if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpus(),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "mxnet": mxnet.__version__,
        "numpy": numpy.__version__,
    }


def _gpus() -> str:
    """The names of the GPUs from the driver; "none" without one."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    named = subprocess.run(query, stdout=subprocess.PIPE, text=True)
    return ", ".join(named.stdout.splitlines()) if named.returncode == 0 else "none"


def run(
    label: str, command: List[str], folder: Path, environment: Optional[Dict[str, str]] = None
) -> Dict[str, Any]:
    """Run a command, showing its output; its duration and last lines. Exits if it fails."""
    before, start = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    seconds = time.monotonic() - start
    if process.wait():
        sys.exit(f"{label} ended with exit code {process.returncode} after {seconds:.0f} s")
    return {
        "command": label,
        "seconds": round(seconds, 1),
        "load before": round(before, 2),
        "last lines": lines[-KEPT_LINES:],
    }


def write(name: str, figures: Any, before: Dict[str, Any]) -> Path:
    """Write ``results/NAME.json``; ``before`` is :func:`machine` from before the benchmark."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = "python -m " + ".".join(("benchmarks", Path(sys.argv[0]).stem))
    content = {
        "command": " ".join([command, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": before,
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def include(page: Path, module: str, text: str) -> None:
    """Replace the part of a document between the :func:`marks` of ``module`` by ``text``."""
    begin, end = marks(module)
    before, begun, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{page} has no {begin!r} followed by {end!r}")
    page.write_text(before + begin + text + end + after)


def marks(module: str) -> Tuple[str, str]:
    """The marks before and after the part of a document that ``python -m MODULE`` makes."""
    return f"<!-- made by python -m {module} -->\n", "\n<!-- end -->"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines: List[str] = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
