"""A torchvision backbone, pretrained by others, exported as it is."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from service.errors import InvalidModel, InvalidRequest
from training.export import Encoder, check_out, export, square_preprocessing

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def import_backbone(name: str, weights: str, out: Path) -> None:
    """Export a torchvision classification backbone, its last layer taken off.

    Args:
        name: as in torchvision.models, such as resnet18.
        weights: DEFAULT for torchvision's own (downloaded once by torchvision), or a file with a state dict.
        out: the model folder.

    Raises:
        InvalidRequest: no such backbone, no such file, weights that do not fit or cannot be downloaded.
        InvalidModel: the export differs from torch.
        InvalidOutput: something else is at `out`.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InvalidRequest(
            f"{name}: torchvision has no such classification backbone; try resnet18, resnet50 or convnext_tiny"
        )
    check_out(out)
    side, resize, resample = 224, 256, 2
    mean, std = _IMAGENET_MEAN, _IMAGENET_STD
    source: Any = weights
    if weights == "DEFAULT":
        default = torchvision.models.get_model_weights(name).DEFAULT
        try:
            network = torchvision.models.get_model(name, weights=default)
        except Exception as error:  # urllib, ssl and sockets each raise their own
            raise InvalidRequest(
                f"{name}: torchvision cannot download its weights here: {error}; "
                "fetch the file where there is a network and name it with --weights FILE"
            ) from error
        recipe = default.transforms()
        side, resize = recipe.crop_size[0], recipe.resize_size[0]
        mean, std = tuple(recipe.mean), tuple(recipe.std)
        resample = {"bilinear": 2, "bicubic": 3}[recipe.interpolation.value]
        source = f"torchvision {default}"
    else:
        network = torchvision.models.get_model(name, weights=None)
        _load(network, Path(weights))
    _behead(network, name)
    encoder = Encoder(network, torch.tensor(mean), torch.tensor(std), 3)
    facts = {"method": "imported", "backbone": name, "data": {"source": f"whatever {source} was trained on"}}
    export(encoder, None, square_preprocessing(side, resize, resample), facts, out)
    print(f"wrote {out}")


def _load(network: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path}: no such file; --weights is DEFAULT or a file with a state dict") from error
    except Exception as error:  # torch raises nearly anything on a file of another kind
        raise InvalidRequest(f"{path}: not a state dict that torch can read safely: {type(error).__name__}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        raise InvalidRequest(
            f"{path}: does not fit the backbone: {' '.join(line.strip() for line in lines[:2])[:300]}"
        ) from error


def _behead(network: nn.Module, name: str) -> None:
    """Replace the last linear layer by nothing: its input is the embedding."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InvalidModel(f"{name}: has no linear layer at its end to take off")
    parent, _, leaf = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
