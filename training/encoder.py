"""The torch module that is exported: pixels in, unit embeddings out."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.augment import luminance


class Encoder(nn.Module):
    """Map uint8 pixels (N, 3, S, S) to unit embeddings (N, D) float32; pixels are normalised inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, channels: int) -> None:
        """Wrap a backbone.

        Args:
            backbone: normalised pixels (N, C, S, S) to (N, D).
            mean, std: (C,), of pixels in 0..1.
            channels: C; with 1 the graph takes the luminance of its pixels.
        """
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.precision = torch.float32
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).clone())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).clone())

    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 255  # (N, 3, S, S)
        if self.channels == 1:
            values = luminance(values)  # (N, 1, S, S)
        h = self.backbone(((values - self.mean) / self.std).to(self.precision))
        return F.normalize(h.float(), dim=1)

    def in_float16(self) -> "Encoder":
        """Return a copy whose backbone computes in float16. It takes the same pixels and returns float32."""
        copy = Encoder(deepcopy(self.backbone).half(), self.mean, self.std, self.channels)
        copy.precision = torch.float16
        return copy.eval()
