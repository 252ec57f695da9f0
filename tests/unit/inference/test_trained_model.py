"""A net on data other than its run's: classes by name, nothing left running, files on the CPU."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn
from PIL import Image

from trainer import config
from trainer.data.idx_file import DataError
from trainer.inference import export, trained_model
from trainer.inference.trained_model import Saved

NAMES = ["a", "bag", "c", "d", "sneaker"]
IMAGES = np.random.RandomState(0).randint(0, 256, (10, 8, 8)).astype(np.uint8)
LABELS = np.arange(10) % 5


def saved(classes=None, names=NAMES, data=(), ctx=None, **more) -> Saved:
    """A net that has not been trained."""
    net = nn.HybridSequential()
    net.add(nn.Flatten(), nn.BatchNorm(), nn.Dense(len(names)))
    ctx = ctx or mx.cpu()
    net.initialize(ctx=ctx)
    net(mx.nd.zeros((1, 1, 8, 8), ctx=ctx))
    settings = config.from_dict(
        {"data": {"workers": 1, **dict(data)}, "train": {"global_batch_size": 5}}
    )
    return Saved(Path("none"), settings, net, ctx, (8, 8), list(names), classes, **more)


class Lazily:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return IMAGES[index], LABELS[index]


def folder_of(root, *names):
    for name in names:
        (root / "test" / name).mkdir(parents=True)
        Image.fromarray(IMAGES[0]).save(root / "test" / name / "0.png")
    return {"dataset": "folder", "folder": str(root), "image_size": 8, "channels": 1}


@pytest.mark.parametrize(
    ("classes", "names", "folders", "labels"),
    [
        (None, NAMES, ("bag", "sneaker"), [1, 4]),  # IDX files, records, labels from 0
        (None, list("01234"), ("2", "4"), [2, 4]),
        ((1, 2, 3, 4), [*"1234", "score 4"], ("1", "2", "3", "4"), [0, 1, 2, 3]),
        (("x", "bag"), ["X", "BAG"], ("bag", "x"), [1, 0]),  # folders, of other shown names
    ],
)
def test_classes_of_a_folder_are_the_nets_by_name(tmp_path, classes, names, folders, labels):
    model = saved(classes, names, folder_of(tmp_path, *folders))
    assert trained_model.test_set(model).labels.tolist() == labels


def test_a_folder_of_a_class_that_the_net_has_not_is_refused(tmp_path):
    with pytest.raises(DataError, match="has a class cow, and what was trained on has not"):
        trained_model.test_set(saved(data=folder_of(tmp_path, "bag", "cow")))


def test_no_process_that_reads_a_dataset_is_left(tmp_path):
    model, before = (
        saved(),
        set(multiprocessing.active_children()),
    )  # another test may have left some
    for _ in range(2):
        trained_model.evaluate_saved(model, Lazily())
    trained_model.calibrate_saved(model, train=Lazily())
    export.export(model, Lazily(), tmp_path, onnx=False)
    with pytest.raises(DataError, match=r"has images of \(8, 8\), the net"):
        trained_model.evaluate_saved(model._replace(image_shape=(8, 8, 3)), Lazily())
    assert set(multiprocessing.active_children()) == before
    source = trained_model.test_set(model, Lazily())
    trained_model.evaluate_saved(model, source)
    assert set(multiprocessing.active_children()) != before  # what is given stays as it is
    source.close()


def test_files_are_compared_with_what_the_cpu_computes(tmp_path, monkeypatch):
    """A GPU's convolutions differ by more than the tolerance."""
    model = saved(ctx=mx.cpu(1))
    seen, forward = set(), gluon.Block.__call__
    monkeypatch.setattr(
        gluon.Block,
        "__call__",
        lambda net, x: (seen.add(getattr(x, "context", None)), forward(net, x))[1],
    )
    export.export(model, (IMAGES, LABELS), tmp_path, onnx=False)
    assert seen - {None} == {mx.cpu(0)}  # None: of symbols
    assert {p.list_ctx()[0] for p in model.net.collect_params().values()} == {mx.cpu(1)}


def test_an_earlier_export_leaves_no_file_beside_the_new_ones(tmp_path):
    (tmp_path / export.ONNX).write_bytes(b"of another net")
    export.export(saved(), (IMAGES, LABELS), tmp_path, onnx=False)
    assert not (tmp_path / export.ONNX).exists()
