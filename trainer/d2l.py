"""The book's ``train_ch5`` on every rank, and its loaders: ``from trainer.d2l import train_ch5``.

For the notebooks of *Dive into Deep Learning* (d2lzh), with their own loaders and Gluon trainers.
``trainer.fit`` does more: each rank loads its own shard only; it saves, resumes and reports.
"""

from __future__ import annotations

import collections.abc
import contextlib
import hashlib
import time
from typing import Iterable, Iterator, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import batch_norm, dist
from .batch_norm import running_statistics
from .config import Config, Train
from .console import print_line
from .data import fashion_mnist, sharding
from .data.loader import Batch
from .model import prepare, replica, users_net
from .mxnet_internals import all_parameters, move_states, ordered_parameters, scale
from .run import agreement
from .step import shared_gradients
from .step.evaluation import evaluate
from .step.loss import cross_entropy, warn_of_second_softmax
from .step.metrics import TrainMetrics
from .step.optimizer import gluon_trainer
from .step.step import forward, train_step

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

    On one rank this calls ``d2lzh.train_ch5``. On several each takes its shard of every batch, and
    gradients are divided by ``batch_size``. With synced batch norm (``convert_sync_batch_norm``)
    the result is the book's up to rounding; plain norm's running statistics are merged.

    Args:
        train_iter, test_iter: Gluon loaders, the same on every rank. They shuffle alike, because
            NumPy's random state is copied from rank 0.
        trainer: a plain ``gluon.Trainer``, whose optimizer and states are used.
        ctx: this rank's device; of several GPUs ``mx.gpu(trainer.dist.local_rank())``.

    Raises:
        ValueError: ``ctx`` is not a single device, the trainer is of another kind, batches can be
            read only once, or the ranks' batches or weights differ, or would.
        ConfigError: the ranks' nets or devices do not go together, or a net would train wrong.
        NonFiniteError: on every rank, after an epoch with a loss or weight that is not finite.
    """
    if not isinstance(ctx, mx.Context):
        raise ValueError(
            f"ctx is {ctx}; train_ch5 takes one device, as in the book: start one rank for each "
            "(python -m launch local -n 2 -- python ...), with ctx = mx.gpu(dist.local_rank())"
        )
    if type(trainer) is not gluon.Trainer:
        raise ValueError(
            f"trainer is a {type(trainer).__name__}; give train_ch5 a plain gluon.Trainer, whose "
            "gradients it averages over ranks itself"
        )
    for name, batches in (("train_iter", train_iter), ("test_iter", test_iter)):
        if isinstance(batches, collections.abc.Iterator):
            raise ValueError(
                f"{name} can be read only once; give a DataLoader or a list of batches, which "
                "each epoch reads anew"
            )
    classes = _begin(net, test_iter, ctx)
    if dist.world_size() == 1:
        import d2lzh

        d2lzh.train_ch5(net, train_iter, test_iter, batch_size, trainer, ctx, num_epochs)
        return
    np.random.set_state(dist.broadcast_object(np.random.get_state()))
    _check_same("images", _images(train_iter))
    norm = "sync" if batch_norm.is_synced(net) else "local"
    config = Config(batch_norm=norm, train=Train(global_batch_size=batch_size))
    if dist.is_root():
        print_line(f"training on {ctx}")
    with _over_ranks(trainer, net) as distributed:
        for epoch in range(1, num_epochs + 1):
            _train_epoch(net, train_iter, test_iter, distributed, config, ctx, epoch, classes)
    replica.merge_running_statistics(net, config)
    mx.nd.waitall()


def _begin(net: gluon.Block, test_iter: Pairs, ctx: mx.Context) -> int:
    """Give all ranks the same weights; refuse what would train wrong; returns the scores' number.

    That is a net which is compiled and has wrong gradients, or keeps statistics in attributes.
    """
    dist.init()
    running_statistics.mark_imported(net)
    with dist.together():
        data, _ = next(iter(test_iter))
        image = prepare.fixed_image(data.shape[1:], ctx).astype(data.dtype)
        with prepare.taking(image):
            scores = forward(net, image)  # settles deferred shapes
            scores.wait_to_read()
        users_net.check_compiled(net, image)
        if dist.is_root():
            warn_of_second_softmax(cross_entropy, scores)
        if dist.world_size() > 1:
            prepare.check_state(net, image)
    with dist.together():
        agreement.check_devices(ctx)
        agreement.check_net(net)
    dist.broadcast_parameters(ordered_parameters(net))
    with dist.together():
        agreement.check_answers(prepare.scores(net, image))
    return int(scores.shape[1])


def _train_epoch(
    net: gluon.Block,
    train_iter: Pairs,
    test_iter: Pairs,
    trainer: gluon.Trainer,
    config: Config,
    ctx: mx.Context,
    epoch: int,
    classes: int,
) -> None:
    start, metrics = time.time(), TrainMetrics(ctx, parameters=ordered_parameters(net))
    for step, (data, label) in enumerate(train_iter):
        if step == 0:
            _check_same("labels", _digest(label))
        # The book divides by the batch size even where the last batch is smaller.
        whole = config.train.global_batch_size
        batch = _shard(data, label, ctx)._replace(global_samples=whole)
        metrics.add(step, train_step(net, trainer, batch, config), batch.samples)
    means = metrics.read_epoch()
    parted = agreement.parted(agreement.checksums(net))
    if parted is not None:
        dist.settle()
        raise ValueError(f"the ranks' weights have parted in epoch {epoch}: {parted}")
    shards = (_shard(data, label, ctx) for data, label in test_iter)
    with replica.as_one_model(net, config):
        test = evaluate(net, (shard for shard in shards if shard.samples), classes)
    if dist.is_root():
        print_line(
            f"epoch {epoch}, loss {means.loss:.4f}, train acc {means.accuracy:.3f}, "
            f"test acc {test.accuracy:.3f}, time {time.time() - start:.1f} sec"
        )


def load_data_fashion_mnist(
    batch_size: int, resize: Optional[int] = None, root: Optional[str] = None
) -> Tuple[gluon.data.DataLoader, gluon.data.DataLoader]:
    """The book's loaders of that name, without d2lzh's download from MXNet's server.

    They are of the training set, shuffled by ``np.random``, and of the test set, in global batches
    of ``batch_size``: float32 (B, 1, H, W) in 0..1, and int32 (B,). ``resize`` is the side in
    pixels, ``root`` the folder of the four IDX files; None: see ``fashion_mnist.find_or_download``.
    """
    steps = [] if resize is None else [gluon.data.vision.transforms.Resize(resize)]
    transform = gluon.data.vision.transforms.Compose(
        [*steps, gluon.data.vision.transforms.ToTensor()]
    )

    def loader(split: str, shuffle: bool) -> gluon.data.DataLoader:
        images, labels = fashion_mnist.load(split, root)
        dataset = gluon.data.ArrayDataset(mx.nd.array(images[..., None], dtype=np.uint8), labels)
        # No workers: forking a process that runs Horovod's threads is unsafe.
        return gluon.data.DataLoader(dataset.transform_first(transform), batch_size, shuffle)

    return loader("train", True), loader("test", False)


@contextlib.contextmanager
def _over_ranks(trainer: gluon.Trainer, net: gluon.Block) -> Iterator[gluon.Trainer]:
    """A distributed trainer with the same parameters and optimizer, whose states ``trainer`` keeps.

    It has the parameters in the net's own order: a plain trainer sorts them by names that may
    differ between ranks, and gradients are matched by place.
    """
    places = {id(p): place for place, p in enumerate(all_parameters(trainer))}
    parameters = [p for p in ordered_parameters(net) if id(p) in places]
    if len(parameters) < len(places):
        raise ValueError("the trainer has parameters that the net has not; make it of the net's")
    added = [p.name for p in parameters if p.grad_req == "add"]
    if added:
        raise ValueError(
            f"{', '.join(added)}: gradients are added up (grad_req is add), and train_ch5 never "
            "sets them to zero; set grad_req to write"
        )
    # The new trainer takes over this factor, which still contains the last step's batch size.
    trainer.optimizer.rescale_grad = scale(trainer)
    by_old_place = trainer.optimizer.param_dict  # the distributed trainer sets its own
    in_order = {f"{place:08d}": parameter for place, parameter in enumerate(parameters)}
    distributed = gluon_trainer(
        in_order, trainer.optimizer, forward=list(net.collect_params().values())
    )
    old = [places[id(parameter)] for parameter in parameters]
    move_states(trainer, distributed, dict(zip(old, range(len(old)))))
    try:
        yield distributed
    finally:
        move_states(distributed, trainer, dict(enumerate(old)))
        trainer.optimizer.param_dict = by_old_place
        shared_gradients.release(distributed)


def _check_same(what: str, digest: Optional[str]) -> None:
    """Refuse different batches, by a ``digest`` of the first one's images or labels.

    Their shards would skip samples and repeat others. None on any rank compares nothing.
    """
    seen = set(dist.gather_objects(digest))
    if len(seen) > 1 and None not in seen:
        dist.settle()
        raise ValueError(
            f"the ranks' loaders give different {what}; build them alike on every rank, unsharded, "
            "and let them shuffle by np.random, as gluon.data.DataLoader(shuffle=True) does"
        )


def _images(train_iter: Pairs) -> Optional[str]:
    """The digest of the first batch's images; None if they are augmented, each time anew."""
    state, seen = np.random.get_state(), set()
    for _ in range(2):
        np.random.set_state(state)
        seen.add(_digest(next(iter(train_iter))[0]))
    np.random.set_state(state)
    return seen.pop() if len(seen) == 1 else None


def _digest(array: mx.nd.NDArray) -> str:
    return hashlib.sha256(array.asnumpy().tobytes()).hexdigest()


def _shard(data: mx.nd.NDArray, label: mx.nd.NDArray, ctx: mx.Context) -> Batch:
    """This rank's shard of a batch; a placeholder sample that does not count where it is empty.

    Every rank has to run something, to take part in collectives.
    """
    own = sharding.shard(np.arange(len(label)), dist.rank(), dist.world_size())
    first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 1)
    images, labels = (array[first:last].as_in_context(ctx) for array in (data, label))
    return Batch(images, labels.astype(np.float32), len(own), len(label))
