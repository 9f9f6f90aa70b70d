"""The optimizer of a run: which weights learn, at which rate, with which decay; and the average of the weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from training.methods import Method
from training.recipe import Recipe

# η of LARS, as in the paper and in SimCLR.
_TRUST = 1e-3


def build_optimizer(method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of all weights that learn.

    Each group has a `scale`: the loop sets its learning rate to the run's times this.
    """
    rate, momentum = recipe.learning_rate, recipe.momentum
    groups = parameter_groups(method, recipe)
    if recipe.optimizer == "lars":
        return LARS(groups, rate, momentum)
    if recipe.optimizer == "sgd":
        # The fused kernel takes no weights that begin to learn later than others.
        fused = not (recipe.method == "dino" and recipe.dino.frozen)
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=recipe.nesterov, fused=fused)
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def parameter_groups(method: Method, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the weights that learn, grouped by their scale of the learning rate and their weight decay.

    The scale of a head is 1, that of the backbone's last layer `backbone_rate`, and that of each layer before it
    `layer_decay` times that of the next.

    Source: layer-wise decay, Clark et al., ELECTRA, arXiv:2003.10555; Bao et al., BEiT, arXiv:2106.08254.
    """
    depths = layer_depths(method.backbone)
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in method.named_parameters():
        if not weight.requires_grad:
            continue
        scale = 1.0
        if name.startswith("backbone."):
            depth = depths[name.removeprefix("backbone.")]
            scale = recipe.backbone_rate * recipe.layer_decay ** (deepest - depth)
        # Biases, and the scales and shifts of norms, are vectors.
        decay = recipe.weight_decay if recipe.decay_norms or weight.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(weight)
    return [{"params": weights, "scale": scale, "weight_decay": decay} for (scale, decay), weights in groups.items()]


def layer_depths(backbone: nn.Module) -> dict[str, int]:
    """Return the depth, from 0, of the layer that each parameter of a backbone belongs to.

    A layer is a child of the backbone, or of a sequence of blocks in it. One without a matrix, such as a batch norm,
    belongs to the layer before it; parameters of the backbone itself, such as the positions of a transformer, belong to
    the first.
    """
    depths, depth = {name: 0 for name, _ in backbone.named_parameters()}, -1
    for path, layer in _layers(backbone):
        own = dict(layer.named_parameters(prefix=path))
        if any(weight.ndim > 1 for weight in own.values()):
            depth += 1
        depths |= dict.fromkeys(own, max(depth, 0))
    return depths


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}{name}"
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from ((f"{inner}.{number}", block) for number, block in child.named_children())
        elif any(isinstance(part, nn.Sequential | nn.ModuleList) for part in child.children()):
            yield from _layers(child, f"{inner}.")
        else:
            yield inner, child


class LARS(torch.optim.Optimizer):
    """SGD with momentum m whose every weight matrix w has a learning rate of its own, by its norm and its gradient's.

        λ = η · ‖w‖ / (‖∇w‖ + β‖w‖)      v ← m·v + γ·λ·(∇w + β·w)      w ← w − v

    Biases and the parameters of norms, which are vectors, have λ = 1 and no weight decay, as in SimCLR. A matrix has
    λ = 1 too where its norm or its gradient's is 0.

    Source: You et al., Large Batch Training of Convolutional Networks, arXiv:1708.03888, algorithm 1.
    """

    def __init__(self, groups: list[dict[str, Any]], rate: float, momentum: float = 0.9, decay: float = 0.0) -> None:
        """Take groups of parameters.

        Args:
            groups: as torch's optimizers take them.
            rate: γ, kept as each group's `lr`.
            momentum: m.
            decay: β, of groups without a `weight_decay` of their own.
        """
        super().__init__(groups, {"lr": rate, "momentum": momentum, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Move each weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["velocity"] = torch.zeros_like(weight)
                matrix = weight.ndim > 1
                update = _adapted(weight, weight.grad, group["weight_decay"]) if matrix else weight.grad
                weight.sub_(state["velocity"].mul_(group["momentum"]).add_(update, alpha=group["lr"]))


def _adapted(weight: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """Return λ · (∇w + β·w)."""
    length, slope = weight.norm(), gradient.norm()
    local = _TRUST * length / (slope + decay * length)
    # Without waiting for the device, as an `if` would.
    return gradient.add(weight, alpha=decay) * torch.where((length > 0) & (slope > 0), local, 1.0)


@torch.no_grad()
def follow_weights(average: nn.Module, network: nn.Module, momentum: float, step: int) -> None:
    """Move an average of a network's weights: ξ ← m·ξ + (1 − m)·θ, statistics of batch norms included.

    Args:
        average: a copy of the network; changes in place.
        network: after its optimizer step.
        momentum: m. In the first steps it is (1 + step) / (10 + step) if that is less, so that the average forgets the
            weights that the run began with.
        step: the number of steps so far, the last one included.

    Source: Polyak and Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.
    """
    m = min(momentum, (1 + step) / (10 + step))
    for xi, theta in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if xi.is_floating_point():
            xi.lerp_(theta, 1 - m)
        else:
            xi.copy_(theta)
