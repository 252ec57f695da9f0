"""What pip, a container engine and a contributor's editor are told agrees with the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Dict, List, Set

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import launch
import trainer
from benchmarks.minimal_debian import TYPED, read_stage
from launch import install
from tests.documents import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "tensorboardX": "tensorboardx",
}


def declared(key: str) -> Dict[str, Requirement]:
    """The requirements in one list of pyproject.toml, by name."""
    (block,) = re.findall(rf"^{key} = (\[.*?\]\s*)$", PYPROJECT, re.MULTILINE | re.DOTALL)
    found = [Requirement(text) for text in ast.literal_eval(block)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pinned(name: str) -> Dict[str, List[str]]:
    """The versions of each package in a requirement file, whatever their markers."""
    found: Dict[str, List[str]] = {}
    for requirement in map(Requirement, install.read_pins(name)):
        version = str(requirement.specifier)[2:]
        found.setdefault(canonicalize_name(requirement.name), []).append(version)
    return found


# -- dependencies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("dependencies", "requirements.txt"),
        ("cpu", "requirements.txt"),
        ("book", "requirements.txt"),
        ("gpu", "requirements-gpu.txt"),
        ("export", "requirements-export.txt"),
        ("dev", "requirements-dev.txt"),
    ],
)
def test_each_range_allows_what_is_pinned_and_begins_there(key: str, file: str) -> None:
    pins = pinned(file)
    for name, requirement in declared(key).items():
        assert all(version in requirement.specifier for version in pins[name]), requirement
        for bound in requirement.specifier:
            assert bound.operator != ">=" or any(
                version.startswith(bound.version) for version in pins[name]
            ), f"{requirement}: no test has run with {bound.version}"


def test_what_tests_and_lint_use_is_declared_for_them() -> None:
    text = (ROOT / "requirements-dev.txt").read_text().split("# Of the ones above")[0]
    chosen = {canonicalize_name(n) for n in re.findall(r"^([\w-]+)==", text, re.MULTILINE)}
    assert set(declared("dev")) == chosen


def test_every_package_that_the_code_imports_is_declared() -> None:
    imported: Set[str] = set()
    for path in [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(name.name.split(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").split(".")[0])
    standard = Path(sysconfig.get_path("stdlib"))
    others = {
        name
        for name in imported - {"trainer", "launch"} - set(sys.builtin_module_names)
        if not list(standard.glob(f"{name}*")) + list(standard.glob(f"lib-dynload/{name}.*"))
    }
    others -= {"IPython", "wandb", "mlflow"}  # used where they are installed
    known = {"horovod", *declared("dependencies"), *declared("cpu"), *declared("book")}
    assert {DISTRIBUTIONS.get(name, name) for name in others} - known == set(declared("export"))


@pytest.fixture
def without(tmp_path: Path):
    """The end of a command where one of the packages is not installed."""

    def run(package: str, *words: str, **variables: str) -> str:
        packages = Path(sysconfig.get_path("purelib"))
        for path in packages.iterdir():
            if path.name != package and not path.name.startswith((f"{package}-", "__editable__")):
                (tmp_path / path.name).symlink_to(path)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", **variables}
        done = subprocess.run(
            [sys.executable, "-S", "-m", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"No module named '{package}" in line
        return line

    return run


def how_to_build_horovod(line: str) -> None:
    for name, value in install.HOROVOD_BUILD.items():
        assert f" {name}={value} " in line.replace("`", " ")
    (pin,) = (pin for pin in install.read_pins("requirements.txt") if pin.startswith("horovod"))
    assert f"pip install --no-build-isolation {pin}`" in line


def test_where_horovod_is_missing_the_launcher_says_how_to_build_it(without) -> None:
    how_to_build_horovod(without("horovod", "launch", "local", "-n", "2", "--", "true"))


def test_where_horovod_is_missing_a_rank_says_how_to_build_it(without, tmp_path: Path) -> None:
    rank = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"}
    how_to_build_horovod(without("horovod", "trainer", "train", "quickstart", **rank))
    assert not (tmp_path / "runs").exists()


def test_where_mxnet_is_missing_training_says_which_there_are(without) -> None:
    line = without("mxnet", "trainer", "train", "quickstart")
    assert f"`pip install {declared('cpu')['mxnet']} '{declared('dependencies')['numpy']}'`" in line
    assert "mxnet-cu117" in line


# -- the version -----------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["trainer", "launch"])
def test_one_version(program: str) -> None:
    (version,) = re.findall(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
    assert trainer.__version__ == launch.__version__ == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version}\n" in changes
    command = [sys.executable, "-m", program, "--version"]
    assert subprocess.check_output(command, text=True) == f"gluon-horovod-trainer {version}\n"


# -- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "cuda117"])
def test_both_recipes_of_an_image_are_the_same(name: str) -> None:
    base, steps = read_stage(ROOT / "containers" / "Dockerfile", name)
    definition = (ROOT / "containers" / f"{name}.def").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^%(\w+)\n((?: .*\n|\n)*)", definition, re.MULTILINE))
    lines = {key: [line.strip() for line in text.splitlines()] for key, text in sections.items()}
    assert f"Bootstrap: docker\nFrom: {base}\n" in definition
    expected: List[str] = []
    for instruction, argument in steps:
        expected += {
            "RUN": argument.split(" && "),
            "ENV": [f"export {argument}"],
            "WORKDIR": [f"cd {argument}"],
        }.get(instruction, [])
    written = [*lines["post"], *lines["environment"], "cd /work"]
    assert [line for line in written if line] == expected
    for line in filter(None, lines["files"]):
        pattern, target = line.split()
        folder = Path("/opt/trainer", pattern).parent  # where COPY . puts it
        assert list(ROOT.glob(pattern)) and target == f"{folder}/"


def test_the_recipe_shows_the_command_that_is_tried() -> None:
    text = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
    assert f"#       {TYPED}\n" in text and f"sif {TYPED}\n" in (
        ROOT / "containers" / "cpu.def"
    ).read_text(encoding="utf-8")


def test_a_commit_is_checked_by_make_lint_and_nothing_is_fetched() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint"]
