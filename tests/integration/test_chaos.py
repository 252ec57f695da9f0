"""Runs with faults end complete and correct, or with an error and can be resumed.

A few of the trials that `make chaos` makes in full (tests/integration/chaos.py);
test_docs_benchmarks.py makes another by the real command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict

import numpy as np
import pytest

from . import chaos, hosts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, np.ndarray]:
    """The weights of a run that nothing disturbs."""
    return chaos.straight(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    "kind",
    [
        "kill save",
        "stop step, kill step",
        "short cut",
        "kill launcher",
        "sealed damage",
        "kill leader",
    ],
)
def test_a_run_with_a_fault_ends_right_or_can_be_resumed(
    kind: str, tmp_path: Path, undisturbed: Dict[str, np.ndarray]
) -> None:
    if kind in ("short cut", "kill leader") and hosts.why_not() is not None:
        pytest.skip(str(hosts.why_not()))
    chaos.run_trial(chaos.choose(1, chaos.KINDS.index(kind)), tmp_path, undisturbed)


def test_trials_are_drawn_from_the_seed_and_cover_every_kind() -> None:
    trials = [chaos.choose(0, number) for number in range(2 * len(chaos.KINDS))]
    assert trials == [chaos.choose(0, number) for number in range(2 * len(chaos.KINDS))]
    assert trials != [chaos.choose(1, number) for number in range(2 * len(chaos.KINDS))]
    assert [trial.kind for trial in trials] == chaos.KINDS * 2
    assert {trial.ranks for trial in trials} == {2, 3, 4}
    assert len({trial.step for trial in trials}) > 10
