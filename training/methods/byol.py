"""BYOL. Source: Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733."""

import math
from itertools import permutations

import torch
from torch import nn

from training.backbones import Backbone, mlp
from training.distributed import encode
from training.losses import negative_cosine
from training.methods.method import Batch, Projected, Step, follow, momentum_copy, positive_cosine
from training.recipe import Recipe


class BYOL(Projected):
    """The online networks f_θ, g_θ, q_θ predict the target's z'_ξ = g_ξ(f_ξ(·)) of another view. No negatives."""

    def __init__(self, recipe: Recipe, backbone: Backbone, count: int) -> None:
        super().__init__(recipe, backbone, count)
        self.predictor = mlp(recipe.projection[-1], recipe.byol.predictor, recipe.projection[-1], last_norm=False)
        self.target_backbone, self.target_head = momentum_copy(self.backbone), momentum_copy(self.head)

    def build_head(self, dimension: int) -> nn.Module:
        """Return g: one hidden layer, and no batch norm after the last."""
        return mlp(dimension, *self.recipe.projection, last_norm=False)

    def step(self, batch: Batch) -> Step:
        """Return 2 − 2·cos(q(z), z') over all ordered pairs of views."""
        h, z = self.project(batch.views)
        p = self.predictor(z.flatten(0, 1)).view_as(z)  # (V, N, P)
        with torch.no_grad():
            target = self.target_head(encode(self.target_backbone, batch.views)).view_as(z)
        losses = [2 + 2 * negative_cosine(p[i], target[j]) for i, j in permutations(range(len(p)), 2)]
        return Step(torch.stack(losses).mean(), h.detach(), positive_cosine(z))

    def update(self, progress: float) -> None:
        """Move the target: ξ ← τ·ξ + (1 − τ)·θ, with τ on a cosine from τ_base to 1."""
        tau = 1 - (1 - self.recipe.byol.momentum) * (math.cos(math.pi * progress) + 1) / 2
        follow(self.target_backbone, self.backbone, tau)
        follow(self.target_head, self.head, tau)
