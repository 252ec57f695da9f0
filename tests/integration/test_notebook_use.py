"""The seed's notebook: its cells unchanged, then the package in the same process."""

from __future__ import annotations

import sys
from pathlib import Path

from .commands import run

# The seed's own definitions, unchanged: imperative Blocks with deferred shapes.
SEED = """
import d2lzh as d2l
from mxnet.gluon import nn
from mxnet import init, nd,gluon

class Residual(nn.Block):
    def __init__(self,num_channels,use_1x1conv=False,strides=1,**kwargs):
        super(Residual,self).__init__(**kwargs)
        self.conv1=nn.Conv2D(num_channels,kernel_size=3,padding=1,strides=strides)
        self.conv2=nn.Conv2D(num_channels,kernel_size=3,padding=1)
        if use_1x1conv:
            self.conv3=nn.Conv2D(num_channels,kernel_size=1,strides=strides)
        else:
            self.conv3=None
        self.bn1=nn.BatchNorm()
        self.bn2=nn.BatchNorm()

    def forward(self,X):
        Y=nd.relu(self.bn1(self.conv1(X)))
        Y=self.bn2(self.conv2(Y))
        if self.conv3:
            X=self.conv3(X)
        return nd.relu(Y+X)

net=nn.Sequential()
net.add(nn.Conv2D(64,kernel_size=7,strides=2,padding=3),
       nn.BatchNorm(),
       nn.Activation('relu'),
       nn.MaxPool2D(pool_size=3,strides=2,padding=1))

def resnet_block(num_channels,num_residuals,first_block=False):
    blk=nn.Sequential()
    for i in range(num_residuals):
        if i==0 and not first_block:
            blk.add(Residual(num_channels,use_1x1conv=True,strides=2))
        else:
            blk.add(Residual(num_channels))
    return blk

net.add(resnet_block(64,2,first_block=True),
       resnet_block(128,2),
       resnet_block(256,2),
       resnet_block(512,2))
net.add(nn.GlobalAvgPool2D(),
       nn.Dense(10))

net.initialize()
X=nd.random.uniform(shape=(1,1,224,224))
for layer in net:
    X=layer(X)
"""

OURS = """
import numpy as np
from trainer import Config, fit
from trainer.config import from_dict

before = net[0].weight.data().asnumpy()
draw = np.random.RandomState(0)
images, labels = draw.randint(0, 256, (24, 28, 28)).astype(np.uint8), draw.randint(0, 10, 24)
settings = {"output": OUTPUT, "batch_norm": "sync", "data": {"dataset": "fashion_mnist_sample"},
            "train": {"epochs": 1, "global_batch_size": 8}}
for name in ("first", "again"):
    result = fit(net, from_dict({**settings, "name": name}),
                 train=(images, labels), test=(images, labels))
    assert result.steps == 3 and result.evaluation.samples == 24
assert not np.array_equal(before, net[0].weight.data().asnumpy()), "it is trained in place"
assert net(nd.zeros((2, 1, 28, 28))).shape == (2, 10), "and still a net to call"
print("trained twice")

colours = draw.randint(0, 256, (24, 20, 16, 3)).astype(np.uint8)
small = nn.HybridSequential()
small.add(nn.Conv2D(4, kernel_size=3), nn.Dense(10))
settings["data"].update(image_size=18, pad_crop=2, flip=True, erase=0.5)
result = fit(small, from_dict({**settings, "name": "colours"}),
             train=(colours, labels), test=(colours, labels))
assert result.evaluation.samples == 24 and small[0].weight.shape == (4, 3, 3, 3)
print("trained in colour")
"""


def test_the_seeds_net_trains_where_it_was_defined(tmp_path: Path) -> None:
    code = SEED + f"OUTPUT = {str(tmp_path)!r}\n" + OURS
    done = run([sys.executable, "-c", code])
    assert done.code == 0, done.err
    assert "trained twice" in done.out and "trained in colour" in done.out
