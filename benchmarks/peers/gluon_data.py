"""Fashion-MNIST for Gluon's DataLoader, with Gluon's own transforms."""

from __future__ import annotations

import argparse
from typing import Any, List

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon.data.vision import transforms

from benchmarks.peers import workload


class PadAndCrop(gluon.Block):
    """A random crop after padding by 2, as RandomCrop(28, padding=2) elsewhere; Gluon has none."""

    def forward(self, image: mx.nd.NDArray) -> mx.nd.NDArray:
        padded = mx.nd.array(np.pad(image.asnumpy(), ((2, 2), (2, 2), (0, 0))), dtype=np.uint8)
        return mx.image.random_crop(padded, (28, 28))[0]


def dataset(args: argparse.Namespace, split: str) -> gluon.data.Dataset:
    """(float32 (1, size, size), label) of each image; the training set augmented."""
    images, labels = workload.read(args.data, split)
    steps: List[Any] = []
    if split == "train":
        steps += [PadAndCrop(), transforms.RandomFlipLeftRight()]
    if args.size != 28:
        steps += [transforms.Resize(args.size)]
    steps += [transforms.ToTensor(), transforms.Normalize(workload.MEAN, workload.STD)]
    arrays = gluon.data.ArrayDataset(mx.nd.array(images[..., None], dtype=np.uint8), labels)
    return arrays.transform_first(transforms.Compose(steps))
