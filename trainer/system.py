"""What the machine of rank 0 is doing: load, memory and GPUs. Nothing here waits."""

from __future__ import annotations

import shutil
import subprocess
from typing import Dict, List, Optional

import psutil

_QUERY = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


class System:
    """Figures of this machine, read now and then."""

    def __init__(self) -> None:
        self._nvidia_smi = shutil.which("nvidia-smi")
        self._asked: Optional[subprocess.Popen] = None
        psutil.cpu_percent()  # what the next call gives is measured from here

    def read(self) -> Dict[str, float]:
        """Processor use since the last reading, load and memory; GPUs as they were then."""
        figures = {
            "processor_percent": psutil.cpu_percent(),
            "load": psutil.getloadavg()[0],  # processes at work or waiting, over one minute
            "memory_percent": psutil.virtual_memory().percent,
        }
        return {**figures, **self._gpus()}

    def _gpus(self) -> Dict[str, float]:
        """What nvidia-smi, which may take a second, has answered since it was asked last."""
        if self._nvidia_smi is None or (self._asked and self._asked.poll() is None):
            return {}
        answer = self._asked.communicate()[0] if self._asked else ""
        self._asked = subprocess.Popen(
            [self._nvidia_smi, *_QUERY],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return gpu_figures(answer.splitlines())

    def close(self) -> None:
        """Leave no process behind."""
        if self._asked:
            self._asked.kill()
            self._asked.communicate()


def gpu_figures(lines: List[str]) -> Dict[str, float]:
    """nvidia-smi's lines, ``utilisation, memory``, one for each GPU; left out where no number."""
    figures = {}
    for gpu, line in enumerate(lines):
        for name, text in zip(("percent", "memory_megabytes"), line.split(",")):
            if text.strip().isdigit():
                figures[f"gpu{gpu}_{name}"] = float(text)
    return figures
