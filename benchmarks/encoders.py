"""Encoders with random weights for measuring servers; their speed does not depend on the weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.photos import photos
from service.encoding.card import CARD_FILE, square_preprocessing
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.pretrained import default_encoder
from service.encoding.variants import Pictures
from training.backbones import build_backbone
from training.encoder import Encoder
from training.export import export

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# By name: backbone, S, length of the shortest edge before the crop.
_BUILT = {
    "tiny": ("small-cnn", 32, 32),
    "resnet18": ("resnet18", 224, 256),
    "resnet50": ("resnet50", 224, 256),
}


def build(name: str, work: Path, variants: Sequence[str] = ("fp16", "int8")) -> Path:
    """Return the model folder of an encoder; run the project's export if it is missing.

    Args:
        name: "photos", the default encoder, with its own weights; "tiny", our small CNN for 32 pixels, cheap beside
            decoding; "resnet18" or "resnet50", torchvision's for 224.
        work: the parent folder.
        variants: to make beside model.onnx.

    Half of 64 crops of the benchmark's photographs calibrate the variants, the other half measures them.
    """
    if name == "photos":
        return default_encoder().absolute()
    folder = work / name
    if (folder / CARD_FILE).exists():
        return folder
    backbone, side, edge = _BUILT[name]
    torch.manual_seed(0)
    network = build_backbone(backbone, 3, side)
    encoder = Encoder(network.module, torch.tensor(_MEAN), torch.tensor(_STD), 3)
    preprocessing = square_preprocessing(side, edge, 2)
    pixels = np.stack([decode_pixels(photo, preprocessing, Limits()) for photo in photos(64)])
    pictures = Pictures(pixels[:32], pixels[32:], pixels[:0], None)
    export(
        encoder, pictures, preprocessing, {"method": "random weights", "backbone": backbone}, folder, variants=variants
    )
    return folder
