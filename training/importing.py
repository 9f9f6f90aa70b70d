"""Export a network of timm or torchvision that others pretrained, with its own preprocessing."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from timm.data.config import resolve_data_config
from torch import nn

from service.encoding.card import Preprocessing, square_preprocessing
from service.errors import InvalidRequest
from training.backbones import behead, build_network, last_linear
from training.encoder import Encoder
from training.export import check_export, export
from training.timm_networks import TIMM, build_timm_network, read_timm_weights, timm_config
from training.weights import Normalisation, load_weights, read_weights

_TORCHVISION = "torchvision:"
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Pillow's numbers of the filters, by the names of timm and torchvision.
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


class _Found(NamedTuple):
    """A network with its weights and without its last layer, its preprocessing, and what the card says of it."""

    network: nn.Module
    preprocessing: Preprocessing
    normalisation: Normalisation
    origin: str
    licence: str | None = None


def import_backbone(name: str, weights: str, out: Path) -> None:
    """Export a classification network without its last layer.

    The embedding of a network of timm is what its forward_head(pre_logits=True) returns: pooled features or the class
    token.

    Args:
        name: timm:NAME; or torchvision:NAME, as in torchvision.models, with or without the prefix.
        weights: DEFAULT for those of timm or torchvision, which download them once, or a file with a state dict.
        out: the model folder.

    Raises:
        InvalidRequest: no such network or file, weights that do not fit or cannot be downloaded, a preprocessing that
            we do not have, or no onnxruntime.
        InvalidModel: the export differs from torch.
        InvalidOutput: `out` exists and is no model folder.
    """
    check_export(out)
    plain = name.removeprefix(_TORCHVISION)
    found = _of_timm(name, weights) if name.startswith(TIMM) else _of_torchvision(plain, weights)
    mean, std = (torch.tensor(part) for part in found.normalisation)
    facts: dict[str, Any] = {"method": "imported", "backbone": plain}
    facts |= {"data": {"source": f"the training data of {found.origin}"}}
    if found.licence:
        facts["licence"] = found.licence
    export(Encoder(found.network, mean, std, 3), None, found.preprocessing, facts, out)
    print(f"wrote {out}")


def _of_timm(name: str, weights: str) -> _Found:
    known = timm_config(name)
    config: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
        pretrained_cfg=known.to_dict()
    )
    _, height, width = config["input_size"]
    if height != width or config["crop_mode"] == "border" or config["interpolation"] not in _FILTERS:
        raise InvalidRequest(
            f"{name}: wants pictures of {width}x{height}, cropped by {config['crop_mode']!r} and resized by "
            f"{config['interpolation']!r}; expected a square and a filter of Pillow"
        )
    network = build_timm_network(name, width)
    state, _ = read_timm_weights(name, width, weights)
    load_weights(network, state, weights)
    resize, resample = math.floor(width / config["crop_pct"]), _FILTERS[config["interpolation"]]
    preprocessing = square_preprocessing(width, resize, resample, squash=config["crop_mode"] == "squash")
    own = Normalisation(tuple(config["mean"]), tuple(config["std"]))
    origin = weights if weights != "DEFAULT" else f"timm's weights of {name.removeprefix(TIMM)}"
    return _Found(network, preprocessing, own, origin, known.license if weights == "DEFAULT" else None)


def _of_torchvision(name: str, weights: str) -> _Found:
    side, resize, resample, normalisation, origin = 224, 256, 2, _IMAGENET, weights
    network = build_network(name, side)
    state = read_weights(name, weights).state
    if weights == "DEFAULT":
        default = torchvision.models.get_model_weights(name).DEFAULT
        transform = default.transforms()
        side, resize = transform.crop_size[0], transform.resize_size[0]
        resample = _FILTERS[transform.interpolation.value]
        normalisation, origin = Normalisation(tuple(transform.mean), tuple(transform.std)), f"torchvision {default}"
        network = build_network(name, side)
    load_weights(network, state, weights, last_linear(network))
    behead(network, name)
    return _Found(network, square_preprocessing(side, resize, resample), normalisation, origin)
