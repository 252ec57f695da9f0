"""A stand-in for a trainer: real Horovod, a counter for a model, and the contract with launch.

    python standin.py FOLDER STEPS [SECONDS_PER_STEP]

Warned by SIGTERM or SIGUSR1, all ranks stop at the same step, rank 0 saves, and each exits 85.
Rank 0 appends `step loss` of every step to FOLDER/losses.
"""

import os
import signal
import sys
import time
from pathlib import Path

WARNED = []
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda number, frame: WARNED.append(number))

import horovod.mxnet as hvd  # noqa: E402
import mxnet as mx  # noqa: E402


def total(value: float, name: str) -> float:
    """The sum of `value` over ranks."""
    return float(hvd.allreduce(mx.nd.array([value]), average=False, name=name).asscalar())


def main() -> int:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.1
    hvd.init()
    checkpoint = folder / "checkpoint"
    done, weight = 0, 0.0
    if checkpoint.exists():
        done, weight = (float(word) for word in checkpoint.read_text().split())
        done = int(done)
    if hvd.rank() == 0:
        print(f"from step {done} with {hvd.size()} ranks", flush=True)
    for step in range(done, steps):
        time.sleep(seconds)
        weight += total((step + 1) * (hvd.rank() + 1), "gradient")
        if hvd.rank() == 0:
            with open(folder / "losses", "a") as losses:
                losses.write(f"{step} {weight}\n")
        if total(len(WARNED), "warned") > 0:
            if hvd.rank() == 0:
                checkpoint.write_text(f"{step + 1} {weight}")
                print(f"saved at step {step + 1}", flush=True)
            mx.nd.waitall()
            hvd.shutdown()
            return 85
    mx.nd.waitall()
    if hvd.rank() == 0:
        print(f"done: {weight}", flush=True)
    hvd.shutdown()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
