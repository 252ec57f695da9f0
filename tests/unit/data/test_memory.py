"""Memory is bounded by the batches under way, not by the set; in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data.pictures import encoded, make_records, smooth

HEAD = """
import resource, sys
import numpy as np
from trainer.config import Data
from trainer.data import input_pipeline
from trainer.data.loader import TrainLoader
from trainer.data.pictures.decode import opencv

def loader(size, batch):
    settings = Data("records", folder=sys.argv[1], image_size=size, workers=2, prefetch=1)
    source = input_pipeline.read(settings).train
    return source, TrainLoader(source, settings, global_batch_size=batch, seed=0)

def kib(name, process="self"):
    lines = open(f"/proc/{process}/status")
    return int(next(line for line in lines if line.startswith(name)).split()[1])

opencv()
"""

# 1,200 pictures of 512 x 512 are 3.8 GB as float32 and 0.9 GB as they are decoded: three times
# the memory that is left.
UNDER_A_LIMIT = """
used = kib("VmSize") * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
source, batches = loader(512, 8)
assert sum(batch.samples for batch in batches.from_step(0, batches.steps_per_epoch)) == 1200
"""

A_DATASET = """
class Drawn:
    def __len__(self): return 1200
    def __getitem__(self, index): return np.full((512, 512, 3), index % 256, np.uint8), index % 10

settings = Data("arrays", workers=2, prefetch=1)
source = input_pipeline.read(settings, Drawn()).train
batches = TrainLoader(source, settings, global_batch_size=8, seed=0)  # its readers have started
for process in ("self", *(reader.pid for reader in source._readers._processes)):
    limit = kib("VmSize", process) * 1024 + (300 << 20)
    resource.prlimit(0 if process == "self" else process, resource.RLIMIT_AS, (limit, limit))
assert sum(batch.samples for batch in batches.from_step(0, batches.steps_per_epoch)) == 1200
"""

A_MILLION = """
before = kib("VmRSS")  # not ru_maxrss, which a process inherits from its parent
source, batches = loader(24, 32)
assert len(source) == 1_000_000
assert next(batches.from_step(0, 2)).samples == 32
grown = (kib("VmHWM") - before) / 1024
assert grown < 300, f"{grown:.0f} MiB"
"""


def make_index(folder: Path, count: int, size: int) -> None:
    """Records that are many by their index alone: it names each of ten again and again."""
    pictures = [(float(n), encoded(smooth(size, size, n), quality=60)) for n in range(10)]
    make_records(folder / "train.rec", pictures)
    offsets = [line.split("\t")[1] for line in (folder / "train.idx").read_text().splitlines()]
    lines = [f"{number}\t{offsets[number % 10]}\n" for number in range(count)]
    (folder / "train.idx").write_text("".join(lines))


@pytest.mark.parametrize(
    ("script", "count", "size"),
    [(UNDER_A_LIMIT, 1200, 512), (A_DATASET, 1, 8), (A_MILLION, 1_000_000, 32)],
    ids=["records", "dataset", "a million"],
)
def test_a_set_larger_than_memory(tmp_path, script, count, size):
    make_index(tmp_path, count, size)
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
