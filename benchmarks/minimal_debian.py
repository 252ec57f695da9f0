"""Builds the CPU image's contents from nothing in a minimal Debian, and trains there.

    python -m benchmarks.minimal_debian [--suite bullseye] [--test] [--keep FOLDER]

Needs no container engine, but root, debootstrap and an apt that reaches a Debian mirror. Reads the
commands of stage `cpu` from containers/Dockerfile and runs them in a chroot that holds Debian's
essential packages and nothing else; then, with an environment of HOME, PATH and TERM alone, what a
user types: `make train`, and in an empty folder the image's own programs; with --test `make test`.

`--suite` replaces the Debian release of the recipe, and so the Python: bookworm has 3.11, bullseye
3.9. The host's access to package mirrors (apt's transport options, pip.conf, certificates, proxies)
is copied into the chroot. Writes results/minimal_debian.json, an entry per suite.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "containers" / "Dockerfile"
TYPED = "gluon-launch local -n 2 -- gluon-train train quickstart"  # at the recipe's head
SEEN = ("cat /etc/debian_version", ".venv/bin/python --version", "g++ -dumpfullversion")

PLAIN = {
    "HOME": "/root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
}
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
COPIED = (
    *("/etc/pip.conf", "/etc/xdg/pip", "/etc/resolv.conf", "/etc/hosts"),
    *("/etc/ssl/certs", "/usr/local/share/ca-certificates"),
)
# In namespaces of their own: the mounts and whatever still runs end with the command.
APART = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
# The root becomes a mount point, as a container's is: without that nothing inside can be unshared.
INSIDE = """set -e
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount --rbind /sys "$0/sys"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/dev/shm"
exec chroot "$0" "$@"
"""


def read_stage(recipe: Path, name: str) -> Tuple[str, List[Tuple[str, str]]]:
    """The base image of a stage of a Dockerfile, and its further (instruction, argument) pairs.

    Raises:
        ValueError: it has no such stage, or an instruction that is not understood here.
    """
    text = re.sub(r"^#.*\n", "", recipe.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\s*\\\n\s*", " ", text)
    bases: Dict[str, str] = {}
    found: List[Tuple[str, str]] = []
    for line in filter(None, text.splitlines()):
        instruction, _, argument = line.partition(" ")
        if instruction == "FROM":
            base, _, stage = argument.partition(" AS ")
            bases[stage] = base
        elif instruction not in ("ENV", "RUN", "COPY", "WORKDIR"):
            raise ValueError(f"{recipe}: {instruction} is not understood")
        elif stage == name:
            found.append((instruction, argument))
    if not found:
        raise ValueError(f"{recipe} has no stage {name}")
    return bases[name], found


class Chroot:
    """A Debian in a folder, with the environment and the folder that a recipe has set so far."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = dict(PLAIN)
        self.folder = "/"

    def debootstrap(self, suite: str) -> Dict[str, Any]:
        """Install Debian's essential packages, and the host's ways to reach mirrors."""
        made = ["debootstrap", "--variant=minbase", suite, str(self.root), mirror()]
        figures = report.run(f"debootstrap {suite}", [*APART, *made], self.root)
        for name in filter(os.path.exists, COPIED):
            copy = shutil.copytree if os.path.isdir(name) else shutil.copy
            target = self.root / name[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            copy(name, target)
        options = subprocess.check_output(["apt-config", "dump"], text=True).splitlines()
        acquire = "\n".join(line for line in options if line.startswith("Acquire::"))
        (self.root / "etc/apt/apt.conf.d/99host").write_text(acquire + "\n")
        return figures

    def run(self, command: str) -> Dict[str, Any]:
        """Run a line of shell with the environment and the folder of now; exits if it fails."""
        given = {k: v for k, v in os.environ.items() if k.lower() in PROXIES}
        line = f"cd {self.folder} && {command}"
        words = [f"{name}={value}" for name, value in {**given, **self.environment}.items()]
        inside = ["env", "-i", *words, "sh", "-c", line]
        return report.run(command, [*APART, "sh", "-c", INSIDE, str(self.root), *inside], self.root)

    def follow(self, steps: List[Tuple[str, str]]) -> Iterator[Dict[str, Any]]:
        """Do what the recipe says; the figures of each RUN."""
        for instruction, argument in steps:
            if instruction == "RUN":
                yield self.run(argument)
            elif instruction == "ENV":
                name, value = argument.split("=", 1)
                self.environment[name] = value.replace(f"${name}", self.environment.get(name, ""))
            elif instruction == "WORKDIR":
                self.folder = argument
                (self.root / argument[1:]).mkdir(parents=True, exist_ok=True)
            else:
                self.copy_project(argument.split()[1])

    def copy_project(self, folder: str) -> None:
        """The committed files: what is left of a clone's by .dockerignore."""
        target = self.root / folder[1:]
        target.mkdir(parents=True)
        archive = subprocess.check_output(["git", "-C", str(ROOT), "archive", "HEAD"])
        subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)


def mirror() -> str:
    """The address of Debian's main archive, from the host's apt."""
    query = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)"]
    for line in subprocess.check_output(query, text=True).splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian" and "security" not in address:
            return address
    sys.exit("this host's apt knows no Debian mirror: run `apt-get update`, on Debian")


def main() -> None:
    """Build, train, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a Debian release in the place of the recipe's")
    parser.add_argument("--test", action="store_true", help="also `make test`, which takes long")
    parser.add_argument("--keep", type=Path, help="a folder for the Debian, which is left there")
    options = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap"):
        sys.exit("this needs root and debootstrap: `apt-get install debootstrap`")
    base, steps = read_stage(RECIPE, "cpu")
    suite = options.suite or re.split("[:-]", base)[1]
    before = report.machine()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        root = options.keep or Path(temporary, suite)
        root.mkdir(parents=True)
        seen = build_and_train(Chroot(root.resolve()), suite, steps, options.test)
    path = report.RESULTS / "minimal_debian.json"
    figures = json.loads(path.read_text())["figures"] if path.exists() else {}
    figures[suite] = seen
    print(report.write("minimal_debian", figures, before))


def build_and_train(
    debian: Chroot, suite: str, steps: List[Tuple[str, str]], test: bool
) -> Dict[str, Any]:
    """The figures of all commands, and the versions that were there."""
    commands = [debian.debootstrap(suite), *debian.follow(steps)]
    few = f"{TYPED} data.dataset=fashion_mnist_sample train.max_steps=20"
    commands.append(debian.run(few))  # in the folder and with the PATH that the image has
    project = next(argument.split()[1] for name, argument in steps if name == "COPY")
    user = Chroot(debian.root)
    user.folder = project
    commands += [user.run(command) for command in ("make train", "make test")[: 1 + test]]
    versions = {command: user.run(command)["last lines"][-1] for command in SEEN}
    print(report.table(("command", "seconds"), [(c["command"], c["seconds"]) for c in commands]))
    return {"versions": versions, "commands": commands}


if __name__ == "__main__":
    main()
