"""A mutant differs in one place, and a test that sees it kills it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import mutants

SOURCE = "def double(x):\n    return 2 * x\n"


def test_a_mutant_differs_in_one_place() -> None:
    made = mutants.mutants(SOURCE)
    assert [mutants.changed(SOURCE, mutant) for mutant in made] == [
        ("return 2 * x", "return 3 * x"),
        ("return 2 * x", "return 2 / x"),
    ]


def test_what_a_test_sees_is_killed(tmp_path: Path) -> None:
    test = tmp_path / "test_doubled.py"
    test.write_text("import doubled\n\ndef test(): assert doubled.double(4) == 8\n")
    seen = SOURCE.replace("2 * x", "2 / x")
    other = SOURCE.replace("2 * x", "x * 2")
    made = [seen, other, seen, SOURCE]
    assert sorted(mutants.surviving("doubled.py", made, [str(test)])) == sorted([other, SOURCE])
