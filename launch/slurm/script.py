"""The Slurm job script: its options, the site's defaults for them, and its text.

Options that are the same for all jobs of a site are set in a small YAML file (see
configs/site-example.yaml). Apart from reading that file, nothing here does I/O.
"""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

_NOTHING = ("", "~", "null")  # values in a site file that mean the default
MAX_NUMBER = 99999
CONTAINER_RUNTIMES = ("apptainer", "pyxis")
_GPUS = re.compile(r"([\w.-]+:)?\d{1,5}")
_TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2}|UNLIMITED|infinite")


def _is_line(text: str) -> bool:
    """Whether `text` is a single, non-blank line."""
    return text.isprintable() and bool(text.strip())


@dataclass(frozen=True)
class JobOptions:
    """What the job asks Slurm for. Every field can be set in the site file."""

    nodes: int = 1
    gpus_per_node: Union[int, str] = 0  # or with their type: a100:4
    gpus_per_task: Union[int, str, None] = None  # each rank sees its own, and uses the first
    ranks_per_node: Optional[int] = None  # default: one for each GPU, or one
    cpus_per_rank: Optional[int] = None
    mem: Optional[str] = None  # of each node: 64G
    constraint: Optional[str] = None  # features of the nodes: a100&nvlink
    exclusive: bool = False  # whole nodes
    time: Optional[str] = None  # D-HH:MM:SS, or minutes; default: the partition's
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    name: str = "train"
    log: str = "slurm-%j.log"  # %j is the job's id, %x its name; relative to where it is submitted
    container: Optional[str] = None  # an image that holds Python, MXNet and Horovod
    container_runtime: str = "apptainer"
    container_mounts: Tuple[str, ...] = ()  # HOST:INSIDE; the working folder is always there
    setup: Tuple[str, ...] = ()  # shell lines before srun, such as `module load cuda`
    sbatch: Tuple[str, ...] = ()  # further #SBATCH options, such as --constraint=a100
    srun: Tuple[str, ...] = ()  # further options of srun, such as --cpu-bind=cores
    save_seconds: int = 60  # how long before the time limit the ranks are warned
    straggler_seconds: int = 120  # how long ranks may run after the first has ended
    max_requeues: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("gpus_per"):
                good = value is None or _GPUS.fullmatch(str(value))
                self._check(field.name, bool(good), "a number, or a type and a number: a100:4")
            elif isinstance(value, str):
                self._check(field.name, _is_line(value), "a text on one line")
            elif isinstance(value, tuple):
                self._check(field.name, all(map(_is_line, value)), "texts on one line each")
            elif value is not None and value is not False:
                least = 0 if field.name == "max_requeues" else 1
                self._check(
                    field.name,
                    least <= value <= MAX_NUMBER,
                    f"a number from {least} to {MAX_NUMBER}",
                )
        self._check(
            "container_runtime",
            self.container_runtime in CONTAINER_RUNTIMES,
            " or ".join(CONTAINER_RUNTIMES),
        )
        valid_time = self.time is None or _TIME.fullmatch(self.time)
        self._check("time", bool(valid_time), "minutes, HH:MM:SS or D-HH:MM:SS")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name}: {getattr(self, name)!r} is given, allowed is {allowed}")

    @property
    def tasks_per_node(self) -> int:
        return self.ranks_per_node or int(str(self.gpus_per_node).split(":")[-1]) or 1


def read_site(path: Path) -> Dict[str, Any]:
    """The site's defaults for `JobOptions`; raises ValueError for unknown keys and wrong values."""
    import yaml  # imported late: login nodes may not have it

    try:
        # All values as strings: YAML 1.1 would turn the time 1:30:00 into 5400.
        site = yaml.load(path.read_text(), Loader=yaml.BaseLoader) or {}
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the site file {path}: {reason}") from None
    if not isinstance(site, dict):
        raise ValueError(f"{path}: expected `key: value` lines, as in configs/site-example.yaml")
    known = {field.name: field for field in fields(JobOptions)}
    chosen = {}
    for key, value in site.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{path}: unknown key {key!r}; {hint}known: {', '.join(known)}")
        if value not in _NOTHING:
            chosen[key] = _site_value(f"{path}: {key}", str(known[key].type), value)
    return chosen


def _site_value(name: str, kind: str, value: Any) -> Any:
    """A value of a site file converted to the field's annotated type `kind`."""
    if "Tuple" in kind:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} must be a list of texts, not {value!r}")
        return tuple(value)
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{name} must be a text on one line, not {value!r}")
    if "bool" in kind:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return value.lower() == "true"
    if "int" in kind and ("str" not in kind or value.isdigit()):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    return value


def job_options(site: Dict[str, Any], given: Dict[str, Any]) -> JobOptions:
    """The site's defaults, overridden by those `given` on the command line that are not None."""
    return replace(JobOptions(**site), **{k: v for k, v in given.items() if v is not None})


def render(
    options: JobOptions, command: Sequence[str], folder: Path, python: str, made_by: Sequence[str]
) -> str:
    """The job script that runs `command` as ranks, from `folder`.

    `python` runs the launcher on the nodes; `made_by` is the command line to quote at the top.
    Raises ValueError where one of the names would be a line of the script, or a mount of its own.
    """
    for what, name in (("the working folder", str(folder)), ("Python", python)):
        if not name.isprintable():
            raise ValueError(f"{what} is {name!r}; give it a name of printable characters alone")
    if options.container and set(":,") & set(str(folder)):
        raise ValueError(
            f"the working folder, {folder}, is mounted in the container; give it a name without : "
            "and ,"
        )
    return "\n".join(
        [
            "#!/bin/bash",
            "# Made by: " + shlex.join(made_by).replace("\n", "\\n"),
            *(f"#SBATCH {shlex.quote(o)}" for o in _sbatch_options(options, folder)),
            "",
            f"cd {shlex.quote(str(folder))} || exit 1",  # else Slurm runs it in /tmp
            *options.setup,
            "",
            "# Runs srun, names the rank that failed first; requeues the job when it was warned",
            "# (time limit, preemption) and all ranks have saved and ended with exit code 85.",
            " \\\n    ".join(_job_lines(options, command, folder, python)),
            "",
        ]
    )


def _sbatch_options(options: JobOptions, folder: Path) -> List[str]:
    wanted = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node or None,
        "gpus-per-task": options.gpus_per_task,
        "cpus-per-task": options.cpus_per_rank,
        "mem": options.mem,
        "constraint": options.constraint,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "output": folder / options.log,
        "open-mode": "append",  # a requeued job continues the same log
        "signal": f"USR1@{options.save_seconds}",  # seconds before the time limit
    }
    rendered = [f"--{name}={value}" for name, value in wanted.items() if value is not None]
    whole = ["--exclusive"] if options.exclusive else []
    return [*rendered, *whole, "--requeue", *options.sbatch]


def _job_lines(options: JobOptions, command: Sequence[str], folder: Path, python: str) -> List[str]:
    srun = ["srun", "--label", "--kill-on-bad-exit=0", f"--wait={options.straggler_seconds}"]
    if options.cpus_per_rank:
        srun.append(f"--cpus-per-task={options.cpus_per_rank}")  # srun does not take sbatch's
    srun += options.srun
    inside = python
    container: List[str] = []
    if options.container:
        inside = "python"
        container = _container_words(options, options.container, folder)
    job = [python, "-m", "launch", "slurm-job"]
    job += [f"--save-seconds={options.save_seconds}", f"--max-requeues={options.max_requeues}"]
    lines = [
        ["exec", *job, "--"],
        srun,
        *([container] if container else []),
        [inside, "-m", "launch", "slurm-rank", "--"],
        list(command),
    ]
    return [shlex.join(line) for line in lines]


def _container_words(options: JobOptions, image: str, folder: Path) -> List[str]:
    """The words between srun and the command that make it run inside `image`."""
    mounts = [f"{folder}:{folder}", *options.container_mounts]
    if options.container_runtime == "pyxis":
        return [
            f"--container-image={image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={folder}",
        ]
    nv = ["--nv"] if options.gpus_per_node or options.gpus_per_task else []
    return ["apptainer", "exec", *nv, f"--bind={','.join(mounts)}", f"--pwd={folder}", image]
