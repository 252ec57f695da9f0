"""The seed's residual network, ResNet-18 (He et al., CVPR 2016), as HybridBlocks."""

from __future__ import annotations

from typing import Any

from mxnet.gluon import nn

from ..errors import ConfigError


class Residual(nn.HybridBlock):
    """Two 3x3 convolutions with batch norm, added to their input (He et al., CVPR 2016, figure 2).

    Same arguments as the seed's block and same parameter names as d2lzh's, so that parameter files
    of either load into the other. ``F.Activation`` is oneDNN's fast ReLU, which makes 0 of NaN.

    Args:
        num_channels: of the output.
        use_1x1conv: project the input to the output's shape with a 1x1 convolution.
        strides: of the first convolution, and of the 1x1 convolution.
    """

    def __init__(
        self, num_channels: int, use_1x1conv: bool = False, strides: int = 1, **kwargs: Any
    ):
        super().__init__(**kwargs)
        with self.name_scope():
            self.conv1 = nn.Conv2D(num_channels, kernel_size=3, padding=1, strides=strides)
            self.conv2 = nn.Conv2D(num_channels, kernel_size=3, padding=1)
            self.conv3 = (
                nn.Conv2D(num_channels, kernel_size=1, strides=strides) if use_1x1conv else None
            )
            self.bn1 = nn.BatchNorm()
            self.bn2 = nn.BatchNorm()

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """(B, C, H, W) -> (B, num_channels, H / strides, W / strides)."""
        y = F.Activation(self.bn1(self.conv1(x)), act_type="relu")
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            x = self.conv3(x)
        return F.Activation(y + x, act_type="relu")


def resnet_block(
    num_channels: int, num_residuals: int, first_block: bool = False
) -> nn.HybridSequential:
    """A stage of residual blocks; every stage but the first halves height and width."""
    stage = nn.HybridSequential()
    for index in range(num_residuals):
        halves = index == 0 and not first_block
        stage.add(Residual(num_channels, use_1x1conv=halves, strides=2 if halves else 1))
    return stage


def resnet18(num_classes: int = 10, stem: str = "seed", width: int = 64) -> nn.HybridSequential:
    """The seed's net: a stem, four stages of two residual blocks, global average pooling, Dense.

    Args:
        stem: ``seed``, 7x7/2 convolution and 3x3/2 max pooling, as the seed has it; or ``small``,
            one 3x3/1 convolution, as ``d2lzh.resnet18`` has it.
        width: channels of the stem and the first stage; each later stage has twice as many.
    """
    if stem not in ("seed", "small"):
        raise ConfigError(f"model.arguments.stem is {stem!r}; it must be seed or small")
    if not isinstance(width, int) or width < 1:
        raise ConfigError(f"model.arguments.width is {width!r}; it must be a whole number, e.g. 64")
    net = nn.HybridSequential()
    kernel, strides = (7, 2) if stem == "seed" else (3, 1)
    net.add(nn.Conv2D(width, kernel, strides, kernel // 2), nn.BatchNorm(), nn.Activation("relu"))
    if stem == "seed":
        net.add(nn.MaxPool2D(pool_size=3, strides=2, padding=1))
    for stage in range(4):
        net.add(resnet_block(width * 2**stage, 2, first_block=stage == 0))
    net.add(nn.GlobalAvgPool2D(), nn.Dense(num_classes))
    return net
