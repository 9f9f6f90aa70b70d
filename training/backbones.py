"""Backbones f: normalised pixels (N, C, S, S) → (N, D); the projection head stands apart from them."""

from typing import NamedTuple

import torchvision
from torch import nn


class Backbone(NamedTuple):
    """A network and the number of columns D it gives."""

    module: nn.Module
    dimension: int


def build_backbone(name: str, channels: int, side: int) -> Backbone:
    """Build an untrained backbone.

    Args:
        name: "small-cnn" or "resnet18".
        channels: C, 1 for grey or 3 for RGB.
        side: S in pixels; below 64 ResNet gets the small-image stem.
    """
    if name == "small-cnn":
        return Backbone(_small_cnn(channels), 256)
    return Backbone(_resnet18(channels, side), 512)


def projection_head(dimension: int, hidden: int, output: int) -> nn.Module:
    """g: D → hidden → output, as in SimCLR: one hidden layer with ReLU, batch norm on both layers."""
    return nn.Sequential(
        nn.Linear(dimension, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, output, bias=False),
        nn.BatchNorm1d(output, affine=False),
    )


def _small_cnn(channels: int) -> nn.Module:
    """Five convolutions for pictures of about 28 to 40 pixels; some 7 M multiply-adds at 28×28."""

    def block(inputs: int, outputs: int, kernel: int, stride: int = 1, pool: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            # Pooling before batch norm and ReLU leaves them a quarter of the work.
            *([nn.MaxPool2d(pool)] if pool > 1 else []),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(channels, 32, 5, stride=2),
        *block(32, 64, 3, pool=2),
        *block(64, 128, 3),
        *block(128, 256, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _resnet18(channels: int, side: int) -> nn.Module:
    network: nn.Module = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    network.fc = nn.Identity()
    stem = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    if side < 64:  # 3×3 stride 1 and no pooling, or a 32-pixel picture is down to 8 before the first block
        stem = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = stem
    return network
