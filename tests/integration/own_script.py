"""A user's script around ``fit``, on noise: FOLDER [STEPS]. Writes FOLDER/complete at its end."""

import os
import sys
import time
from pathlib import Path

from trainer import Config, fit  # before MXNet, so that the cores are divided
from trainer.config import Monitor, Train

import numpy as np  # isort: skip
from mxnet.gluon import nn  # isort: skip

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
draw = np.random.RandomState(0)
images, labels = draw.randint(0, 256, (40, 6, 6)).astype(np.uint8), np.arange(40) % 4


def slowly(end):
    (folder / f"step-{end.step}").touch()
    time.sleep(0.05)


config = Config(
    output=str(folder), train=Train(epochs=steps, global_batch_size=40), monitor=Monitor(loggers=())
)
cores = f"{os.environ['OMP_NUM_THREADS']} of {sorted(os.sched_getaffinity(0))}"
result = fit(nn.Dense(4), config, train=(images, labels), on_step=slowly)
(folder / "complete").write_text(f"{result.steps} {cores}")
