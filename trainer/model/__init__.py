"""The net: the seed's ResNet, any other by its dotted path, and a rank's replica of it."""

from . import custom_operators  # mends MXNet's
from .factory import OWN, build
from .resnet import Residual, resnet18, resnet_block
