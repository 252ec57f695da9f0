"""This project, with a clock in its loop: otherwise what ``python -m trainer train`` does.

horovodrun -np 2 python -m benchmarks.peers.this_project --data FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
import os
from typing import Any, Callable, Dict

from benchmarks.peers import workload
from trainer import config, dist
from trainer.dist import device, environment


def main() -> None:
    """Train, or evaluate, and write the figures."""
    args = workload.parse_args(__doc__)
    ranks = int(os.environ.get("HOROVOD_SIZE", 1))
    settings = config.from_dict(
        {
            "output": str(args.out),
            "data": {
                "pad_crop": 2,
                "flip": True,
                "image_size": args.size,
                "folder": str(args.data),
            },
            "optimizer": {"lr": workload.LEARNING_RATE, "momentum": workload.MOMENTUM},
            "schedule": {"name": "constant"},
            "train": {"global_batch_size": args.batch * ranks},
            "model": net_of(args.width),
        },
        args.settings,
    )
    device.share_cores()
    if args.evaluate:
        evaluate(args, settings)
    else:
        train(args, settings)


def net_of(width: int) -> Dict[str, Any]:
    """This project's own net is 64 wide; of another width it trains the one of its peers."""
    if width == 64:
        return {}
    return {"factory": "benchmarks.peers.seed_net:resnet18", "arguments": {"width": width}}


def train(args: argparse.Namespace, settings: config.Config) -> None:
    """A run of the project's own loop, ended when the clock has seen enough."""
    from trainer.run import loop

    loop.train_step = clocked(loop.train_step, args)
    loop.fit(config=settings, resume="none")


def clocked(train_step: Callable[..., Any], args: argparse.Namespace) -> Callable[..., Any]:
    """``train_step``, which notes its ends on a clock."""
    import mxnet as mx

    clock = workload.Clock(args, environment.rank(), environment.size())

    def step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        if clock.due():
            mx.nd.waitall()
            if clock.note():
                dist.shutdown()
                os._exit(0)
        return result

    return step


def evaluate(args: argparse.Namespace, settings: config.Config) -> None:
    """What the loop does with the test set after an epoch."""
    import mxnet as mx

    from trainer import model
    from trainer.data import fashion_mnist, input_pipeline
    from trainer.data.sources.base import ArraySource
    from trainer.model import prepare
    from trainer.step import evaluation

    dist.init()
    test = ArraySource(*fashion_mnist.load("test", settings.data.folder))
    net = model.build(settings.model)
    shape = test.filler(settings.data, seed=0, training=False).shape
    prepare.prepare_net(net, settings, shape, mx.cpu())
    with workload.timed(args, dist.rank()):
        batches = input_pipeline.test_loader(test, settings, mx.cpu())
        evaluation.evaluate(net, batches, num_classes=10)
    dist.shutdown()


if __name__ == "__main__":
    main()
