"""SimCLR's step: the loss is on the head's outputs, the backbone's are handed out beside it."""

import pytest
import torch

from training.backbones import build_backbone
from training.losses import nt_xent
from training.methods import build_method
from training.recipe import Recipe


def test_a_step_is_nt_xent_of_the_projections_of_both_views(tiny_recipe: Recipe) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("small-cnn", 1, 8)
    method = build_method(tiny_recipe, backbone.module, backbone.dimension)
    views = torch.randn(2, 6, 1, 8, 8)  # (V, N, C, S, S)
    step = method.step(views)
    h = torch.cat([views[0], views[1]])  # batch norm sees both views at once
    h = method.backbone(h)
    z = method.head(h)  # type: ignore[attr-defined]
    assert float(step.loss.detach()) == pytest.approx(float(nt_xent(z[:6], z[6:], 0.2).detach()), rel=1e-5)
    assert step.embeddings.shape == (12, backbone.dimension)
    assert not step.embeddings.requires_grad
    torch.testing.assert_close(step.embeddings, h.detach())
    step.loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in method.backbone.parameters())
