"""Peer (a): a plain Horovod and Gluon script, as Horovod's own MXNet examples are written.

    horovodrun -np 2 python -m benchmarks.peers.horovod_gluon --data FOLDER --out FOLDER

After examples/mxnet/mxnet_mnist.py and mxnet_imagenet_resnet50.py of Horovod: every rank takes its
part of the training set and looks at the whole test set. What is better here than there: memory is
planned once (``static_alloc``), and Gluon's DataLoader has workers.
"""

from __future__ import annotations

import argparse

import horovod.mxnet as hvd
import mxnet as mx
from mxnet import autograd, gluon

from benchmarks.peers import workload
from benchmarks.peers.gluon_data import dataset
from benchmarks.peers.seed_net import resnet18


def main() -> None:
    """Train, or evaluate, and write the figures."""
    args = workload.parse_args(__doc__)
    hvd.init()
    context = mx.cpu(hvd.local_rank())
    model = resnet18(args.width)
    model.hybridize(static_alloc=True)
    model.initialize(mx.init.Xavier(), ctx=context)
    if args.evaluate:
        evaluate(args, model, context)
    else:
        train(args, model, context)
    mx.nd.waitall()
    hvd.shutdown()


def train(args: argparse.Namespace, model: gluon.HybridBlock, context: mx.Context) -> None:
    """The examples' loop."""
    data = dataset(args, "train")
    sampler = gluon.data.BatchSampler(
        SplitSampler(len(data), hvd.size(), hvd.rank()), args.batch, "discard"
    )
    batches = gluon.data.DataLoader(data, batch_sampler=sampler, num_workers=workload.WORKERS)
    params = model.collect_params()
    hvd.broadcast_parameters(params, root_rank=0)
    optimizer = mx.optimizer.create(
        "sgd", learning_rate=workload.LEARNING_RATE, momentum=workload.MOMENTUM
    )
    trainer = hvd.DistributedTrainer(params, optimizer)
    loss_fn = gluon.loss.SoftmaxCrossEntropyLoss()
    metric = mx.metric.Accuracy()
    clock = workload.Clock(args, hvd.rank(), hvd.size())
    for batch in batches:
        images, label = (array.as_in_context(context) for array in batch)
        with autograd.record():
            output = model(images)
            loss = loss_fn(output, label)
        loss.backward()
        trainer.step(args.batch)
        metric.update([label], [output])
        if clock.due():
            mx.nd.waitall()
            if clock.note():
                break


def evaluate(args: argparse.Namespace, model: gluon.HybridBlock, context: mx.Context) -> None:
    """The examples' evaluation."""
    data = dataset(args, "test")
    part = SplitSampler(len(data), hvd.size(), hvd.rank(), shuffle=False) if args.split else None
    batches = gluon.data.DataLoader(
        data, args.batch, sampler=part, last_batch="keep", num_workers=workload.WORKERS
    )
    metric = mx.metric.Accuracy()
    with workload.timed(args, hvd.rank()):
        for batch in batches:
            images, label = (array.as_in_context(context) for array in batch)
            metric.update([label], [model(images)])


class SplitSampler(gluon.data.Sampler):
    """This rank's part of the samples: what the examples' ``part_index`` is for record files."""

    def __init__(self, length: int, num_parts: int, part_index: int, shuffle: bool = True):
        self._indices = range(part_index, length, num_parts)
        self._shuffle = shuffle

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self):
        order = mx.nd.arange(len(self)).astype("int32")
        if self._shuffle:
            order = mx.nd.random.shuffle(order)
        return iter([self._indices[i] for i in order.asnumpy()])


if __name__ == "__main__":
    main()
