"""Peer (c): PyTorch's DistributedDataParallel over Gloo, as its documentation has it.

    torchrun --nproc_per_node 2 benchmarks/peers/torch_ddp.py --data FOLDER --out FOLDER

The seed's ResNet, argument for argument; a DataLoader with workers, ``channels_last`` unless told
otherwise. Runs in an environment of its own (``requirements.txt``
of ``benchmarks/``), so it imports nothing of this project but ``workload.py`` beside it.
"""

from __future__ import annotations

import argparse
from typing import Tuple

import torch
import torch.distributed as dist
import workload
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input."""

    def __init__(self, in_channels: int, channels: int, use_1x1conv: bool = False, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv3 = (
            nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride) if use_1x1conv else None
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            x = self.conv3(x)
        return functional.relu(y + x)


def resnet18(width: int) -> nn.Sequential:
    """The seed's net (trainer/model/), whose ``width`` is 64."""
    two, four, eight = 2 * width, 4 * width, 8 * width
    return nn.Sequential(
        nn.Conv2d(1, width, kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        Residual(width, width),
        Residual(width, width),
        Residual(width, two, use_1x1conv=True, stride=2),
        Residual(two, two),
        Residual(two, four, use_1x1conv=True, stride=2),
        Residual(four, four),
        Residual(four, eight, use_1x1conv=True, stride=2),
        Residual(eight, eight),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(eight, 10),
    )


class TrainingSet(Dataset):
    """Each image cropped, mirrored, resized and normalised as torchvision's transforms do it.

    Written out on tensors, which is faster than torchvision's way through PIL.
    """

    def __init__(self, args: argparse.Namespace):
        self._images, self._labels = map(torch.from_numpy, workload.read(args.data, "train"))
        self._size = args.size

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        padded = functional.pad(self._images[index], (2, 2, 2, 2))
        y, x = torch.randint(0, 5, (2,)).tolist()
        image = padded[None, y : y + 28, x : x + 28]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        image = (image / 255 - workload.MEAN) / workload.STD
        if self._size != 28:
            image = functional.interpolate(image[None], self._size, mode="bilinear")[0]
        return image, self._labels[index].long()


def main() -> None:
    """Train, and write the figures."""
    args = workload.parse_args(__doc__)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    model = DistributedDataParallel(resnet18(args.width).to(memory_format=layout))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=workload.LEARNING_RATE, momentum=workload.MOMENTUM
    )
    data = TrainingSet(args)
    batches = DataLoader(
        data,
        args.batch,
        sampler=DistributedSampler(data),
        num_workers=workload.WORKERS,
        drop_last=True,
    )
    loss_fn = nn.CrossEntropyLoss()
    clock = workload.Clock(args, dist.get_rank(), dist.get_world_size())
    for images, label in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(images.to(memory_format=layout)), label)
        loss.backward()
        optimizer.step()
        if clock.due() and clock.note():
            break
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
