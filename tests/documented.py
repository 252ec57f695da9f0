"""Maps the commands of README and docs to the tests that run them, scaled down.

Numbers of ranks and nodes are reduced for two cores, and placeholders are filled in; otherwise the
commands run for real. ``tests/integration/test_docs_commands.py`` and
``test_docs_benchmarks.py`` run most of them, ``test_slurm.py`` those for Slurm.
"""

from __future__ import annotations

import re
from typing import Dict, List, Sequence, Tuple

from tests.documents import DOCUMENTS, mentioned, typed

# These need GPUs, containers or an hour.
CANNOT: Dict[str, str] = {
    r"^(docker|apptainer) ": "needs an image with MXNet and Horovod, and GPUs",
    r"^make .*GPU=1": "installs MXNet for GPUs; tests/unit/launch/test_install.py has its steps",
    r"^apt-get install": "a package of the system's; `make test` installs this one where it can",
    r"^make lint": "continuous integration runs it: two minutes",
    r"benchmarks\.minimal_debian": "sets up a Debian: root, the network, minutes",
    r"benchmarks\.fresh_clone": "sets up and runs all tests: the network, a quarter of an hour",
}

# Run by dedicated tests, literally or through the code behind them.
ELSEWHERE: Dict[str, Tuple[str, ...]] = {
    r"^jupyter execute": ("test_it_runs_from_top_to_bottom_on_two_ranks",),
    r"^tensorboard ": ("test_scalars_have_each_step_once_although_the_run_was_stopped",),
    r"^python -m docs\.screenshots": (
        "test_the_pictures_of_the_docs_can_be_taken",
        "test_the_runs_on_the_pictures_can_be_made",
    ),
    r"^python -m launch doctor": ("test_doctor_of_this_machine",),
    r"^srun .*launch doctor": ("test_doctor_shows_a_row_for_each_node",),
    r"^horovodrun .*--host-discovery-script": (  # with other numbers, on hosts that come and go
        "test_elastic_horovodrun_takes_in_a_host_and_loses_rank_0",
    ),
    r"^python -m trainer average|runs/long": ("test_the_mean_of_checkpoints_is_written",),
    r"data\.folder=pets|runs/pets": ("test_fine_tuning_on_folders_as_the_page_says",),
    r"^make train CONFIG=configs/folder-example": (
        "test_the_example_of_folders_trains_when_typed",
    ),
    r'^pip install "?(\.|CLONE)': (
        "test_the_wheel_holds_all_that_is_needed_and_nothing_of_a_site",
    ),
    r"^python -m benchmarks\.chaos": ("test_make_does_what_it_says",),  # as `make chaos`
    r"^python -m trainer\.config\.table": ("test_configuration_page_is_what_the_settings_say",),
}

# Parts of a command within a sentence, and short forms of full commands.
FRAGMENT = "|".join(
    (
        r"^(mpirun|horovodrun) -np 2$",
        r"^srun --\S+$",
        r"^python -m (benchmarks\.monitor|launch (local|slurm|elastic-rank --))$",
        r"python -m trainer (train|bench)$",
    )
)

_SHORT_FORM = re.compile(r" CONFIG| FILE| RUN|INPUT\.\.\.| \.\.\. ")

KINDS: Sequence[Tuple[str, str]] = (
    ("|".join(CANNOT), "cannot"),
    ("|".join(ELSEWHERE), "elsewhere"),
    (FRAGMENT, "fragment"),
    (r"^srun |^python -m launch slurm ", "slurm"),
    (r"^make ", "make"),
    (r"^(pip|source) ", "set-up"),
    (r"benchmarks\.", "benchmark"),
    (r"^python -m trainer ", "alone"),
    (r"^(python -m launch local|horovodrun|mpirun) ", "launched"),
)

_IN_PLACE: Sequence[Tuple[str, str]] = (
    (r" \[[^]]*\]", ""),
    (r"( CONFIG| \.\.\.)$", " configs/quickstart.yaml"),
    (r" CHECKPOINT$", " runs/quickstart/checkpoints/step-00000003"),
    (r"^mpirun ", "mpirun --allow-run-as-root --oversubscribe "),
    (r"(local -n|run -np|oversubscribe -np) \d+", r"\1 2"),
    (r"--nodes 4", "--nodes 2"),
    (r"--gpus-per-node 8", "--gpus-per-node 1"),
)


def lines(kind: str) -> List[str]:
    """The command lines of a kind in all documents, each once, ready to run."""
    found: Dict[str, None] = {}
    for document in DOCUMENTS:
        in_blocks = typed(document)
        for line in mentioned(document):
            line = re.sub(r"^\.venv/bin/", "", line)
            # The programs that pip installs; tests/integration/test_wheel.py runs these themselves.
            line = line.replace("gluon-train ", "python -m trainer ")
            line = line.replace("gluon-launch ", "python -m launch ")
            short = line not in in_blocks and _SHORT_FORM.search(line)
            if ("fragment" if short else kind_of(line)) == kind:
                found[_filled_in(line)] = None
    return list(found)


def kind_of(line: str) -> str:
    """The kind of a command line, which decides which test runs it.

    Raises:
        KeyError: no test runs it.
    """
    for pattern, kind in KINDS:
        if re.search(pattern, line):
            return kind
    raise KeyError(f"no test runs {line!r}: see {__name__}")


def _filled_in(line: str) -> str:
    for pattern, text in _IN_PLACE:
        line = re.sub(pattern, text, line)
    return line
