"""VICReg. Source: Bardes et al., Variance-Invariance-Covariance Regularization, arXiv:2105.04906."""

from itertools import combinations

import torch
from torch import nn

from training.backbones import mlp
from training.losses import vicreg
from training.methods.method import Batch, Projected, Step, positive_cosine


class VICReg(Projected):
    """The loss is on invariance, variance and covariance of h_φ(f_θ(x)), with f_θ the encoder and h_φ the expander."""

    def build_head(self, dimension: int) -> nn.Module:
        """Return the expander: two hidden layers, and no batch norm after the last."""
        hidden, output = self.recipe.projection
        return mlp(dimension, hidden, hidden, output, last_norm=False)

    def step(self, batch: Batch) -> Step:
        """Return the loss over all pairs of views."""
        h, z = self.project(batch.views)
        s = self.recipe.vicreg
        losses = [vicreg(z[i], z[j], s.lambd, s.mu, s.nu) for i, j in combinations(range(len(z)), 2)]
        return Step(torch.stack(losses).mean(), h.detach(), positive_cosine(z))
