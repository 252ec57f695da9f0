"""Peer (b): the book's own loop and loader, one process: what a reader of the notebook runs.

    python -m benchmarks.peers.d2l_train_ch5 --data FOLDER --out FOLDER

``d2lzh.load_data_fashion_mnist`` and ``d2lzh.train_ch5`` as they are, with the seed's net, not
hybridized; the data set behind the loader is cut to the steps asked for, because ``train_ch5``
makes whole epochs. The book does not augment.
"""

from __future__ import annotations

from typing import Any, Iterator

import d2lzh
import mxnet as mx
import numpy as np
from mxnet import gluon

from benchmarks.peers import workload
from benchmarks.peers.seed_net import resnet18


def main() -> None:
    """Train for an epoch of the steps asked for, and write the figures."""
    args = workload.parse_args(__doc__)
    clock = workload.Clock(args, rank=0, ranks=1)
    images, labels = workload.read(args.data, "train")
    count = clock.last_step * args.batch
    whole = gluon.data.ArrayDataset(
        mx.nd.array(images[:count, :, :, None], dtype=np.uint8), labels[:count]
    )
    few = gluon.data.ArrayDataset(whole[: args.batch][0], whole[: args.batch][1])
    # Gluon's own class would download.
    gluon.data.vision.FashionMNIST = lambda root, train: whole if train else few
    train_iter, test_iter = d2lzh.load_data_fashion_mnist(
        args.batch, resize=None if args.size == 28 else args.size
    )
    net = resnet18(args.width)
    net.initialize(mx.init.Xavier())
    trainer = gluon.Trainer(
        net.collect_params(),
        "sgd",
        {"learning_rate": workload.LEARNING_RATE, "momentum": workload.MOMENTUM},
    )
    d2lzh.train_ch5(
        net, Noted(train_iter, clock), test_iter, args.batch, trainer, mx.cpu(), num_epochs=1
    )


class Noted:
    """The loader's batches; asking for the next one tells the clock that a step is over."""

    def __init__(self, batches: Any, clock: workload.Clock):
        self._batches, self._clock = batches, clock

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            if self._clock.due():
                mx.nd.waitall()
                self._clock.note()


if __name__ == "__main__":
    main()
