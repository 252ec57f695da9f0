"""Metrics of the machine; a stand-in for the driver's library, as there is no GPU here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from trainer.report import system
from trainer.report.system import System

# Of two GPUs the second is a slice of one (MIG), for which NVML has no utilization: error 3.
NVML = """
typedef struct { unsigned gpu, memory; } Used;
typedef struct { unsigned long long total, free, used; } Memory;
static int gpus[2];
int nvmlInit_v2(void) { return FAILS; }
int nvmlDeviceGetCount_v2(unsigned *count) { return FAILS ? FAILS : (*count = 2, 0); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **gpu) { return *gpu = &gpus[i], 0; }
int nvmlDeviceGetUtilizationRates(void *gpu, Used *used) {
  return gpu == gpus ? (used->gpu = 87, used->memory = 5, 0) : 3;
}
int nvmlDeviceGetMemoryInfo(void *gpu, Memory *memory) {
  return memory->total = 1ull << 40, memory->used = gpu == gpus ? 10ull << 30 : 3ull << 20, 0;
}
int nvmlShutdown(void) { return 0; }
"""


def test_this_machine_has_load_and_memory() -> None:
    figures = System().read()
    assert set(figures) >= {"processor_percent", "load", "memory_percent"}
    assert 0 < figures["memory_percent"] < 100


@pytest.mark.parametrize(("fails", "gpus"), [(0, [87, 10240, 3]), (9, [])])
def test_gpus_are_read_from_the_driver_without_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, gpus: list
) -> None:
    """Before Python 3.10 starting one forks, beside threads that use MXNet."""
    library = tmp_path / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", f"-DFAILS={fails}", "-xc", "-", "-o", str(library)]
    subprocess.run(command, input=NVML, text=True, check=True)
    monkeypatch.setattr(system, "_NVML", str(library))
    for way in ("fork", "posix_spawn"):
        monkeypatch.delattr(os, way)
    monkeypatch.setattr(subprocess, "Popen", None)
    machine = System()
    figures = machine.read()
    names = ["gpu0_percent", "gpu0_memory_megabytes", "gpu1_memory_megabytes"]
    found = {name: value for name, value in figures.items() if name.startswith("gpu")}
    assert found == dict(zip(names, gpus))
    machine.close()
    assert not any(name.startswith("gpu") for name in machine.read())
