"""Backbones f: normalised pixels (N, C, S, S) → (N, D). The projection head is no part of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.errors import InvalidModel, InvalidRequest
from training.timm_networks import TIMM, build_timm_network, read_timm_weights
from training.weights import Normalisation, State, Weights, load_weights, read_weights

_OWN = ("small-cnn", "mid-cnn")


class Backbone(NamedTuple):
    """A network and the dimension D of its output.

    Attributes:
        module: the network.
        dimension: D.
        normalisation: of the pixels that its weights were trained with; None for random weights, and where it is not
            known.
    """

    module: nn.Module
    dimension: int
    normalisation: Normalisation | None = None


def build_backbone(
    name: str,
    channels: int,
    side: int,
    init: str | None = None,
    frozen: Sequence[str] = (),
    frozen_statistics: bool = False,
) -> Backbone:
    """Build a backbone.

    Args:
        name: small-cnn, mid-cnn; a classification backbone of torchvision.models, whose last layer is removed; or
            timm:NAME, whose output is timm's pooled features.
        channels: C, 1 for grey or 3 for RGB.
        side: S in pixels; below 64 a ResNet of torchvision gets a stem for small pictures.
        init: DEFAULT for the own weights of torchvision or timm; efficientnet-lite0 for those of the serving set's
            package; a file with a state dict, with or without the last layer; the checkpoint of a run; or None for
            random weights.
        frozen: paths of modules and parameters that do not learn, as in conv_stem or blocks.0.
        frozen_statistics: batch norms stay in eval mode; their scales and shifts learn.

    Raises:
        InvalidRequest: no such backbone or path, or it cannot take such pictures; the weights are missing or do not
            fit.
        InvalidModel: the package with the weights of efficientnet-lite0 is missing or damaged.
    """
    if name in _OWN:
        if init == "DEFAULT":
            raise InvalidRequest(f"{name}: torchvision has no weights of it; --init DEFAULT is for its own backbones")
        module = {"small-cnn": _small_cnn, "mid-cnn": _mid_cnn}[name](channels)
        weights = read_weights(name, init) if init else None
        if init and weights:
            load_weights(module, weights.state, init)
    else:
        module, weights = _build_pretrained(name, channels, side, init)
    dimension = output_dimension(module, name, channels, side)
    for path in dict.fromkeys(frozen):
        freeze(module, path)
    if frozen_statistics:
        for part in list(module.modules()):
            if isinstance(part, _BatchNorm) and not isinstance(part, Frozen):
                mix_in(part, Frozen)
    return Backbone(module.train(), dimension, weights.normalisation if weights else None)


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


def _build_pretrained(name: str, channels: int, side: int, init: str | None) -> tuple[nn.Module, Weights | None]:
    """Return a network of torchvision or timm without its last layer, with the weights that were read for it, if any.

    Weights for grey pictures fit a network that takes them already; others become so with the network.
    """
    of_timm, weights = name.startswith(TIMM), None
    module = build_timm_network(name, side) if of_timm else build_network(name, side)
    if init:
        weights = read_timm_weights(name, side, init) if of_timm else read_weights(name, init)
    if side < 64 and isinstance(module, torchvision.models.ResNet):
        _small_stem(module)
    head = None if of_timm else last_linear(module)
    grey = weights is not None and _first_channels(module, weights.state) == 1
    if grey and channels != 1:
        raise InvalidRequest(f"{init}: weights for grey pictures; this run has {channels} channels")
    if init and weights and not grey:
        load_weights(module, weights.state, init, head)
    if not of_timm:
        behead(module, name)
    if channels == 1:
        _take_grey(module)
    if init and weights and grey:
        load_weights(module, weights.state, init)
    return module, weights


class Frozen(nn.Module):
    """A module that stays in eval mode: its batch norms keep their statistics, its dropout is off."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Set eval mode, whatever the mode of the network that it is part of."""
        return super().train(False)


def freeze(network: nn.Module, path: str) -> None:
    """Keep the module or parameter at a path of a network as it is: no gradient, and eval mode for good.

    Raises:
        InvalidRequest: the network has neither at this path.
    """
    parameters = dict(network.named_parameters())
    if path in parameters:
        parameters[path].requires_grad_(False)
        return
    modules = dict(network.named_modules())
    if not path or path not in modules:
        known = ", ".join(name for name, _ in network.named_children())
        raise InvalidRequest(f"frozen: {path!r}: the backbone has no such part; expected paths in one of: {known}")
    mix_in(modules[path].requires_grad_(False), Frozen)


def mix_in(module: nn.Module, kind: type[nn.Module]) -> None:
    """Put a class in front of a module's own, in place: its methods take precedence."""
    own = type(module)
    module.__class__ = type(f"{kind.__name__}{own.__name__}", (kind, own), {})


def build_network(name: str, side: int) -> nn.Module:
    """Build a torchvision classification network with random weights, last layer included.

    Raises:
        InvalidRequest: torchvision has no network of this name, or not for this side.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InvalidRequest(
            f"{name}: no such backbone; expected {', '.join(_OWN)} or a classification backbone of torchvision "
            "such as resnet18, resnet50 or convnext_tiny, or timm:NAME"
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


def behead(network: nn.Module, name: str) -> None:
    """Replace the last linear layer by the identity: its input is the embedding.

    Raises:
        InvalidModel: the network has no linear layer.
    """
    head = last_linear(network)
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


def _first_channels(network: nn.Module, state: State) -> int | None:
    """Return the input channels of the first convolution's weights in a state dict, or None if it has none."""
    first = next((path for path, module in network.named_modules() if isinstance(module, nn.Conv2d)), "")
    weight = state.get(f"{first}.weight")
    return None if weight is None or weight.ndim < 2 else weight.shape[1]


def last_linear(network: nn.Module) -> str | None:
    """Return the path of a network's last linear layer, or None if it has none."""
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
