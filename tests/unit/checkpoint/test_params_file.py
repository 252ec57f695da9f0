"""Parameter files of earlier versions of MXNet, whose arrays have other headers."""

from __future__ import annotations

import struct
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from trainer.checkpoint import params_file

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
HEADERS = {
    "0.x": struct.pack("<III", 2, *VALUES.shape),
    "1.0": struct.pack("<Iiqq", 0xF993FAC8, 2, *VALUES.shape),
    "1.9": struct.pack("<Iiiqq", 0xF993FAC9, 0, 2, *VALUES.shape),
    "numpy": struct.pack("<Iiiqq", 0xF993FACA, 0, 2, *VALUES.shape),
}


def written(folder: Path, version: str) -> Path:
    path = folder / "weights.params"
    array = HEADERS[version] + struct.pack("<iii", 1, 0, 0) + VALUES.tobytes()
    names = struct.pack("<QQ", 1, 6) + b"weight"
    path.write_bytes(struct.pack("<QQQ", 0x112, 0, 1) + array + names)
    return path


@pytest.mark.parametrize("version", ["0.x", "1.0", "1.9"])
def test_what_mxnet_reads_is_read(tmp_path: Path, version: str) -> None:
    path = written(tmp_path, version)
    assert (mx.nd.load(str(path))["weight"].asnumpy() == VALUES).all()
    net = nn.Dense(2, in_units=3, use_bias=False)
    net.initialize()
    assert params_file.start_from(path, net)[0].startswith("model.weights: 1 of 1 parameters")
    assert (net.weight.data().asnumpy() == VALUES).all()
    path.write_bytes(path.read_bytes()[:-20])
    assert params_file.problem(path) is not None


def test_what_another_mxnet_reads_is_named(tmp_path: Path) -> None:
    assert "saved under npx.set_np()" in str(params_file.problem(written(tmp_path, "numpy")))


@pytest.mark.parametrize("scope", ["", "mine_"])
def test_the_names_of_an_export_need_no_prefix_in_common(tmp_path: Path, scope: str) -> None:
    """Layers made outside of a name_scope have names of their own, of which `export` makes use."""

    def made() -> nn.HybridSequential:
        net = nn.HybridSequential(prefix="outer_")
        for layer in (
            nn.Conv2D(2, 3, in_channels=1, prefix=f"{scope}conv0_"),
            nn.Dense(4, in_units=8, prefix=f"{scope}dense0_"),
        ):
            net.add(layer)
        net.initialize(mx.init.Normal(1), force_reinit=True)
        return net

    net, other = made(), made()
    net.hybridize()
    net(mx.nd.ones((1, 1, 4, 4)))
    net.export(str(tmp_path / "model"))
    told = params_file.start_from(tmp_path / "model-0000.params", other)
    assert told == [f"model.weights: 4 of 4 parameters are from {tmp_path}/model-0000.params"]
    for one, two in zip(net.collect_params().values(), other.collect_params().values()):
        np.testing.assert_array_equal(one.data().asnumpy(), two.data().asnumpy())
