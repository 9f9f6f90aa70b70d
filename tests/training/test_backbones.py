"""Backbones and the projection head: shapes, stems, and what is trained."""

import pytest
import torch
from torch import nn

from training.backbones import build_backbone, projection_head


@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [("small-cnn", 1, 8), ("small-cnn", 3, 28), ("resnet18", 1, 8), ("resnet18", 3, 32), ("resnet18", 1, 64)],
)
def test_a_backbone_gives_its_dimension(name: str, channels: int, side: int) -> None:
    backbone = build_backbone(name, channels, side)
    with torch.inference_mode():
        embeddings = backbone.module.eval()(torch.randn(2, channels, side, side))
    assert embeddings.shape == (2, backbone.dimension)
    assert float((embeddings[0] - embeddings[1]).abs().max()) > 0


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pools"), [(32, 3, 1, False), (63, 3, 1, False), (64, 7, 2, True)]
)
def test_resnet_keeps_small_pictures_large(side: int, kernel: int, stride: int, pools: bool) -> None:
    network = build_backbone("resnet18", 3, side).module
    stem = network.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    assert stem.kernel_size == (kernel, kernel)
    assert stem.stride == (stride, stride)
    assert isinstance(network.get_submodule("maxpool"), nn.MaxPool2d) is pools


def test_the_head_is_one_hidden_layer_with_normed_outputs() -> None:
    head = projection_head(20, 12, 5)
    with torch.inference_mode():
        z = head(torch.randn(64, 20))
    assert z.shape == (64, 5)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    assert sum(isinstance(layer, nn.Linear) for layer in head.modules()) == 2
