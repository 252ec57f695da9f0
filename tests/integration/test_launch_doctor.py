"""`python -m launch doctor` on this machine: real libraries, a real two-rank allreduce."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_doctor_of_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    rows = dict(re.findall(r"^(?:ok|warn|FAIL) +(\S+) +(.*)$", done.stdout, re.M))
    assert rows["MXNet"].startswith("1.9.1")
    assert "gloo" in rows["Horovod"]
    assert re.fullmatch(r"2 ranks over lo: [\d.]+ ms, [\d.]+ MB/s at 45 MB", rows["allreduce"])
    assert {"Python", "GPU", "data", "write", "TensorBoard", "Slurm", "host"} <= set(rows)
    # Green or red as the rows are: data may be out of reach where the tests run.
    assert done.returncode == int("\nFAIL" in "\n" + done.stdout)
    said = "training cannot work: " if done.returncode else "training can work here"
    assert done.stdout.splitlines()[-1].startswith(said)
