"""Settings that all unit tests share: one process, one thread, the same examples in every run."""

from __future__ import annotations

import os

# Before MXNet is loaded. Unit tests are one rank, whatever started pytest.
os.environ["OMP_NUM_THREADS"] = "1"
for variable in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
    os.environ.pop(variable, None)

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "project",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("project")
