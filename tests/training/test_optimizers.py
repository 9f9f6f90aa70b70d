"""LARS against a NumPy loop and timm's, groups of weights, and the average of weights."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from training.backbones import build_backbone
from training.methods import Method, build_method
from training.optimizers import LARS, build_optimizer, follow_weights, layer_depths, parameter_groups
from training.recipe import Recipe


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)


def method_of(recipe: Recipe, frozen: tuple[str, ...] = ()) -> Method:
    return build_method(recipe, build_backbone("small-cnn", 1, 8, None, frozen), 100)


def gradients(weights: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(weight.shape, generator=generator) for weight in weights]


def test_lars_moves_weights_as_a_numpy_loop_does() -> None:
    matrix, vector, empty = (nn.Parameter(value) for value in (torch.randn(3, 4), torch.randn(4), torch.zeros(2, 2)))
    weights: list[Tensor] = [matrix, vector, empty]
    expected = [weight.detach().numpy().astype(np.float64) for weight in weights]
    velocities = [np.zeros_like(weight) for weight in expected]
    optimizer = LARS([{"params": weights, "weight_decay": 0.1}], 0.5, 0.9)
    for step, rate in enumerate((0.5, 0.3, 0.2)):
        optimizer.param_groups[0]["lr"] = rate
        for number, gradient in enumerate(gradients(weights, step)):
            weights[number].grad = gradient
            w, g = expected[number], gradient.numpy().astype(np.float64)
            if w.ndim > 1:
                local = 1.0
                if np.linalg.norm(w) and np.linalg.norm(g):
                    local = float(1e-3 * np.linalg.norm(w) / (np.linalg.norm(g) + 0.1 * np.linalg.norm(w)))
                g = local * (g + 0.1 * w)
            velocities[number] = 0.9 * velocities[number] + rate * g
            expected[number] = w - velocities[number]
        optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), value, atol=1e-6)


def test_lars_at_a_constant_rate_is_the_one_of_timm() -> None:
    ours, theirs = (nn.Parameter(torch.arange(1.0, 13).view(3, 4)) for _ in range(2))
    mine = LARS([{"params": [ours], "weight_decay": 0.1}], 0.5, 0.9)
    timms = Lars([theirs], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coeff=1e-3, eps=0.0)
    for step in range(5):
        (ours.grad,), (theirs.grad,) = gradients([ours], step), gradients([theirs], step)
        mine.step()
        timms.step()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, theirs)


def test_by_default_all_weights_are_one_adamw_group(tiny_recipe: Recipe) -> None:
    ours = method_of(tiny_recipe)
    theirs = deepcopy(ours)
    weights = [weight for weight in theirs.parameters() if weight.requires_grad]
    plain = torch.optim.AdamW(weights, lr=tiny_recipe.learning_rate, weight_decay=tiny_recipe.weight_decay, fused=True)
    optimizer = build_optimizer(ours, tiny_recipe)
    assert len(optimizer.param_groups) == 1
    for each, made in ((ours, optimizer), (theirs, plain)):
        for weight, gradient in zip(each.parameters(), gradients(list(each.parameters()), 0), strict=True):
            weight.grad = gradient
        made.step()
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_earlier_layers_learn_at_lower_rates(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, backbone_rate=0.1, layer_decay=0.5, decay_norms=False)
    method = method_of(recipe, ("0",))
    scales = {
        id(weight): (group["scale"], group["weight_decay"])
        for group in parameter_groups(method, recipe)
        for weight in group["params"]
    }
    named = {name: scales.get(id(weight)) for name, weight in method.named_parameters()}
    decay = recipe.weight_decay
    # The first convolution is frozen.
    assert named["backbone.0.weight"] is None
    assert named["backbone.1.weight"] == pytest.approx((0.1 / 8, 0))
    assert named["backbone.3.weight"] == pytest.approx((0.1 / 4, decay))
    assert named["head.0.weight"] == (1, decay)
    assert named["head.1.weight"] == (1, 0)
    assert named["backbone.10.weight"] == pytest.approx((0.1, decay))


@pytest.mark.parametrize(
    ("name", "deepest", "depths"),
    [
        (
            "timm:tf_efficientnet_lite0",
            8,
            {"conv_stem.weight": 0, "bn1.bias": 0, "blocks.6.0.bn1.bias": 7, "bn2.bias": 8},
        ),
        ("timm:test_vit", 6, {"cls_token": 0, "pos_embed": 0, "blocks.0.norm1.weight": 1, "norm.weight": 6}),
        ("resnet18", 8, {"conv1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.bias": 8}),
    ],
)
def test_blocks_of_a_network_are_its_layers(name: str, deepest: int, depths: dict[str, int]) -> None:
    found = layer_depths(build_backbone(name, 3, 160 if "vit" in name else 64).module)
    assert max(found.values()) == deepest
    assert {key: found[key] for key in depths} == depths


def test_an_average_of_weights_follows_its_formula() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average, state = deepcopy(network), network.state_dict()
    expected = state["0.weight"].item()
    for step in range(1, 41):
        for key in ("0.weight", "1.running_mean", "1.num_batches_tracked"):
            state[key].fill_(step)
        follow_weights(average, network, 0.5, step)
        momentum = min(0.5, (1 + step) / (10 + step))
        expected = momentum * expected + (1 - momentum) * step
    found = average.state_dict()
    assert found["0.weight"].item() == pytest.approx(expected)
    assert found["1.running_mean"].item() == pytest.approx(expected, abs=1e-3)
    # A count is no number to average.
    assert found["1.num_batches_tracked"].item() == 40
