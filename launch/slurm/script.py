"""The Slurm job script: its options, the site's defaults for them, and its text.

Options that are the same for all jobs of a site are set in a small YAML file (see
configs/site-example.yaml). Apart from reading that file, nothing here does I/O.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

_NOTHING = ("", "~", "null")  # values in a site file that mean the default
_GPUS = r"(\w[\w.-]*:)?\d{1,5}", "a number, or a type and a number: a100:4"
_NUMBER = r"0*[1-9]\d{0,4}", "a number from 1 to 99999"
_TEXT = r".*\S.*", "a text on one line"
_FORMS = {  # option, or its type -> its values as a regular expression, and in words
    "gpus_per_node": _GPUS,
    "gpus_per_task": _GPUS,
    "time": (
        r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2}|UNLIMITED|infinite",
        "minutes, HH:MM:SS or D-HH:MM:SS",
    ),
    "container_runtime": ("apptainer|pyxis", "apptainer or pyxis"),
    "max_requeues": (r"\d{1,5}", "a number from 0 to 99999"),
    "int": _NUMBER,
    "Optional[int]": _NUMBER,
    "bool": ("(?i)true|false", "true or false"),
    "str": _TEXT,
    "Optional[str]": _TEXT,
    "Tuple[str, ...]": (_TEXT[0], "a list of texts on one line each"),
}


def _option(default: Any, help: str) -> Any:
    """A field that is an option of the command line too."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class JobOptions:
    """What the job asks Slurm for. Every field can be set in the site file."""

    nodes: int = _option(1, "number of nodes (default 1)")
    gpus_per_node: Union[int, str] = _option(
        0, "GPUs per node, one rank for each (or for each --gpus-per-task): 4, or a100:4"
    )
    gpus_per_task: Union[int, str, None] = _option(
        None, "GPUs that a rank alone sees, of which it uses one"
    )
    ranks_per_node: Optional[int] = _option(None, "if not one for each GPU")
    cpus_per_rank: Optional[int] = _option(None, "cores for each rank")
    mem: Optional[str] = _option(None, "memory of each node: 64G")
    constraint: Optional[str] = _option(None, "features that the nodes must have: a100&nvlink")
    exclusive: bool = _option(False, "whole nodes")
    time: Optional[str] = _option(None, "time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    partition: Optional[str] = _option(None, "by default the site's")
    account: Optional[str] = _option(None, "the one that is charged")
    qos: Optional[str] = _option(None, "quality of service")
    name: str = _option("train", "job name (default train)")
    log: str = _option("slurm-%j.log", "log file; %%j is the job's id (default slurm-%%j.log)")
    container: Optional[str] = _option(None, "image to run the ranks in, with Python and all")
    container_runtime: str = _option("apptainer", "apptainer (default) or pyxis")
    container_mounts: Tuple[str, ...] = ()  # HOST:INSIDE; the working folder is always there
    setup: Tuple[str, ...] = ()  # shell lines before srun, such as `module load cuda`
    sbatch: Tuple[str, ...] = _option(
        (), "one more #SBATCH option, after the site's: --sbatch=--dependency=afterok:7"
    )
    srun: Tuple[str, ...] = ()  # further options of srun, such as --cpu-bind=cores
    save_seconds: int = _option(60, "how long before the time limit ranks are warned (default 60)")
    straggler_seconds: int = 120  # how long ranks may run after the first has ended
    max_requeues: int = _option(10, "how often the job may requeue itself (default 10)")

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _convert(option, getattr(self, option.name)))
        if any(option.startswith("--signal") for option in self.sbatch):
            raise ValueError("sbatch: --signal is given; save_seconds is when ranks are warned")
        per_node, per_task = _count(self.gpus_per_node), _count(self.gpus_per_task)
        if per_node and per_task and self.tasks_per_node * per_task != per_node:
            raise ValueError(
                f"gpus_per_node is {self.gpus_per_node} and gpus_per_task {self.gpus_per_task}; "
                f"{self.tasks_per_node} ranks on a node take {self.tasks_per_node * per_task}"
            )

    @property
    def tasks_per_node(self) -> int:
        each = _count(self.gpus_per_task) or 1
        return self.ranks_per_node or _count(self.gpus_per_node) // each or 1


def _convert(option: Field[Any], value: Any) -> Any:
    """A value, or the text of one, as the option's type; ValueError if it is none of its values."""
    if value is None:
        return None
    kind = str(option.type)
    pattern, allowed = _FORMS.get(option.name) or _FORMS[kind]
    texts = value if "Tuple" in kind else (value,)
    if not isinstance(texts, (list, tuple)) or not all(
        isinstance(text, (str, int))
        and re.fullmatch(pattern, str(text), re.ASCII)
        and str(text).isprintable()
        for text in texts
    ):
        raise ValueError(f"{option.name}: {value!r} is given, allowed is {allowed}")
    if "Tuple" in kind:
        return tuple(texts)
    if kind == "bool":
        return str(value).lower() == "true"
    return int(value) if "int" in kind and str(value).isdigit() else value


def _count(gpus: Union[int, str, None]) -> int:
    """How many of a number, or of a type and a number."""
    return int(str(gpus or 0).split(":")[-1])


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
    known = {option.name: option for option in fields(JobOptions)}
    chosen = {}
    for key, value in site.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{path}: unknown key {key!r}; {hint}known: {', '.join(known)}")
        if value not in _NOTHING:
            try:
                chosen[key] = _convert(known[key], value)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return chosen


def job_options(site: Dict[str, Any], given: Dict[str, Any]) -> JobOptions:
    """The site's defaults, overridden by those `given` on the command line that are not None."""
    chosen = {k: v for k, v in given.items() if v is not None}
    if "sbatch" in chosen:
        chosen["sbatch"] = [*site.get("sbatch", ()), *chosen["sbatch"]]
    return JobOptions(**{**site, **chosen})


def render(
    options: JobOptions, command: Sequence[str], folder: Path, python: str, made_by: Sequence[str]
) -> str:
    """The job script that runs `command` as ranks, from `folder`.

    `python` runs the launcher on the nodes; `made_by` is the command line to quote at the top.
    Raises ValueError where one of the names would be a line of the script, or a mount of its own.
    """
    for what, name in (("the working folder", str(folder)), ("Python", python)):
        if not name.isprintable() or "\\" in name:  # in a log's name Slurm takes that for its own
            raise ValueError(
                f"{what} is {name!r}; give it a name of printable characters, and no \\"
            )
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
        "output": os.path.join(str(folder).replace("%", "%%"), options.log),
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
    # --nv also where no GPU is asked for here: the site may have its own way, such as --gres.
    return ["apptainer", "exec", "--nv", f"--bind={','.join(mounts)}", f"--pwd={folder}", image]
