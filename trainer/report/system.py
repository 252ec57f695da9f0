"""Load, memory and GPU utilization of rank 0's machine, read without waiting."""

from __future__ import annotations

import shutil
import subprocess
from typing import Dict, List, Optional

import psutil

_OPTIONS = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


class System:
    """Reads metrics of this machine from time to time."""

    def __init__(self) -> None:
        self._nvidia_smi = shutil.which("nvidia-smi")
        self._query: Optional[subprocess.Popen] = None
        psutil.cpu_percent()  # starts the interval that the next call measures

    def read(self) -> Dict[str, float]:
        """CPU use since the last reading, load, memory; GPUs as of the last reading."""
        figures = {
            "processor_percent": psutil.cpu_percent(),
            "load": psutil.getloadavg()[0],  # processes at work or waiting, over one minute
            "memory_percent": psutil.virtual_memory().percent,
        }
        return {**figures, **self._gpus()}

    def _gpus(self) -> Dict[str, float]:
        """The answer of the nvidia-smi started at the last reading, as it may take a second."""
        if self._nvidia_smi is None or (self._query and self._query.poll() is None):
            return {}
        answer = self._query.communicate()[0] if self._query else ""
        self._query = subprocess.Popen(
            [self._nvidia_smi, *_OPTIONS],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return gpu_figures(answer.splitlines())

    def close(self) -> None:
        """End nvidia-smi if it is running."""
        if self._query:
            self._query.kill()
            self._query.communicate()


def gpu_figures(lines: List[str]) -> Dict[str, float]:
    """Metrics from nvidia-smi's lines, ``utilization, memory`` per GPU; non-numbers are skipped."""
    figures = {}
    for gpu, line in enumerate(lines):
        for name, text in zip(("percent", "memory_megabytes"), line.split(",")):
            if text.strip().isdigit():
                figures[f"gpu{gpu}_{name}"] = float(text)
    return figures
