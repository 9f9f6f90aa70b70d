"""Backbones f: normalised pixels (N, C, S, S) → (N, D). The projection head is no part of them."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from service.errors import InvalidModel, InvalidRequest

_OWN = ("small-cnn", "mid-cnn")


class Backbone(NamedTuple):
    """A network and the dimension D of its output."""

    module: nn.Module
    dimension: int


def build_backbone(name: str, channels: int, side: int, init: str | None = None) -> Backbone:
    """Build a backbone.

    Args:
        name: small-cnn, mid-cnn, or a classification backbone of torchvision.models, whose last layer is removed.
        channels: C, 1 for grey or 3 for RGB.
        side: S in pixels; below 64 a ResNet gets a stem for small pictures.
        init: DEFAULT for torchvision's own weights (ImageNet), or a file with a state dict, with or without the last
            layer, or the checkpoint of a run; None for random weights.

    Raises:
        InvalidRequest: no such backbone, or it cannot take such pictures; the weights are missing or do not fit.
    """
    if name in _OWN:
        if init == "DEFAULT":
            raise InvalidRequest(f"{name}: torchvision has no weights of it; --init DEFAULT is for its own backbones")
        module = {"small-cnn": _small_cnn, "mid-cnn": _mid_cnn}[name](channels)
        if init:
            load_weights(module, read_weights(name, init), init)
    else:
        module = build_network(name, side)
        if side < 64 and isinstance(module, torchvision.models.ResNet):
            _small_stem(module)
        state = read_weights(name, init) if init else {}
        grey = _first_channels(module, state) == 1
        if init and not grey:
            load_weights(module, state, init)
        behead(module, name)
        if channels == 1:
            _take_grey(module)
        if init and grey:
            if channels != 1:
                raise InvalidRequest(f"{init}: weights for grey pictures; this run has {channels} channels")
            load_weights(module, state, init)
    return Backbone(module, output_dimension(module, name, channels, side))


def output_dimension(module: nn.Module, name: str, channels: int, side: int) -> int:
    """Return the dimension D of a network's output; the network is in training mode afterwards.

    Raises:
        InvalidRequest: it cannot take such pictures.
    """
    try:
        with torch.inference_mode():
            found: int = module.eval()(torch.zeros(2, channels, side, side)).shape[1]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InvalidRequest(f"{name} cannot take pictures of {side}x{side}: {' '.join(str(error).split())}") from error
    module.train()
    return found


def build_network(name: str, side: int) -> nn.Module:
    """Build a torchvision classification network with random weights, last layer included.

    Raises:
        InvalidRequest: torchvision has no network of this name, or not for this side.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InvalidRequest(
            f"{name}: no such backbone; expected {', '.join(_OWN)} or a classification backbone of torchvision "
            "such as resnet18, resnet50 or convnext_tiny"
        )
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit_"):
        options["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        network: nn.Module = torchvision.models.get_model(name, **options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise InvalidRequest(f"{name} cannot take pictures of {side}x{side}: {' '.join(str(error).split())}") from error
    return network


def read_weights(name: str, origin: str) -> dict[str, Tensor]:
    """Read a state dict: torchvision's own for a backbone ("DEFAULT", downloaded once), or a file's.

    Raises:
        InvalidRequest: no network, no such file, or a file of another kind.
    """
    if origin == "DEFAULT":
        try:
            state: Any = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=True)
        # urllib, ssl and sockets each raise their own exceptions.
        except Exception as error:
            raise InvalidRequest(
                f"{name}: torchvision cannot download its weights here: {error}; "
                "fetch the file where there is a network and name it instead of DEFAULT"
            ) from error
        return dict(state)
    try:
        state = torch.load(origin, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidRequest(f"{origin}: no such file; expected DEFAULT or a file with a state dict") from error
    # torch raises nearly any exception on a file of another kind.
    except Exception as error:
        raise InvalidRequest(
            f"{origin}: not a state dict that torch can read safely: {type(error).__name__}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    # The checkpoint of a run; its method has the backbone and a head for training.
    if isinstance(state, dict) and isinstance(state.get("method"), dict):
        found, prefix = state["identity"]["recipe"]["backbone"], "backbone."
        if found != name:
            raise InvalidRequest(f"{origin}: is of a run with the backbone {found}, not {name}")
        state = {key.removeprefix(prefix): value for key, value in state["method"].items() if key.startswith(prefix)}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidRequest(f"{origin}: not a state dict: expected tensors by name")
    return state


def load_weights(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict. It may lack the last layer, which is removed anyway.

    Raises:
        InvalidRequest: weights are missing, too many or of another shape.
    """
    head = _last_linear(network)
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


def behead(network: nn.Module, name: str) -> None:
    """Replace the last linear layer by the identity: its input is the embedding.

    Raises:
        InvalidModel: the network has no linear layer.
    """
    head = _last_linear(network)
    if head is None:
        raise InvalidModel(f"{name}: has no linear layer at its end to take off")
    parent, _, leaf = head.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())


def mlp(*widths: int, norm: bool = True, last_norm: bool = True) -> nn.Module:
    """Return linear layers of these widths with ReLU between them.

    Args:
        norm: batch norm after each layer.
        last_norm: batch norm after the last layer as well, without scale and shift.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=2):
        last = number == len(widths)
        normed = norm and (last_norm or not last)
        layers.append(nn.Linear(inputs, outputs, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(outputs, affine=not last))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _first_channels(network: nn.Module, state: dict[str, Tensor]) -> int | None:
    """Return the input channels of the first convolution's weights in a state dict, or None if it has none."""
    first = next((path for path, module in network.named_modules() if isinstance(module, nn.Conv2d)), "")
    weight = state.get(f"{first}.weight")
    return None if weight is None or weight.ndim < 2 else weight.shape[1]


def _last_linear(network: nn.Module) -> str | None:
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and not isinstance(network, nn.Sequential) else None


def _block(inputs: int, outputs: int, kernel: int, stride: int = 1, pool: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
        # Pooling first leaves batch norm and ReLU a quarter of the work.
        *([nn.MaxPool2d(pool)] if pool > 1 else []),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _small_cnn(channels: int) -> nn.Module:
    """Return four convolutions for pictures of about 28 to 40 pixels; some 7 M multiply-adds at 28×28."""
    return nn.Sequential(
        *_block(channels, 32, 5, stride=2),
        *_block(32, 64, 3, pool=2),
        *_block(64, 128, 3),
        *_block(128, 256, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_block(width, width, 3), *_block(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.layers(x)
        return added


def _mid_cnn(channels: int) -> nn.Module:
    """Return seven convolutions, two residual blocks; some 75 M multiply-adds at 32×32, an hour on two CPU cores."""
    return nn.Sequential(
        *_block(channels, 64, 4, stride=2),
        *_block(64, 128, 3, pool=2),
        _Residual(128),
        *_block(128, 256, 3, pool=2),
        _Residual(256),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _small_stem(network: nn.Module) -> None:
    """Give a ResNet a 3×3 stem of stride 1 without pooling: the usual one shrinks 32 pixels to 8."""
    stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1, network.maxpool = stem, nn.Identity()


def _take_grey(network: nn.Module) -> None:
    """Give the first convolution one channel. The sum of its weights over RGB treats grey as before."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.detach().sum(1, keepdim=True))
    first.in_channels = 1
