"""Metrics of the machine; nvidia-smi is a stand-in, as there is no GPU here."""

from __future__ import annotations

import pytest

from tests.waiting import wait_until
from trainer.report.system import System, gpu_figures


def test_this_machine_has_load_and_memory():
    figures = System().read()
    assert set(figures) >= {"processor_percent", "load", "memory_percent"}
    assert 0 < figures["memory_percent"] < 100


@pytest.mark.parametrize(
    ("lines", "figures"),
    [
        (["87, 10240"], {"gpu0_percent": 87, "gpu0_memory_megabytes": 10240}),
        (["1, 2", "3, 4"], {"gpu1_percent": 3, "gpu1_memory_megabytes": 4}),
        (["[N/A], 500"], {"gpu0_memory_megabytes": 500}),
        (["NVIDIA-SMI has failed"], {}),
        ([], {}),
    ],
)
def test_lines_of_nvidia_smi(lines, figures):
    assert {k: v for k, v in gpu_figures(lines).items() if k in figures} == figures
    assert bool(figures) == bool(gpu_figures(lines))


def test_a_reading_does_not_wait_for_nvidia_smi(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 55, 1000; touch {asked}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    system = System()
    assert "gpu0_percent" not in system.read(), "asked, not waited for"
    wait_until(asked.exists, lambda: "nvidia-smi was not asked")
    # The process has answered, and is about to end.
    percent = wait_until(lambda: system.read().get("gpu0_percent"), lambda: "its answer is lost")
    assert percent == 55
    system.close()
