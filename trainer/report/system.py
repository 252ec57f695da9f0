"""Load, memory and GPU utilization of rank 0's machine, read without waiting.

Of GPUs by NVML, the driver's own library, and not by nvidia-smi. Before Python 3.10 a process that
starts another one forks, for which MXNet stops its engine while other threads use it.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Dict, List

import psutil

_NVML = "libnvidia-ml.so.1"


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))  # percent of the time


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))  # bytes


class System:
    """Reads metrics of this machine from time to time."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._gpus: List[ctypes.c_void_p] = []
        with contextlib.suppress(OSError, AttributeError):  # no driver, or an old one
            self._nvml = ctypes.CDLL(_NVML)
            self._nvml.nvmlInit_v2()
            count = ctypes.c_uint()
            self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            self._gpus = [ctypes.c_void_p() for _ in range(count.value)]
            for number, gpu in enumerate(self._gpus):
                self._nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(gpu))
        psutil.cpu_percent()  # starts the interval that the next call measures

    def read(self) -> Dict[str, float]:
        """CPU use since the last reading, load, memory; of each GPU what the driver tells."""
        figures = {
            "processor_percent": psutil.cpu_percent(),
            "load": psutil.getloadavg()[0],  # processes at work or waiting, over one minute
            "memory_percent": psutil.virtual_memory().percent,
        }
        for number, gpu in enumerate(self._gpus):
            used, memory = _Utilization(), _Memory()
            if not self._nvml.nvmlDeviceGetUtilizationRates(gpu, ctypes.byref(used)):
                figures[f"gpu{number}_percent"] = float(used.gpu)
            if not self._nvml.nvmlDeviceGetMemoryInfo(gpu, ctypes.byref(memory)):
                figures[f"gpu{number}_memory_megabytes"] = memory.used / 2**20
        return figures

    def close(self) -> None:
        """Leave the driver's library."""
        if self._gpus:
            self._nvml.nvmlShutdown()
        self._gpus = []
