"""Ten thousand drawn inputs, read as users' are: each must work or end in one line.

    nice -n 19 python -m benchmarks.fuzz --inputs 10000 --seed 0

Configs, IDX files, record files, checkpoints, pictures and command lines: valid ones that
Hypothesis spoils, and ones that it makes up. What happened is written to results/fuzz.json. Exits
with 1 if one ended in a traceback, which it prints, or in an error of several lines.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import click
import hypothesis
import mxnet as mx
import numpy as np
from hypothesis import strategies as st
from mxnet import recordio
from mxnet.gluon import nn
from PIL import Image

from benchmarks import report
from launch.__main__ import main as launch
from tests.bad_input import JSON, damage
from trainer import checkpoint
from trainer.cli import train
from trainer.cli.main import main as cli
from trainer.config import Config, Data, Optimizer, as_yaml, from_dict, load, to_dict
from trainer.data import fashion_mnist
from trainer.data.idx_file import BadSampleError
from trainer.data.pictures import crop
from trainer.data.pictures.decode import UnreadableError
from trainer.data.sources import records
from trainer.errors import UserError
from trainer.inference import images
from trainer.step.optimizer import make_trainer

PICTURES = Data(dataset="records", folder="x", image_size=8, channels=3)
REFUSED = (UserError, click.ClickException, BadSampleError, UnreadableError)
COMMON = (
    "train bench config summary runs compare evaluate predict export calibrate --resume none "
    "--force --json --samples --out --output -h 0 -1 auto seed=1 train.epochs=1e999 nan =x 2 "
    "optimizer.name=sdg model.factory=a:b optimizer={} data.folder= configs/quickstart.yaml "
    "local slurm slurm-rank elastic-rank -n --ranks --quiet --min-ranks 99999999999 --kill-after"
)
WORDS = st.one_of(
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=8),
    st.sampled_from(COMMON.split()),
)


class Kind(NamedTuple):
    """A kind of input: what draws one, and what reads it in an empty folder."""

    drawn: st.SearchStrategy[Any]
    read: Callable[[Any, Path], Any]


def _kinds(stock: Path) -> Dict[str, Kind]:
    """All kinds; `stock` gets the valid files that are spoiled."""
    run = _checkpoint(stock / "run")
    recorded = _records(stock / "records")
    pictures = _pictures()
    idx = [
        (fashion_mnist.SAMPLE_FOLDER / f"{name}.gz").read_bytes()
        for name in fashion_mnist.FILES["test"]
    ]
    spoiled = damage()
    settings = as_yaml(Config()).encode()
    text = st.one_of(st.binary(max_size=60), spoiled.map(lambda spoil: spoil(settings)))
    values = st.dictionaries(st.sampled_from([*to_dict(Config()), "x"]), JSON, max_size=4)
    file = st.sampled_from([checkpoint.PARAMETERS, checkpoint.OPTIMIZER, checkpoint.STATE])
    command = st.tuples(st.booleans(), st.lists(WORDS, max_size=5))
    return {
        "configs": Kind(st.one_of(text, values), _read_config),
        "IDX files": Kind(
            st.tuples(st.sampled_from([0, 1]), st.booleans(), spoiled),
            lambda drawn, folder: _read_idx(idx, *drawn, folder),
        ),
        "record files": Kind(
            st.tuples(st.booleans(), spoiled),
            lambda drawn, folder: _read_records(recorded, *drawn, folder),
        ),
        "checkpoints": Kind(
            st.tuples(file, st.booleans(), spoiled, st.tuples(st.sampled_from(_KEYS), JSON)),
            lambda drawn, folder: _read_checkpoint(run, *drawn, folder),
        ),
        "pictures": Kind(
            st.one_of(
                st.binary(max_size=60),
                st.tuples(st.sampled_from(pictures), spoiled).map(lambda two: two[1](two[0])),
            ),
            _read_picture,
        ),
        "command lines": Kind(command, _run_command),
    }


def _read_config(drawn: Any, folder: Path) -> None:
    if isinstance(drawn, dict):
        from_dict(drawn)
    else:
        (folder / "config.yaml").write_bytes(drawn)
        load(str(folder / "config.yaml"))


def _read_idx(
    files: List[bytes], place: int, inside: bool, spoil: Callable[[bytes], bytes], folder: Path
) -> None:
    for number, name in enumerate(fashion_mnist.FILES["test"]):
        content = files[number]
        if number == place:
            unpacked = gzip.decompress(content)
            content = gzip.compress(spoil(unpacked), 1) if inside else spoil(content)
        (folder / f"{name}.gz").write_bytes(content)
    fashion_mnist.load("test", str(folder), "idx")


def _records(folder: Path) -> Path:
    folder.mkdir()
    with contextlib.closing(
        recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    ) as file:
        for number, picture in enumerate(_pictures()[:3]):
            header = recordio.IRHeader(0, float(number), number, 0)
            file.write_idx(number, recordio.pack(header, picture))
    return folder


def _read_records(
    stock: Path, of_index: bool, spoil: Callable[[bytes], bytes], folder: Path
) -> None:
    for file, spoiled in (("train.rec", not of_index), ("train.idx", of_index)):
        content = (stock / file).read_bytes()
        (folder / file).write_bytes(spoil(content) if spoiled else content)
    found = records.find(replace(PICTURES, folder=str(folder)))["train"]
    found.num_classes = 3
    found.all_labels()
    found.images_digest()
    refused = None
    for index in range(len(found)):
        try:
            content, _ = found.read(index)
            crop.cut(content, PICTURES)
        except REFUSED as error:
            refused = error
    if refused is not None:
        raise refused


_KEYS = [*json.loads(checkpoint.RunState().as_json()), "x"]


def _net() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=5), nn.BatchNorm(in_channels=4), nn.Dense(3, in_units=4))
    net.initialize()
    return net


def _checkpoint(folder: Path) -> Any:
    """A net, its trainer, and a checkpoint of them after a step."""
    net = _net()
    trainer = make_trainer(net, Optimizer())
    with mx.autograd.record():
        loss = net(mx.nd.ones((2, 5))).sum()
    loss.backward()
    trainer.step(2)
    state = checkpoint.RunState(step=1, config=to_dict(Config()), accuracy=0.5)
    path = checkpoint.write(folder, checkpoint.snapshot(net, trainer, state))
    return net, trainer, path


def _read_checkpoint(
    run: Any, name: str, values: bool, spoil: Callable[[bytes], bytes], pair: Any, folder: Path
) -> None:
    net, trainer, stock = run
    path = folder / stock.name
    shutil.copytree(stock, path)
    if values:
        state = json.loads((path / checkpoint.STATE).read_text())
        state[pair[0]] = pair[1]
        (path / checkpoint.STATE).write_text(json.dumps(state))
    else:
        (path / name).write_bytes(spoil((path / name).read_bytes()))
    sums = json.loads((path / checkpoint.MANIFEST).read_text())
    for file in sums:  # or its sum alone would be refused
        sums[file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))
    checkpoint.find_best(folder)
    wrong = checkpoint.problem(path)
    if wrong is not None:
        raise UserError(wrong)
    checkpoint.restore(path, net, trainer)
    mx.nd.waitall()


def _pictures() -> List[bytes]:
    """The same small picture in every format that is read."""
    pixels = np.random.RandomState(0).randint(0, 256, (12, 10, 3), np.uint8)
    found = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"):
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, kind)
        found.append(content.getvalue())
    return found


def _read_picture(drawn: bytes, folder: Path) -> None:
    (folder / "picture.png").write_bytes(drawn)
    names = [str(folder)]
    images.read(names, (28, 28))
    images.read(names, (28, 28), pictures=PICTURES)


class StartedError(Exception):
    """The command line was good, and would have begun to train."""


def _run_command(drawn: Any, folder: Path) -> None:
    of_launch, words = drawn
    os.chdir(folder)
    try:
        # Nothing is started: before a launcher's command stands `--`, which is not among the words.
        code = launch(words) if of_launch else cli(words, standalone_mode=False)
    except (StartedError, SystemExit) as end:
        code = getattr(end, "code", 0)
    finally:
        os.chdir("/")
    if code:
        raise click.UsageError("as it says")


def _try(kind: Kind, drawn: Any) -> str:
    """What came of an input: "read", "refused", or what should not have."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(
        said
    ), contextlib.redirect_stderr(said):
        try:
            kind.read(drawn, Path(folder))
        except REFUSED as error:
            told = error.format_message() if isinstance(error, click.ClickException) else str(error)
            if told.strip() and len(told.splitlines()) == 1 and "Traceback" not in said.getvalue():
                return "refused"
            return f"{drawn!r} is refused in other than one line: {told!r} {said.getvalue()}"
        except Exception:
            return f"{drawn!r}:\n{traceback.format_exc()}"
    return "read"


def main() -> int:
    """Try all kinds; print and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before, began = report.machine(), time.monotonic()
    train.load_config = _no_start_after(train.load_config)
    figures: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as stock:
        kinds = _kinds(Path(stock))
        for name, kind in kinds.items():
            outcomes = _outcomes(kind, args.inputs // len(kinds) + 1, args.seed)
            bad = [said for said in outcomes if said not in ("read", "refused")]
            figures[name] = {
                "inputs": len(outcomes),
                "read": outcomes.count("read"),
                "refused in one line": outcomes.count("refused"),
                "tracebacks": len(bad),
            }
            print(name, figures[name], *bad[:3], sep="\n", flush=True)
    total = {
        key: sum(found[key] for found in figures.values())
        for key in ("inputs", "read", "refused in one line", "tracebacks")
    }
    seconds = round(time.monotonic() - began)
    report.write("fuzz", {**total, "seconds": seconds, "by kind": figures}, before)
    print(total)
    return int(total["tracebacks"] > 0)


def _no_start_after(load_config: Callable[..., Any]) -> Callable[..., Any]:
    """`load_config`, after which no command goes on."""

    def loaded(*arguments: Any) -> Any:
        load_config(*arguments)
        raise StartedError

    return loaded


def _outcomes(kind: Kind, count: int, seed: int) -> List[str]:
    found: List[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(kind.drawn)
    def each(drawn: Any) -> None:
        found.append(_try(kind, drawn))

    each()
    return found


if __name__ == "__main__":
    sys.exit(main())
