"""The book's ``train_ch5`` on every rank, and its loaders: ``from trainer.d2l import train_ch5``.

For the notebooks of *Dive into Deep Learning* (d2lzh), with their own loaders and Gluon trainers.
``trainer.fit`` does more: it reads each image once rather than once a rank, saves, goes on, shows.
"""

from __future__ import annotations

import hashlib
import time
from typing import Iterable, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import batch_norm, dist, fashion_mnist, replica, sharding
from .config import Config, Train
from .loader import Batch
from .metrics import TrainMetrics
from .step import train_step

Pairs = Iterable[Tuple[mx.nd.NDArray, mx.nd.NDArray]]  # (B, C, H, W), (B,)


def train_ch5(
    net: gluon.Block,
    train_iter: Pairs,
    test_iter: Pairs,
    batch_size: int,
    trainer: gluon.Trainer,
    ctx: mx.Context,
    num_epochs: int,
) -> None:
    """Train ``net`` on all ranks as the book does on one; rank 0 prints the book's lines.

    Alone, this is ``d2lzh.train_ch5`` itself. On ranks each takes its slice of every batch, so the
    global batch is the user's and ``batch_size`` what its gradients are divided by; with synced
    batch norm (``batch_norm.convert_sync_batch_norm(net)``) the result is the book's, up to
    rounding. Plain batch norm normalizes each slice by itself; its running statistics are merged.

    Args:
        train_iter, test_iter: Gluon loaders, alike on every rank. Those that shuffle do so alike,
            as rank 0's state of NumPy's random numbers is given to all.
        trainer: a plain ``gluon.Trainer``; its optimizer and its states are used, and gradients
            are added up over ranks.
        ctx: of this rank; on a node with several GPUs ``mx.gpu(local_rank)``.

    Raises:
        ValueError: ``ctx`` is no single device, or ranks were given different batches.
        NonFiniteError: on every rank, after an epoch in which the loss or a weight was not
            finite.
    """
    if not isinstance(ctx, mx.Context):
        raise ValueError(
            f"ctx is {ctx}; train_ch5 takes one device, as in the book: start one rank for each "
            "(python -m launch local -n 2 -- python ...), with ctx = mx.gpu(local_rank)"
        )
    dist.init()
    if dist.world_size() == 1:
        import d2lzh

        d2lzh.train_ch5(net, train_iter, test_iter, batch_size, trainer, ctx, num_epochs)
        return
    np.random.set_state(dist.broadcast_object(np.random.get_state()))
    trainer = _over_ranks(trainer)
    norm = "sync" if batch_norm.is_synced(net) else "local"
    config = Config(batch_norm=norm, train=Train(global_batch_size=batch_size))
    _say(f"training on {ctx}")
    for epoch in range(1, num_epochs + 1):
        start, metrics = time.time(), TrainMetrics(ctx, parameters=net.collect_params().values())
        for step, (data, label) in enumerate(train_iter):
            if step == 0:
                _check_same(label)
            if (epoch, step) == (1, 0):
                _make_alike(net, data[:1].as_in_context(ctx))
            # The book divides by the batch size even where the last batch is smaller.
            batch = _slice(data, label, ctx)._replace(global_samples=batch_size)
            metrics.add(step, train_step(net, trainer, batch, config), batch.samples)
        means = metrics.read_epoch()
        with replica.as_one_model(net, config):
            accuracy = _accuracy(net, test_iter, ctx)
        _say(
            f"epoch {epoch}, loss {means.loss:.4f}, train acc {means.accuracy:.3f}, "
            f"test acc {accuracy:.3f}, time {time.time() - start:.1f} sec"
        )
    replica.merge_running_statistics(net, config)
    mx.nd.waitall()


def load_data_fashion_mnist(
    batch_size: int, resize: Optional[int] = None, root: Optional[str] = None
) -> Tuple[gluon.data.DataLoader, gluon.data.DataLoader]:
    """The book's loaders of that name, from files that can still be had.

    d2lzh's own downloads from a server of MXNet's that is gone where this was written.

    Args:
        batch_size: samples of a batch over all ranks.
        resize: side in pixels.
        root: folder of the four IDX files; None: see ``fashion_mnist.find_or_download``.

    Returns:
        Of the training set, shuffled by ``np.random``, and of the test set: batches of float32
        (B, 1, H, W) in 0..1, and int32 (B,).
    """
    steps = [] if resize is None else [gluon.data.vision.transforms.Resize(resize)]
    transform = gluon.data.vision.transforms.Compose(
        [*steps, gluon.data.vision.transforms.ToTensor()]
    )

    def loader(split: str, shuffle: bool) -> gluon.data.DataLoader:
        images, labels = fashion_mnist.load(split, root)
        dataset = gluon.data.ArrayDataset(mx.nd.array(images[..., None], dtype=np.uint8), labels)
        # No workers: they would be forked from a process that has threads of Horovod's.
        return gluon.data.DataLoader(dataset.transform_first(transform), batch_size, shuffle)

    return loader("train", True), loader("test", False)


def _over_ranks(trainer: gluon.Trainer) -> gluon.Trainer:
    """A trainer with the same parameters, optimizer and states that adds up over ranks."""
    if type(trainer) is not gluon.Trainer:  # the user's own distributed one
        return trainer
    # A new trainer takes over this factor, in which the last step's batch size would be left.
    trainer._optimizer.rescale_grad = trainer._scale
    in_order = {f"{index:08d}": parameter for index, parameter in enumerate(trainer._params)}
    distributed = dist.gluon_trainer(in_order, trainer._optimizer)
    distributed._updaters = trainer._updaters
    return distributed


def _check_same(label: mx.nd.NDArray) -> None:
    """Slices of different batches would leave out some samples and take others twice."""
    seen = dist.gather_objects(hashlib.sha256(label.asnumpy().tobytes()).hexdigest())
    if len(set(seen)) > 1:
        dist.shutdown()
        raise ValueError(
            "the ranks' loaders give different batches; build them alike on every rank, unsharded, "
            "and let them shuffle by np.random, as gluon.data.DataLoader(shuffle=True) does"
        )


def _make_alike(net: gluon.Block, sample: mx.nd.NDArray) -> None:
    """Settle deferred shapes, on all ranks at once, and give all of them rank 0's weights."""
    net(sample)
    dist.broadcast_parameters(net.collect_params().values())


def _slice(data: mx.nd.NDArray, label: mx.nd.NDArray, ctx: mx.Context) -> Batch:
    """This rank's part of a batch; a stand-in of one sample that counts for none where it is empty.

    Every rank has to run something, to meet its peers in their sums.
    """
    own = sharding.shard(np.arange(len(label)), dist.rank(), dist.world_size())
    first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 1)
    return Batch(
        data[first:last].as_in_context(ctx),
        label[first:last].as_in_context(ctx).astype(np.float32),
        len(own),
        len(label),
    )


def _accuracy(net: gluon.Block, pairs: Pairs, ctx: mx.Context) -> float:
    """Share of all samples that are recognised, each looked at by one rank; collective."""
    hits, count = mx.nd.zeros((1,), ctx=ctx), 0
    for data, label in pairs:
        batch = _slice(data, label, ctx)
        if batch.samples:
            hits = hits + (net(batch.data).argmax(axis=1) == batch.label).sum()
            count += batch.samples
    own = np.array([hits.asscalar(), count], np.float64)
    hits_of_all, count_of_all = dist.allreduce_sum(own, "d2l.accuracy")
    return float(hits_of_all / count_of_all)


def _say(line: str) -> None:
    if dist.is_root():
        print(line, flush=True)
