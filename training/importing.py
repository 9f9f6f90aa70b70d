"""Export a torchvision backbone that others pretrained."""

from pathlib import Path
from typing import Any

import torch
import torchvision

from service.encoding.card import square_preprocessing
from training.backbones import behead, build_network, last_linear
from training.encoder import Encoder
from training.export import check_export, export
from training.weights import load_weights, read_weights

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def import_backbone(name: str, weights: str, out: Path) -> None:
    """Export a torchvision classification backbone without its last layer.

    Args:
        name: as in torchvision.models, such as resnet18.
        weights: DEFAULT for torchvision's own (downloaded once by torchvision), or a file with a state dict.
        out: the model folder.

    Raises:
        InvalidRequest: no such backbone or file, weights that do not fit or cannot be downloaded, or no onnxruntime.
        InvalidModel: the export differs from torch.
        InvalidOutput: `out` exists and is no model folder.
    """
    check_export(out)
    side, resize, resample = 224, 256, 2
    mean, std = _IMAGENET_MEAN, _IMAGENET_STD
    origin: Any = weights
    network = build_network(name, side)
    if weights == "DEFAULT":
        default = torchvision.models.get_model_weights(name).DEFAULT
        recipe = default.transforms()
        side, resize = recipe.crop_size[0], recipe.resize_size[0]
        mean, std = tuple(recipe.mean), tuple(recipe.std)
        resample = {"bilinear": 2, "bicubic": 3}[recipe.interpolation.value]
        origin = f"torchvision {default}"
        network = build_network(name, side)
    load_weights(network, read_weights(name, weights).state, weights, last_linear(network))
    behead(network, name)
    encoder = Encoder(network, torch.tensor(mean), torch.tensor(std), 3)
    facts = {"method": "imported", "backbone": name, "data": {"source": f"whatever {origin} was trained on"}}
    export(encoder, None, square_preprocessing(side, resize, resample), facts, out)
    print(f"wrote {out}")
