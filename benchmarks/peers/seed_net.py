"""The seed's net for the peers that use Gluon, its own code but for ``nn.Hybrid...`` and ``F``."""

from __future__ import annotations

from typing import Any

from mxnet.gluon import nn


class Residual(nn.HybridBlock):
    """The seed's block; its ReLU is ``nd.relu``."""

    def __init__(self, num_channels: int, use_1x1conv: bool = False, strides: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2D(num_channels, kernel_size=3, padding=1, strides=strides)
        self.conv2 = nn.Conv2D(num_channels, kernel_size=3, padding=1)
        self.conv3 = (
            nn.Conv2D(num_channels, kernel_size=1, strides=strides) if use_1x1conv else None
        )
        self.bn1 = nn.BatchNorm()
        self.bn2 = nn.BatchNorm()

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """(B, C, H, W) -> (B, num_channels, H / strides, W / strides)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            x = self.conv3(x)
        return F.relu(y + x)


def resnet18(width: int = 64) -> nn.HybridSequential:
    """For ten classes, not initialised; ``width``: channels of the first stage."""
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(width, kernel_size=7, strides=2, padding=3),
        nn.BatchNorm(),
        nn.Activation("relu"),
        nn.MaxPool2D(pool_size=3, strides=2, padding=1),
    )
    for stage in range(4):
        num_channels, halves = width * 2**stage, stage > 0
        net.add(
            Residual(num_channels, use_1x1conv=halves, strides=2 if halves else 1),
            Residual(num_channels),
        )
    net.add(nn.GlobalAvgPool2D(), nn.Dense(10))
    return net
