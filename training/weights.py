"""Weights of backbones, and the normalisation of pixels that they were trained with."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from service.encoding import pretrained
from service.errors import InvalidRequest

LITE0 = "timm:tf_efficientnet_lite0"

State = dict[str, Tensor]

# Blocks of each stage of EfficientNet-Lite0.
_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_LITE0_PARTS = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
_LITE0_WHOLE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


class Normalisation(NamedTuple):
    """What a network subtracts from pixels in 0..1 and divides them by, for each of C channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Weights(NamedTuple):
    """A state dict, and the normalisation that its network was trained with, or None where that is not known."""

    state: State
    normalisation: Normalisation | None = None


def read_weights(name: str, origin: str) -> Weights:
    """Read the weights of a backbone.

    Args:
        name: of the backbone, as in build_backbone.
        origin: DEFAULT for torchvision's own, downloaded once; efficientnet-lite0 for those of the serving set's
            package; or a file: a state dict of torch or safetensors, or the checkpoint of a run.

    Raises:
        InvalidRequest: no network, no such file, or a file of another kind.
        InvalidModel: the package with the weights of efficientnet-lite0 is missing or damaged.
    """
    if origin == "DEFAULT":
        return _of_torchvision(name)
    if origin == pretrained.EFFICIENTNET_LITE0:
        if name != LITE0:
            raise InvalidRequest(f"{origin}: weights of the backbone {LITE0}, not of {name}")
        return _of_efficientnet_lite0()
    content = _read_file(origin)
    # The checkpoint of a run; its method has the backbone and a head for training.
    if isinstance(content, dict) and isinstance(content.get("method"), dict):
        return _of_run(name, origin, content)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidRequest(f"{origin}: not a state dict: expected tensors by name")
    return Weights(content)


def load_weights(network: nn.Module, state: State, origin: str, head: str | None = None) -> None:
    """Load a state dict.

    Args:
        network: gets the weights.
        state: from read_weights.
        origin: of the state, for messages.
        head: the path of a layer that will be removed; the state may lack it.

    Raises:
        InvalidRequest: weights are missing, too many or of another shape.
    """
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
        hint = (
            "; below 64 pixels a ResNet has a stem of its own: use a side of 64 or more"
            if "conv1.weight" in lines
            else ""
        )
        raise InvalidRequest(f"{origin}: does not fit the backbone: {lines[:300]}{hint}") from error
    missing = [key for key in found.missing_keys if not (head and key.startswith(f"{head}."))]
    if missing or found.unexpected_keys:
        wrong = f"it lacks {missing[0]}" if missing else f"it has {found.unexpected_keys[0]}, the backbone does not"
        raise InvalidRequest(f"{origin}: does not fit the backbone: {wrong}")


def _of_torchvision(name: str) -> Weights:
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state: State = dict(weights.get_state_dict(progress=True))
        transform = weights.transforms()
    # urllib, ssl and sockets each raise their own exceptions.
    except Exception as error:
        raise InvalidRequest(
            f"{name}: torchvision cannot download its weights here: {error}; "
            "fetch the file where there is a network and name it instead of DEFAULT"
        ) from error
    return Weights(state, Normalisation(tuple(transform.mean), tuple(transform.std)))


def _of_efficientnet_lite0() -> Weights:
    found = pretrained.read_state(pretrained.read_weights())
    state = {_timms_name(name): torch.from_numpy(value.copy()) for name, value in found.items()}
    mean, scale = (np.float64(number) / 255 for number in (pretrained.MEAN, 1 / pretrained.SCALE))
    return Weights(state, Normalisation((float(mean),) * 3, (float(scale),) * 3))


def _timms_name(name: str) -> str:
    """Return timm's name for a weight of EfficientNet-Lite0, as in _blocks.3._bn0.bias → blocks.2.0.bn1.bias."""
    matched = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if matched is None:
        part, kind = name.split(".")
        return f"{_LITE0_WHOLE[part]}.{kind}"
    ends = np.cumsum(_LITE0_REPEATS)
    block, part, kind = int(matched[1]), matched[2], matched[3]
    stage = int(np.searchsorted(ends, block, side="right"))
    # The first stage does not expand its channels, so its convolutions and norms have other places.
    if stage == 0:
        place = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}[part]
    else:
        place = _LITE0_PARTS.get(part) or f"bn{int(part.removeprefix('_bn')) + 1}"
    return f"blocks.{stage}.{block - (ends[stage] - _LITE0_REPEATS[stage])}.{place}.{kind}"


def _read_file(origin: str) -> Any:
    try:
        if origin.endswith(".safetensors"):
            return load_file(origin)
        return torch.load(origin, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidRequest(f"{origin}: no such file; expected DEFAULT or a file with a state dict") from error
    except SafetensorError as error:
        raise InvalidRequest(f"{origin}: not a file of safetensors: {error}") from error
    # torch raises nearly any exception on a file of another kind.
    except Exception as error:
        raise InvalidRequest(
            f"{origin}: not a state dict that torch can read safely: {type(error).__name__}"
        ) from error


def _of_run(name: str, origin: str, content: dict[str, Any]) -> Weights:
    recipe = content["identity"]["recipe"]
    # Behind the backbone of clip comes a projection, which is of no other run.
    found, prefix = recipe["backbone"], "backbone.0." if recipe.get("method") == "clip" else "backbone."
    if found != name:
        raise InvalidRequest(f"{origin}: is of a run with the backbone {found}, not {name}")
    # Where a run averages its weights, the average is its encoder.
    state = content.get("average") or {
        key.removeprefix(prefix): value for key, value in content["method"].items() if key.startswith(prefix)
    }
    mean, std = (tuple(content["statistics"][part].tolist()) for part in ("mean", "std"))
    return Weights(state, Normalisation(mean, std))
