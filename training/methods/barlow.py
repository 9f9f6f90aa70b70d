"""Barlow Twins. Source: Zbontar et al., Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230."""

from itertools import combinations

import torch
from torch import nn

from training.backbones import mlp
from training.losses import barlow_twins
from training.methods.method import Batch, Projected, Step, positive_cosine


class Barlow(Projected):
    """The loss draws the cross-correlation of two views' projections to the identity. Wide projections help."""

    def build_head(self, dimension: int) -> nn.Module:
        """Return the projector: two hidden layers, and no batch norm after the last."""
        hidden, output = self.recipe.projection
        return mlp(dimension, hidden, hidden, output, last_norm=False)

    def step(self, batch: Batch) -> Step:
        """Return the loss over all pairs of views."""
        h, z = self.project(batch.views)
        losses = [barlow_twins(z[i], z[j], self.recipe.barlow.lambd) for i, j in combinations(range(len(z)), 2)]
        return Step(torch.stack(losses).mean(), h.detach(), positive_cosine(z))
